"""A training step: what precision its contrast has, and that it never waits for a number."""

import pytest
import torch
from makers import calls_of, make_hivg, make_training_batch
from torch.utils._python_dispatch import TorchDispatchMode

from hivg.clip import similarity
from hivg.fast import training_copy
from hivg.losses import LossWeights
from hivg.training import criterion as module
from hivg.training import distributed
from hivg.training.criterion import Criterion
from hivg.training.graph import WARM_UP, GraphedStep
from hivg.training.optimizers import clip_and_step, make_optimizers, set_learning_rate


def test_contrast_of_bfloat16_features_is_in_float32(monkeypatch):
    seen = calls_of(monkeypatch, module, "grounding_losses")
    model = make_hivg(dtype=torch.float32, stage=1)
    with torch.autocast("cpu", torch.bfloat16):
        Criterion(model, LossWeights(), "l1")(make_training_batch())
    output, _, logits_per_text, *_ = seen[0]
    assert output.text_features.dtype == torch.bfloat16 and logits_per_text.dtype == torch.float32
    expected = similarity(output.text_features.float(), output.image_features.float(), model.clip.logit_scale)
    assert torch.equal(logits_per_text, expected)


def test_contrast_is_told_what_is_there(monkeypatch):
    seen = calls_of(monkeypatch, module, "grounding_losses")
    batch = make_training_batch()
    criterion = Criterion(make_hivg(dtype=torch.float32), LossWeights(), "l1")
    criterion(batch)
    criterion(batch | {"present": torch.arange(len(batch["boxes"])) != 1})
    assert seen[0][-1] is None and seen[1][-1].tolist() == [True, False, True, True]


class NoReading(TorchDispatchMode):
    """Refuses what makes the program wait for the device: a number that becomes Python's, a size that depends on
    values."""

    WAIT = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default, torch.ops.aten.equal.default,
            # their gradients count the zeros, but not under such a mode as this
            torch.ops.aten.prod.default, torch.ops.aten.prod.dim_int}
    INDEX = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.WAIT, f"{function} waits for the device"
        if function in self.INDEX:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"{function} waits for the count of a mask"
        return function(*args, **kwargs or {})


def test_reading_is_noticed():
    with NoReading():
        for read in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero(),
                     lambda x: x.prod(0)):
            with pytest.raises(AssertionError, match="waits"):
                read(torch.ones(3))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("is_graphed", [False, True])
def test_a_step_waits_for_no_number(optimizer, is_graphed):
    """All of a step that train.py does at every step: losses with both hints, clipping, the update, the means."""
    model = make_hivg(dtype=torch.float32, stage=1).train()
    loss = Criterion(training_copy(model, torch.bfloat16), LossWeights(patch_box=1.0, reg_attention=1.0), "l1")
    optimizers = make_optimizers(model, optimizer, 1e-4)
    batch = make_training_batch()
    batch["present"] = torch.arange(len(batch["boxes"])) != 1

    def step(parts):
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss(parts[0])
        sum(terms.values()).backward()
        return distributed.mean([terms]) | {"gradient_norm": clip_and_step(model, optimizers, 1.0)}

    if is_graphed:
        step = GraphedStep(step, optimizers, 77, torch.device("cpu"))
    for _ in range(WARM_UP + 1):  # the optimizers' state is made in the first
        with NoReading():
            set_learning_rate(optimizers, 1e-3)
            step([batch])


@pytest.mark.parametrize("with_clip", [False, True])
@pytest.mark.parametrize("off", [(), ("mask_focal",), ("mask_focal", "mask_dice"), ("box", "giou"), ("clc",)])
def test_data_parallelism_is_told_of_what_has_no_gradient(off, with_clip):
    model = make_hivg(dtype=torch.float32)
    model.clip.requires_grad_(with_clip)
    criterion = Criterion(model, LossWeights(**dict.fromkeys(off, 0)), "l1")
    sum(criterion(make_training_batch()).values()).backward()
    is_unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    assert criterion.has_unused_head() == is_unused
    assert is_unused == (off in (("mask_focal", "mask_dice"), ("box", "giou")) or off == ("clc",) and with_clip)
