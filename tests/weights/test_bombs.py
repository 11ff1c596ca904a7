"""Small files that ask for a large model, or unfold to a large table: refused in the memory that they take up."""

import dataclasses
import gzip
import json
import struct

import pytest
import torch
from makers import make_hivg
from makers_limits import outcomes
from makers_weights import make_published_clip, make_released, to_huggingface, to_openai, to_released
from safetensors.torch import save_file

from hivg.tokenizer import Tokenizer


def write_safetensors(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def save_ours(path, kind, config, tensors):
    metadata = {"format": "pt", "kind": kind, "config": json.dumps(config), "info": "{}", "tokenizer": ""}
    save_file(tensors, path, metadata)


def own_with(**changes):
    """-> a writer of our file of a CLIP whose configuration says otherwise."""
    clip = make_published_clip()
    return lambda path: save_ours(path, "clip", vars(clip.config) | changes, clip.state_dict())


def clip_with(to_theirs, name, shape=(1,)):
    """-> a writer of a CLIP under other names with one tensor more."""
    return lambda path: torch.save(to_theirs(make_published_clip()) | {name: torch.zeros(shape)}, path)


def released_with(**args):
    return lambda path: torch.save(to_released(make_released(), **args), path)


def views(size, storage):
    """-> a writer of ten thousand tensors of `size` numbers, all of the same `storage` numbers of the file."""
    whole = torch.zeros(storage)
    return lambda path: torch.save({f"visual.conv1.{i}": whole[i : i + size] for i in range(10_000)}, path)


def write_many_stages(path):
    """Adapters of a hundred stages for as many layers as there are tensors for."""
    config = dataclasses.asdict(make_hivg().config)
    config |= {"stage": 100, "lora_groups": 100}
    config["clip"] |= {"vision_layers": 1000, "text_layers": 1000}
    save_ours(path, "hivg", config, {f"a{i}": torch.zeros(0) for i in range(2100)})


def write_empty_adapter(path):
    checkpoint = to_released(make_released(), adapters=True)
    name = next(name for name in checkpoint["model"] if "lora_A" in name)
    checkpoint["model"][name] = torch.zeros(0, checkpoint["model"][name].shape[1])
    checkpoint["model"][name.replace("lora_A", "lora_B")] = torch.zeros(64, 0)
    torch.save(checkpoint, path)


def write_no_patch(path):
    checkpoint = to_released(make_released())
    name = next(name for name in checkpoint["model"] if name.endswith("patch_embedding.weight"))
    checkpoint["model"][name] = checkpoint["model"][name][:, :, :0]
    torch.save(checkpoint, path)


BLOCK = "vision_model.encoder.layers.{}.layer_norm1.weight"
EMPTY = {"dtype": "F32", "shape": [0, 10**15], "data_offsets": [0, 0]}
BOMBS = {  # name: the writer
    "a million blocks in the metadata": own_with(vision_layers=10**6),
    "a thousand blocks in the metadata": own_with(text_layers=1000),
    "a huge image in the metadata": own_with(image_size=10**7, patch_size=1),
    "a huge vocabulary in the metadata": own_with(vocab_size=10**7),
    "a long context in the metadata": own_with(context_length=10**7),
    "block 9,999 of Hugging Face's": clip_with(to_huggingface, BLOCK.format(9999)),
    "block 10^9 of Hugging Face's": clip_with(to_huggingface, BLOCK.format(10**9)),
    "block 10^5000": lambda path: write_safetensors(path, {BLOCK.format("9" * 5000): EMPTY}),
    "block 9,999 of OpenAI's": clip_with(to_openai, "transformer.resblocks.9999.ln_1.weight"),
    "an image of 10^6 pixels in args": released_with(imsize=16 * 10**5),
    "a million encoder layers in args": released_with(vl_enc_layers=10**6),
    "a huge encoder in args": released_with(vl_hidden_dim=2**22, vl_dim_feedforward=2**22),
    "many views of one storage": views(90_000, 100_000),
    "small views of one storage": views(1, 2_000_000),  # the storage read for each: 80 GB
    "a hundred stages of adapters": write_many_stages, "patches of no pixels in a released file": write_no_patch,
    "an adapter of no rank": write_empty_adapter,
    "an empty tensor of 10^15 columns": lambda path: write_safetensors(path, {"visual.conv1.weight": EMPTY}),
    "a shape beyond the file": lambda path: write_safetensors(
        path, {"visual.conv1.weight": {"dtype": "F32", "shape": [10**18, 10**18], "data_offsets": [0, 4]}}, b"\0" * 4),
    "a header of 2^60 bytes": lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}" + b" " * 100),
}


@pytest.mark.slow
def test_nothing_large_is_built(tmp_path):
    paths = []
    for name, write in BOMBS.items():
        paths.append(tmp_path / name)
        write(paths[-1])
    own_with()(tmp_path / "own.safetensors")
    released_with()(tmp_path / "released.pt")
    # good files first: what loading needs once, like the libraries of a CUDA build, does not count
    imports = f"from hivg.weights import load\nload({str(tmp_path / 'own.safetensors')!r})\n"
    imports += f"load({str(tmp_path / 'released.pt')!r})"
    lines = outcomes(imports, "load(path)", paths, megabytes=200, seconds=60)
    assert "fine" not in lines, lines


@pytest.mark.slow
def test_a_table_of_gigabytes(tmp_path):
    table = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    table.write_bytes(gzip.compress(bytes(2**20), 9) * 4096)  # 4 GB; a gzip file may be several, one after the other
    torch.save(to_openai(make_published_clip()), tmp_path / "clip.pt")
    lines = outcomes("from hivg.tokenizer import Tokenizer\nfrom hivg.weights import load",
                     "(Tokenizer.from_file if 'bpe' in path else load)(path)", [table, tmp_path / "clip.pt"], 150, 60)
    assert all("holds more than 16,777,216 bytes" in line for line in lines)


def test_a_large_table_of_text_is_not_read(tmp_path):
    (tmp_path / "merges.txt").write_bytes(b"a b\n" * 2**22 + b"c")
    with pytest.raises(ValueError, match="holds more than"):
        Tokenizer.from_file(tmp_path / "merges.txt")
