"""All stages of `refcoco-base` at ViT-B/16's real size, in a minute: `PYTHONPATH=.:tests python -m real_size`.

Two steps of 4 expressions a stage, with validations and files, on files made here in the published formats: a CLIP of
random weights as OpenAI's TorchScript archive, a merge table of the real length, annotations as REFER's. Prints the
time and the most memory, that of the whole process on a CPU. Some 3 GB of disk are needed meanwhile.
"""

import gzip
import itertools
import os
import tempfile
import time
from pathlib import Path

import torch
from makers_data import make_scenes, write_refer
from makers_weights import half, scripted, to_openai

import train
from hivg.bench.timing import peak_memory, reset_peak_memory
from hivg.clip import CLIP, CLIP_SIZES
from hivg.tokenizer import Tokenizer
from hivg.training.presets import preset_of
from hivg.utils.cli import choose_device

SIZE = CLIP_SIZES["ViT-B/16"]
TABLE = "bpe_simple_vocab_16e6.txt.gz"


def write_clip(folder):
    """ViT-B-16.pt with its merge table beside it: the bytes, and as many pairs of them as the real one has merges."""
    torch.manual_seed(0)
    torch.jit.save(scripted(half(to_openai(CLIP(SIZE)))), folder / "ViT-B-16.pt")
    symbols = Tokenizer([]).symbols  # 256 bytes, the same at the end of a word, start and end
    no_blank = [symbol for symbol in symbols[:512] if symbol[0] != "Ġ"]  # which is in no word
    pairs = itertools.product(no_blank[:255], no_blank)
    merges = list(itertools.islice(pairs, SIZE.vocab_size - len(symbols)))
    with gzip.open(folder / TABLE, "wt", encoding="utf-8") as file:
        file.write(Tokenizer(merges).to_text())


def main():
    device = choose_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_clip(Path())
        write_refer(Path(), {"train": make_scenes(Path(), 8), "val": make_scenes(Path(), 4, seed=1)})
        short = dict(name="real", data_root=".", clip="ViT-B-16.pt", batch_size=4, accumulate=(1,), epochs=(1, 1, 1, 1),
                     epoch_samples=8)
        reset_peak_memory(device)
        start = time.monotonic()
        train.train(train.Settings(**(preset_of("refcoco-base") | short)))
        print(f"{time.monotonic() - start:.0f} s, {peak_memory(device) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
