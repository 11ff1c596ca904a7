"""HiVG as a whole: a prediction depends on its own sample only, and each output is what its description says."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from makers import OUTPUTS, assert_close, assert_same_output, make_batch, make_clip, make_hivg, random, watch

from hivg.bridge import KINDS
from hivg.clip import CLIP_SIZES
from hivg.model import HiVG, HiVGConfig, HiVGOutput

PER_SAMPLE = [name for name in OUTPUTS if name != "logits_per_text"]


def rows(output, index):
    """The output of some samples of a batch."""
    return HiVGOutput(**{name: getattr(output, name)[index] for name in PER_SAMPLE},
                      logits_per_text=output.logits_per_text[index][:, index])


# --- one sample's prediction is its own ---


@pytest.mark.parametrize("kind, text_padding", [*((kind, "masked") for kind in KINDS), ("adaptive", "released")])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_batch_changes_nothing(kind, text_padding, dtype, tol):
    """Batch size, order, neighbours, and neighbours with a longer text, by which the rows are padded."""
    model = make_hivg(bridge=kind, text_padding=text_padding, stage=1, dtype=dtype)
    images, padding_mask, token_ids = batch = make_batch(dtype=dtype)
    together = model(*batch)
    for i, length in enumerate(token_ids.argmax(1) + 1):
        alone = model(images[i : i + 1], padding_mask[i : i + 1], token_ids[i : i + 1, :length])
        assert_same_output(rows(together, [i]), alone, tol, ("boxes",) if dtype == torch.float32 else PER_SAMPLE)
    order = [2, 0, 3, 1]
    assert_same_output(model(*(x[order] for x in batch)), rows(together, order), tol)
    assert_same_output(model(*(x[[0, 0, 2]] for x in batch)), rows(together, [0, 0, 2]), tol)
    assert (together.boxes[0] - together.boxes[1]).abs().max() > 1e-3  # else nothing was tested


def test_image_of_another_size(hivg, batch):
    _, padding_mask, token_ids = batch
    with pytest.raises(ValueError, match="images of \\(64, 32\\) pixels; this model takes squares of 64"):
        hivg(torch.zeros(4, 3, 64, 32).double(), padding_mask, token_ids)


# --- the heads ---


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 5)])
def test_mask_head_is_three_convolutions(hivg, grid):
    patches = random(3, grid[0] * grid[1], 32)
    end = F.normalize(random(3, 32, seed=1), dim=-1)
    x = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
    for conv in hivg.mask_convs:
        x = conv(x)
    expected = torch.einsum("bdyx,bd->byx", x, end)[:, None]
    assert expected.shape == (3, 1, 8 * grid[0], 8 * grid[1])
    assert_close("mask_logits", hivg.mask_head(patches, end, grid), expected, 1e-10)


def test_token_map(hivg, batch):
    patches, end = watch(hivg, "rtcc", hivg, batch)
    assert_close("length of the end token", end.norm(dim=-1), torch.ones(4).double(), 1e-10)
    logits = hivg.rtcc(patches, end)
    for b in range(4):
        for p in range(16):
            expected = hivg.rtcc_mlp(hivg.rtcc_norm(patches[b, p])) @ end[b]
            assert_close(f"token map at {b}, {p}", logits[b, p], expected, 1e-10)


def test_end_token_is_the_texts_own(hivg, batch):
    """The heads get the encoder's output at each row's end token."""
    images, padding_mask, token_ids = batch
    _, _, words = hivg.encode(*watch(hivg, "encode", hivg, batch))
    _, end = watch(hivg, "rtcc", hivg, batch)
    ends = (token_ids == hivg.tokenizer.eot_id).int().argmax(1)
    assert_close("end token", end, F.normalize(words[range(4), ends], dim=-1), 1e-10)


@pytest.mark.parametrize("level_norm", [True, False])
def test_levels_are_the_blocks_of_the_config(batch, level_norm):
    """Hidden states after these vision blocks, counted from 1, in this order, each normalised or not, projected
    twice."""
    model = make_hivg(bridge="none", visual_levels=(3, 1), level_norm=level_norm)
    visual, text, *_ = watch(model, "encode", model, batch)
    states = model.clip.visual(batch[0])
    levels = [states[2], states[0]]
    if level_norm:
        levels = [F.layer_norm(x, (64,), torch.ones(64).double(), torch.zeros(64).double()) for x in levels]
    expected = model.visual_proj(model.levels_proj(torch.cat(levels, -1)))
    assert_close("visual tokens", visual, expected, 1e-10)
    states = model.clip.text(batch[2])
    assert_close("text tokens", text, model.text_proj(model.clip.text.project(states[-1])), 1e-10)


def test_box_is_a_sigmoid_of_the_reg_token(hivg, batch):
    reg, _, _ = hivg.encode(*watch(hivg, "encode", hivg, batch))
    a, b, c = (layer for layer in hivg.box_head if isinstance(layer, nn.Linear))
    assert_close("boxes", hivg(*batch).boxes, torch.sigmoid(c(b(a(reg).relu()).relu())), 1e-10)


def test_box_is_computed_in_float32():
    """Also where the products are in bfloat16, in which a coordinate would be a multiple of 1/256."""
    model = make_hivg(dtype=torch.float32)
    batch = make_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        reg, _, _ = model.encode(*watch(model, "encode", model, batch))
        boxes = model(*batch).boxes
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, model.box_head(reg.float()).sigmoid())


@pytest.mark.parametrize("n", [1, 4])
def test_shapes(hivg, n):
    output = hivg(*(x[:n] for x in make_batch()))
    shapes = {"boxes": (n, 4), "token_similarity": (n, 16), "mask_logits": (n, 1, 32, 32), "logits_per_text": (n, n),
              "text_features": (n, 40), "image_features": (n, 40)}
    found = {name: tuple(tensor.shape) for name, tensor in vars(output).items() if tensor is not None}
    assert found == shapes
    assert ((output.boxes > 0) & (output.boxes < 1)).all()


def test_the_mask_head_can_be_left_out(hivg, batch):
    output = hivg(*batch, with_mask=False)
    assert output.mask_logits is None
    assert_same_output(output, hivg(*batch), 0, [name for name in OUTPUTS if name != "mask_logits"])


# --- the score ---


def output_of(boxes, token_similarity):
    return HiVGOutput(torch.tensor(boxes), token_similarity, None, None, None, None)


def test_score_on_paper(hivg):
    """Squares of 64 with 4 x 4 patches. Logits ln 3 and ln 9 on two patches and 0 elsewhere: 0.75, 0.9 and 0.5."""
    logits = torch.zeros(4, 16)
    logits[:, 5], logits[:, 6] = math.log(3), math.log(9)
    boxes = [[0.5, 0.375, 0.5, 0.25],  # pixels 16 to 48 and 16 to 32: exactly these two patches
             [0.375, 0.375, 0.25, 0.25],  # the first of them
             [0.5, 0.25, 1.0, 0.5],  # the upper half: both, and six others
             [0.5, 0.75, 1.0, 0.5]]  # the lower half: neither
    assert_close("score", hivg.score(output_of(boxes, logits)), torch.tensor([0.9, 0.75, 0.9, 0.5]), 1e-6)


def test_score_takes_a_patch_by_its_first_pixel(hivg):
    """As the targets of RTCC do: from pixel 16.5 a box touches the pixel that patch 5 is sampled at, from 17 not."""
    logits = torch.full((2, 16), -60.0)
    logits[:, 5] = 60
    boxes = [[(16.5 + 60) / 128, 0.375, (60 - 16.5) / 64, 0.25], [(17.5 + 60) / 128, 0.375, (60 - 17.5) / 64, 0.25]]
    assert_close("score", hivg.score(output_of(boxes, logits)), torch.tensor([1.0, 0.0]), 1e-6)


def test_score_is_in_0_to_1(hivg, batch):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(200, 4, generator=generator)
    scores = hivg.score(output_of(boxes.tolist(), 9 * torch.randn(200, 16, generator=generator)))
    assert scores.shape == (200,) and (scores >= 0).all() and (scores <= 1).all() and scores.std() > 0.01
    output = hivg(*batch)
    boxes, scores = hivg.boxes_and_scores(output)
    assert boxes.dtype == torch.float32 and scores == hivg.score(output).tolist()
    assert_close("boxes", boxes, output.boxes, 1e-6)


@pytest.mark.parametrize("name", ["boxes", "token_similarity"])
def test_no_number_is_an_error(hivg, batch, name):
    output = hivg(*batch)
    broken = getattr(output, name).clone()
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="weights are damaged"):
        hivg.boxes_and_scores(replace(output, **{name: broken}))


# --- ready for prediction ---


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_serves_several_texts(kind, batch):
    """The same as the image repeated, and up to the first bridge the image is computed once."""
    model = make_hivg(bridge=kind, stage=1, bridge_blocks=(1, 2))
    images, padding_mask, token_ids = batch
    seen = []
    for block in model.clip.visual.blocks:
        block.register_forward_hook(lambda _, args, x: seen.append(len(x)))
    alone = model(images[:1], padding_mask[:1], token_ids)
    assert seen == ([1, 1, 1] if kind == "none" else [1, 4, 4])
    assert_same_output(alone, model(images[:1].expand(4, -1, -1, -1), padding_mask[:1].expand(4, -1, -1), token_ids))


def test_for_prediction():
    """Weights stored in bfloat16 but for the box head, boxes in float32 and near, the model itself as it was."""
    model = make_hivg(dtype=torch.float32, stage=1).train()
    fast = model.for_prediction(torch.device("cpu"), torch.bfloat16)
    assert model.training and not fast.training
    for name, p in fast.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("box_head.") else torch.bfloat16), name
        assert ".A." not in name
    assert all(p.dtype == torch.float32 for p in model.parameters())
    batch = make_batch(dtype=torch.float32)
    with torch.inference_mode():
        rough = fast(*batch)
        exact = model.eval()(*batch)
    assert rough.boxes.dtype == torch.float32 and rough.token_similarity.dtype == torch.bfloat16
    assert_close("boxes", rough.boxes, exact.boxes, 0.01)
    assert (rough.boxes * 256 % 1).any()  # in bfloat16 they would be multiples of 1/256
    assert_same_output(model.for_prediction(torch.device("cpu"), torch.float32)(*batch), exact, 1e-4)


@pytest.mark.parametrize("kind, text_padding, mode", [
    *((kind, "masked", False) for kind in KINDS), ("adaptive", "released", False), ("adaptive", "masked", True)])
def test_compiles_in_one_piece(kind, text_padding, mode, batch):
    """No graph break; fullgraph=True raises at the first one. Dropout, which training adds, is outside the bridges."""
    torch._dynamo.reset()
    model = make_hivg(bridge=kind, stage=1, text_padding=text_padding).train(mode)
    results = []
    for run in (torch.compile(model, fullgraph=True, backend="eager"), model):
        torch.manual_seed(0)
        results.append(run(*batch))
    assert_same_output(*results)


# --- the configuration and the whole ---


def test_with_bridge(batch):
    """All that was there stays, the new bridges change nothing yet, and what is trained is all but CLIP."""
    bare = make_hivg(bridge="none")
    model = bare.with_bridge("adaptive").double()
    assert model.tokenizer is bare.tokenizer
    assert model.config == replace(bare.config, bridge="adaptive") and sorted(model.bridges) == ["0", "2"]
    assert not model.training and bare.train().with_bridge("constant").training
    assert_same_output(model(*batch), bare.eval()(*batch))
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("clip.")), name
        if not name.startswith("bridges."):
            assert torch.equal(p, bare.state_dict()[name]), name


@pytest.mark.parametrize("mode, stage", [("hierarchical", 3), ("hierarchical", 1), ("shared", 2), ("vanilla", 1)])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_merged(mode, stage, dtype, tol):
    model, batch = make_hivg(lora=mode, stage=stage, dtype=dtype), make_batch(dtype=dtype)
    merged, output = model.merged(), model(*batch)
    assert_same_output(merged(*batch), output, tol, ("boxes",) if dtype == torch.float32 else PER_SAMPLE)
    assert (merged.config.lora, merged.config.stage, model.config.stage) == ("none", 0, stage)
    assert HiVG(merged.config).state_dict().keys() == merged.state_dict().keys()
    assert_same_output(model(*batch), output, 0)


def test_levels_start_as_clips_projection():
    clip = make_clip(dtype=torch.float32)
    model = make_hivg(dtype=torch.float32, fresh=True, visual_levels=(1, 2, 3))
    x = torch.randn(3, 5, 64)
    expected = sum(level @ clip.visual.proj for level in x)
    assert_close("levels_proj", model.levels_proj(torch.cat([*x], -1)), expected, 1e-5)
    assert all(torch.equal(p, model.clip.state_dict()[name]) for name, p in clip.state_dict().items())


@pytest.mark.parametrize("size, blocks, levels, text, width", [
    ("ViT-B/16", (0, 3, 7, 11), (1, 4, 8, 12), (12,), 512),
    ("ViT-L/14", (4, 10, 16, 22), (6, 12, 18, 24), (12,), 768),
    ("tiny", (1, 3, 5), (1, 2, 4, 6), (2, 4), 128)])
def test_layers_for_a_clip(size, blocks, levels, text, width):
    config = HiVGConfig.for_clip(CLIP_SIZES[size])
    assert (config.bridge_blocks, config.visual_levels, config.text_layers) == (blocks, levels, text)
    assert config.width == width and width % config.encoder_heads == 0
    assert config.clip == CLIP_SIZES[size]
    if size != "tiny":  # the paper's
        assert (config.encoder_layers, config.encoder_heads, config.encoder_ffn, config.dropout) == (6, 8, 2048, 0.1)
        assert (config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_groups) == (32, 16, 0.1, 3)
    changes = dict(text_layers=(1, 2), width=8)
    assert HiVGConfig.for_clip(CLIP_SIZES[size], **changes) == replace(config, **changes)


def test_unknown_depth():
    with pytest.raises(ValueError, match="ViT of 5 layers; known: 6, 12, 24"):
        HiVGConfig.for_clip(replace(CLIP_SIZES["tiny"], vision_layers=5))
