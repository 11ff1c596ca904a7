"""Timings: python -m hivg.bench [forward] [data] [start] [load]; all of them with no name. Medians, with the 20 % and
80 % quantiles; run it on an otherwise idle machine.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hivg.cli import Parser, choose_device, fail
from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.batches import ShapesTensors
from hivg.grounder import DEFAULT_WEIGHTS, Grounder

ROOT = Path(__file__).parents[1]


def measure(f, repeats, device=torch.device("cpu")):
    """Run f `repeats` times after three to warm up -> milliseconds (20 %, median, 80 %)."""
    def once():
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - start)

    times = [once() for _ in range(repeats + 3)][3:]
    return np.quantile(times, [0.2, 0.5, 0.8])


def show(name, times):
    low, median, high = times
    print(f"{name:<52}{median:9.1f} ms   ({low:.1f} to {high:.1f})", flush=True)


def bench_forward(args):
    """The model alone, adapters merged, on random pictures and a six-word expression."""
    device = choose_device(args.device)
    grounder = Grounder.from_pretrained(args.weights, device=args.device)
    model, size = grounder.model, grounder.clip.image_size
    for n in (1, 8, 32):
        token_ids = model.tokenizer(["the red circle left of the star"] * n).to(device)
        images = torch.randn(n, 3, size, size, device=device)
        padding = torch.zeros(n, size, size, dtype=torch.bool, device=device)
        with torch.inference_mode():
            show(f"forward, {n} expression{'s' * (n > 1)}",
                 measure(lambda: model(images, padding, token_ids), 30, device))


def bench_data(args):
    """What the training waits for: drawing a picture, its four expressions, and making tensors of them."""
    for split, captions in (("train", False), ("pretrain", True)):
        dataset, index = ShapesTensors(split, 64, captions=captions), iter(range(10**6))
        show(f"shapes {split}, a picture with its {'caption and phrases' if captions else 'four expressions'}",
             measure(lambda: dataset[next(index)], 300))


def bench_start(args):
    """python ground.py from a cold start: interpreter, imports, weights, one prediction, the drawing."""
    command = [sys.executable, str(ROOT / "ground.py"), "--weights", str(args.weights), "--device", args.device]
    show("ground.py from start to end", measure(lambda: subprocess.run(command, check=True, capture_output=True), 3))


# Run by itself, so that neither the time nor the memory of anything else counts. VmHWM: the most that was resident.
LOAD = """
import re, sys, time
from hivg import weights

def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

before, start = resident("VmRSS"), time.perf_counter()
weights.load_clip(sys.argv[1])
print(1000 * (time.perf_counter() - start), resident("VmHWM") - before)
"""


def openai_file(clip, path):
    """Random weights of a CLIP in OpenAI's names and float16, as a state dict."""
    tensors = {name.removeprefix("text.").replace("blocks.", "transformer.resblocks."): torch.randn(p.shape).half()
               for name, p in clip.state_dict().items() if ".k_proj." not in name and ".v_proj." not in name}
    for name in [name for name in tensors if ".q_proj." in name]:
        tensors[name.replace(".q_proj.", ".in_proj_")] = torch.cat([tensors.pop(name)] * 3)
    torch.save(tensors, path)


def bench_load(args):
    """Files as large as OpenAI's: the time to load one, and the memory it takes at most, over that of its float32."""
    for size in ("ViT-B/16", "ViT-L/14"):
        with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
            path, clip = Path(folder, "clip.pt"), CLIP(CLIP_SIZES[size])
            with torch.device("cpu"):
                openai_file(clip, path)
            command = [sys.executable, "-c", LOAD, path]
            runs = [subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True) for _ in range(3)]
        times, memory = zip(*(map(float, run.stdout.split()) for run in runs))
        bytes_ = 4 * sum(p.numel() for p in clip.parameters())
        show(f"load {size}, at most {max(memory) / bytes_:.2f} x its {bytes_ / 1e9:.2f} GB",
             np.quantile(times, [0.2, 0.5, 0.8]))


BENCHES = {"forward": bench_forward, "data": bench_data, "start": bench_start, "load": bench_load}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in BENCHES]:
        fail(f"no benchmark is called {unknown[0]!r}; there are {', '.join(BENCHES)}")
    try:
        device = choose_device(args.device)
        threads = f"{torch.get_num_threads()} CPU threads"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
        print(f"torch {torch.__version__}, {where}")
        for name in args.names or BENCHES:
            BENCHES[name](args)
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
