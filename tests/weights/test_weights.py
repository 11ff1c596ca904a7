"""Weights files: what goes in comes out, a bad file gets one line that names it."""

import pytest
import torch
from makers import make_batch, make_clip, make_hivg, trained
from makers_weights import assert_same_weights, contents, message_of
from safetensors.torch import save_file

from hivg import weights
from hivg.model import HiVG
from hivg.training.presets import PRESETS
from hivg.weights import saving
from train import Settings, begin_stage

LOADERS = {"clip": weights.load_clip, "hivg": weights.load_hivg}


def make(kind, **changes):
    return (make_hivg if kind == "hivg" else make_clip)(dtype=torch.float32, **changes)


def assert_same_model(a, b):
    """Configuration, every tensor bit for bit, what is trained, tokenizer."""
    assert a.config == b.config
    assert list(a.state_dict()) == list(b.state_dict())
    assert_same_weights(a, b)
    assert trained(a) == trained(b)
    assert a.tokenizer.merges == b.tokenizer.merges
    assert a.tokenizer.context_length == b.tokenizer.context_length


# --- there and back ---


def test_clip_comes_back(tmp_path):
    clip = make("clip", context_length=20)
    weights.save(tmp_path / "new" / "clip.safetensors", clip, {"accuracy": 0.5, "stage": "pretrain"})
    loaded = weights.load_clip(tmp_path / "new" / "clip.safetensors")
    assert_same_model(loaded, clip)
    assert loaded.info == {"accuracy": 0.5, "stage": "pretrain"} and not loaded.training


CONFIGURATIONS = [
    *({"lora": "hierarchical", "stage": stage} for stage in range(4)),
    *({"lora": "shared", "stage": stage} for stage in range(4)),
    *({"lora": "vanilla", "stage": stage} for stage in range(2)), {"lora": "none"}, {"bridge": "projected"},
    {"bridge": "constant"}, {"bridge": "none"}, {"text_norm": False, "normalization": "imagenet", "lora_alpha": 3.5},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS, ids=str)
def test_hivg_comes_back(tmp_path, changes):
    model = make("hivg", **changes)
    weights.save(tmp_path / "hivg.safetensors", model)
    loaded = weights.load_hivg(str(tmp_path / "hivg.safetensors"))
    assert_same_model(loaded, model)
    assert loaded.info == {} and not loaded.training
    batch = make_batch(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(*batch).boxes, model(*batch).boxes)
    if model.config.lora in ("hierarchical", "shared") and model.config.stage < 3:  # training can continue
        loaded.add_stage(1 + model.config.stage)
        model.add_stage(1 + model.config.stage)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert trained(loaded) == trained(model)


def test_a_round_trip_keeps_the_info(tmp_path):
    """Else the score would lose its calibration without a word."""
    model = make("hivg")
    model.info = {"score_calibration": [0.5, 1.0], "dataset": "shapes"}
    weights.save(tmp_path / "a.safetensors", model)
    assert weights.load_hivg(tmp_path / "a.safetensors").info == model.info
    weights.save(tmp_path / "a.safetensors", model, {})
    assert weights.load_hivg(tmp_path / "a.safetensors").info == {}


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    """A new setting whose range nobody gave, say: before the stages behind it are trained."""
    model = make("hivg")
    object.__setattr__(model.config, "lora_rank", 0)
    with pytest.raises(ValueError, match="lora_rank must be a whole number in 1.."):
        weights.save(tmp_path / "a.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_model_made_in_python_has_no_tokenizer_yet(tmp_path):
    model = HiVG(make_hivg().config)
    assert model.tokenizer is None
    weights.save(tmp_path / "hivg.safetensors", model)
    loaded = weights.load_hivg(tmp_path / "hivg.safetensors")
    assert loaded.tokenizer is None and torch.equal(loaded.reg_token, model.reg_token)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_bytes_load_as_float32(tmp_path, kind, dtype):
    model = make(kind)
    for name, stored in (("half", dtype), ("full", None)):
        weights.save(tmp_path / name, model, dtype=stored)
    assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "full").stat().st_size
    for name, tensor in LOADERS[kind](tmp_path / "half").state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float()), name


# --- bad files ---


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("changes, expected", [
    ({"kind": "lora"}, "which this project does not write"), ({"config": None}, "no 'config' in it"),
    ({"config": '{"clip": '}, "settings are not valid"), ({"config": "[1]"}, "settings are not valid"),
    ({"tokenizer": None}, "tokenizer"), ({"tokenizer": "a b c"}, "settings are not valid"),
    ({"tokenizer": "a b\n"}, "vocabulary"),
], ids=str)
def test_damaged_metadata_gets_one_line(tmp_path, kind, changes, expected):
    path = tmp_path / "weights.safetensors"
    weights.save(path, make(kind))
    tensors, metadata = contents(path)
    metadata |= changes
    save_file(tensors, path, {name: text for name, text in metadata.items() if text is not None})
    assert expected in message_of(path, LOADERS[kind])


BIAS = {"clip": "visual.ln_post.bias", "hivg": "levels_proj.bias"}


@pytest.mark.parametrize("kind", LOADERS)
def test_keys_and_shapes_must_be_exact(tmp_path, kind):
    path = tmp_path / "weights.safetensors"
    weights.save(path, make(kind))
    tensors, metadata = contents(path)
    bias = BIAS[kind]

    save_file({name: t for name, t in tensors.items() if name != bias}, path, metadata)
    assert f"missing: {bias}" in message_of(path, LOADERS[kind])
    save_file(tensors | {"extra": torch.ones(2)}, path, metadata)
    assert "left over: extra" in message_of(path, LOADERS[kind])
    save_file(tensors | {bias: torch.ones(7)}, path, metadata)
    assert f"{bias} (7,) instead of" in message_of(path, LOADERS[kind])
    save_file({f"x.{name}": t for name, t in tensors.items()}, path, metadata)
    message = message_of(path, LOADERS[kind])
    assert "missing: " in message and "left over: x." in message and " more" in message


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_numbers_must_be_finite(tmp_path, kind, value, dtype):
    path = tmp_path / "weights.safetensors"
    model = make(kind)
    model.state_dict()[BIAS[kind]][3] = value
    weights.save(path, model, dtype=dtype)
    assert f"its tensor {BIAS[kind]} holds NaN or infinity" in message_of(path, LOADERS[kind])


@pytest.mark.parametrize("value, expected", [(torch.tensor(1 + 1j), "is complex"),
                                             (torch.tensor(1e300, dtype=torch.float64), "holds NaN or infinity")])
def test_values_that_float32_cannot_hold(tmp_path, value, expected):
    if value.is_complex():
        pytest.importorskip("safetensors", minversion="0.7")  # older ones neither write nor read them
    path = tmp_path / "weights.safetensors"
    weights.save(path, make("clip"))
    tensors, metadata = contents(path)
    save_file(tensors | {"logit_scale": value}, path, metadata)
    assert f"its tensor logit_scale {expected}" in message_of(path)


def test_weights_of_the_program_are_found_from_any_folder(tmp_path, monkeypatch):
    """Unless there is a file of that name below the current folder."""
    (tmp_path / "fetched").mkdir()
    (tmp_path / "here").mkdir()
    weights.save(tmp_path / "fetched/ViT-B-16.pt", make("clip", text_layers=1))
    monkeypatch.setattr(saving, "REPOSITORY", tmp_path / "fetched")
    monkeypatch.chdir(tmp_path / "here")
    name = PRESETS["refcoco-base"]["clip"]
    assert weights.load_clip(name).config.text_layers == 1
    for other in ("weights/ViT-B-17.pt", "fetched/ViT-B-16.pt", "ViT-B-16.pt"):
        with pytest.raises(weights.WeightsError, match=f"^{other}: no such weights file"):
            weights.read(other)
    weights.save(name, make("clip", text_layers=2))
    assert weights.load_clip(name).config.text_layers == 2


def test_the_first_stage_starts_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = begin_stage(Settings(), 0, tmp_path)
    assert model.tokenizer
