"""Copies that compute the same in fewer calls: joined adapters, and a whole model to train or to predict with."""

import pytest
import torch
import torch.nn as nn
from makers import assert_close, assert_same_output, loss_of, make_batch, make_hivg, random, randomise
from torch.utils._python_dispatch import TorchDispatchMode

from hivg import fast, weights
from hivg.fast import simplify, training_copy
from hivg.lora import JoinedLoRA, LoRALinear
from hivg.losses import LossWeights
from hivg.training.run import changed_by_training

# --- adapters of the same input ---


def make_layers(n, pairs, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [LoRALinear(nn.Linear(7, 5), rank=3, alpha=12, dropout=dropout) for _ in range(n)]
    for stage in range(pairs):
        for layer in layers:
            layer.add_pair(stage + 1)
    return [randomise(layer, i, std=0.5).to(dtype) for i, layer in enumerate(layers)]


def results_of(function, layers, x):
    """h (2, 4, n out) of a function of x, and the gradients of x and of the trained A and B."""
    x = x.to(layers[0].weight.dtype).requires_grad_()
    h = function(x)
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((h.double() * random(*h.shape)).sum(), [x, *trained])
    return [h, *gradients]


@pytest.mark.parametrize("n, pairs", [(1, 1), (3, 1), (3, 3)])
def test_joined_adapters_are_the_definition(n, pairs):
    x = random(2, 4, 7)
    layers = make_layers(n, pairs)
    exact = results_of(lambda x: torch.cat([layer(x) for layer in layers], -1), layers, x)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layers = make_layers(n, pairs, dtype=dtype)
        plain = results_of(lambda x: torch.cat([layer(x) for layer in layers], -1), layers, x)
        for i, (joined, plain, whole) in enumerate(zip(results_of(JoinedLoRA(layers), layers, x), plain, exact)):
            own_error = (plain.double() - whole).abs().max().item()
            assert_close(f"{dtype}, result {i}", joined.double(), whole, 1.5 * own_error + 1e-12)
            assert joined.dtype == dtype


def test_dropout_of_joined_adapters():
    """The n layers share a mask, and the frozen pairs see all of x. Gradients against differences, the mask held."""
    layers = make_layers(2, 2, dropout=0.5)
    layers[1].load_state_dict(layers[0].state_dict())
    joined = JoinedLoRA(layers)
    x = random(6, 7)
    a, b = joined(x).chunk(2, -1)
    assert_close("with one mask", a, b, 1e-12)
    assert (a - layers[0].eval()(x)).abs().max() > 0.1
    rows = x.expand(20000, 6, 7)
    assert_close("mean over many masks", joined(rows).mean(0), joined.eval()(x), 0.2)
    for B in joined.B:
        nn.init.zeros_(B)
    assert torch.equal(joined.train()(x), joined.eval()(x))

    def seeded(x, *trained):
        torch.manual_seed(0)
        return joined(x)

    randomise(joined.train(), 1, std=0.5)
    assert torch.autograd.gradcheck(seeded, (x.requires_grad_(), *joined.A, *joined.B))


# --- a whole model ---


def gradients_of(model, copy, dtype=None, weights=LossWeights()):
    """{name: gradient} of the model's parameters by the losses of its copy, under autocast to `dtype`."""
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = loss_of(copy, weights)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("changes", [
    dict(stage=0), dict(stage=2), dict(stage=3, lora="shared", bridge="projected"),
    dict(stage=1, lora="vanilla", bridge="constant")], ids=str)
@pytest.mark.parametrize("clip_is_trained", [False, True])
def test_training_copy_has_the_same_gradients(changes, clip_is_trained):
    """Also where blocks are computed again for the gradient. The model stays as it is."""
    model = make_hivg(dropout=0.0, lora_dropout=0.0, **changes).train()
    if clip_is_trained:
        model.clip.requires_grad_(True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = gradients_of(model, model)
    for recompute in (False, True):
        model.clip.visual.recompute = recompute
        copy = training_copy(model, torch.float32)  # without autocast: float64 stays
        assert {*copy.parameters()} >= {p for p in model.parameters() if p.requires_grad}  # data parallelism needs them
        found = gradients_of(model, copy)
        for name, gradient in expected.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                assert_close(name, found[name], gradient, 1e-9)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_converting_together_changes_no_bit(monkeypatch, together, recompute):
    """With dropout, and with a head that is in no loss."""
    monkeypatch.setattr(fast, "simplify", lambda model: None)
    model = make_hivg(dtype=torch.float32, stage=2, dropout=0.1, lora_dropout=0.1).train()
    model.clip.visual.recompute = recompute
    options = dict(dtype=torch.bfloat16, weights=LossWeights(mask_focal=0, mask_dice=0))
    expected = gradients_of(model, model, **options)
    copy = training_copy(model, torch.bfloat16, together)
    assert {p.dtype for p in copy.clip.visual.blocks[0].mlp.parameters()} == {torch.bfloat16}
    for _ in range(2):  # in the second step anew
        found = gradients_of(model, copy, **options)
        for name, gradient in expected.items():
            assert found[name] is gradient is None or torch.equal(found[name], gradient), name
    assert any(p.requires_grad and expected[name] is None for name, p in model.named_parameters())


def test_training_copy_follows_the_optimizer():
    """It is made once a stage; what a step changes is in the next forward."""
    model = make_hivg(dtype=torch.float32, stage=1).train()
    copy = training_copy(model, torch.bfloat16)
    before = gradients_of(model, copy, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.requires_grad)
    after = gradients_of(model, copy, dtype=torch.bfloat16)
    again = gradients_of(model, training_copy(model, torch.bfloat16), dtype=torch.bfloat16)
    for name, gradient in after.items():
        assert gradient is None or torch.equal(gradient, again[name]), name
    assert not torch.equal(before["visual_proj.weight"], after["visual_proj.weight"])


class Products(TorchDispatchMode):
    """Counts the matrix products, and the conversions, of what is called while it is on."""

    def __init__(self):
        super().__init__()
        self.products = self.conversions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function._schema.name.split("::")[1] in ("mm", "addmm", "bmm", "baddbmm", "baddbmm_")
        self.conversions += function == torch.ops.aten._to_copy.default
        return function(*args, **kwargs or {})


def count(function):
    with Products() as counter:
        function()
    return counter.products, counter.conversions


def test_fewer_calls():
    """In 5 blocks: q, k and v in one product instead of three; with adapters, in three instead of nine."""
    model = make_hivg(dtype=torch.float32, stage=3).train()
    batch = make_batch(dtype=torch.float32)
    copy = training_copy(model, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, conversions = count(lambda: model(*batch))
        after, fewer = count(lambda: copy(*batch))
    assert after == before - 5 * 6 and fewer < 0.3 * conversions, (conversions, fewer)
    with torch.no_grad():
        plain, _ = count(lambda: model.merged().eval()(*batch))
        joined, _ = count(lambda: model.for_prediction(torch.device("cpu"), torch.float32)(*batch))
    assert joined == plain - 5 * 2


def test_simplified_model_is_the_same():
    """In float64, so that a wrong factor cannot pass for rounding."""
    model = make_hivg(stage=2)
    batch = make_batch()
    expected = model(*batch)
    simple = model.merged().requires_grad_(False)
    simplify(simple)
    found = simple(*batch)
    assert_same_output(found, expected, 1e-9)
    assert isinstance(simple.bridges["0"].mlp.gelu, nn.SiLU)
    simplify(simple)  # nothing is left to do
    assert torch.equal(simple(*batch).boxes, found.boxes)


def test_what_an_extension_adds_is_kept():
    """Another activation is not taken for QuickGELU, and what a module counts in training is in the model too."""
    model = make_hivg(stage=2)
    for block in model.clip.visual.blocks:
        block.mlp.gelu = nn.GELU()
    model.box_head.append(nn.BatchNorm1d(4, dtype=torch.float64))
    batch = make_batch()
    expected = model.eval()(*batch).boxes
    predicting = model.for_prediction(torch.device("cpu"), torch.float32).double()
    assert_close("prediction", predicting(*batch).boxes, expected, 1e-5)
    trained = training_copy(model, torch.float32)
    assert_close("training", trained(*batch).boxes, expected, 1e-9)
    trained.train()(*batch)
    assert model.box_head[-1].running_mean.abs().sum() > 0
    assert changed_by_training(model).keys() >= {name for name, _ in model.named_buffers()} > set()  # to resume from


class Scaled(LoRALinear):
    """An adapter of somebody's own."""

    def forward(self, x):
        return 2 * super().forward(x)


def adapt_mlp(block):
    block.mlp.c_fc = LoRALinear(block.mlp.c_fc, 2, 4, 0.0).double()
    block.mlp.c_fc.add_pair(1)


def adapt_otherwise(block):
    block.attn.v_proj = Scaled(block.attn.v_proj, 2, 4, 0.0).double()
    block.attn.v_proj.add_pair(1)


def train_biases(block):
    block.mlp.c_fc.bias.requires_grad_()


def train_one_projection(block):
    block.attn.v_proj.requires_grad_()


@pytest.mark.parametrize("extend", [adapt_mlp, adapt_otherwise, train_biases, train_one_projection])
def test_what_an_extension_trains_is_trained(extend):
    """Copies join and fold what they know, and leave the rest."""
    model = make_hivg(stage=0)
    for block in model.clip.visual.blocks:
        extend(block)
    model = randomise(model).double().eval()
    batch = make_batch()
    expected = model(*batch).boxes
    extended = [p for p in model.clip.visual.parameters() if p.requires_grad]
    trained = training_copy(model, torch.float32)
    found = trained(*batch).boxes
    assert_close("training", found, expected, 1e-9)
    gradients = torch.autograd.grad(found.sum(), extended)
    assert extended and all(gradient.abs().sum() > 0 for gradient in gradients)
    predicting = model.for_prediction(torch.device("cpu"), torch.float32).double()
    assert_close("prediction", predicting(*batch).boxes, expected, 1e-5)


def test_a_merged_model_that_keeps_an_adapter_is_not_saved(tmp_path):
    model = make_hivg(stage=0)
    adapt_otherwise(model.clip.visual.blocks[0])
    with pytest.raises(ValueError, match="has adapters, of which its configuration says nothing"):
        weights.save(tmp_path / "x.safetensors", model.merged())


def test_a_model_for_prediction_is_not_saved(tmp_path):
    """It would be read as damaged."""
    model = make_hivg().for_prediction(torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="made for prediction; save the one that it was made from"):
        weights.save(tmp_path / "x.safetensors", model)
    assert not list(tmp_path.iterdir())
