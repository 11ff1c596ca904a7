"""How long grounding takes: `python -m hivg.bench forward start`."""

import sys
import tempfile
from pathlib import Path

import torch

from hivg.bench.timing import ROOT, measure, run_program, show
from hivg.grounder import Grounder
from hivg.utils.cli import choose_device, choose_dtype


def bench_forward(args):
    """The model alone, adapters merged, on random images and a six-word expression, in float32 and, where the machine
    is fast at it, in bfloat16."""
    fastest = choose_dtype("auto", choose_device(args.device))
    for dtype in dict.fromkeys(("float32", str(fastest).removeprefix("torch."))):
        grounder = Grounder.from_pretrained(args.weights, args.device, dtype)
        for n, images in ((1, 1), (8, 8), (32, 32), (32, 1)):
            name = f"forward, {dtype}, {n} expression{'s' if n > 1 else ''}"
            show(name if n == images else f"{name} about one image", forward_times(grounder, n, images))


def forward_times(grounder, n, images):
    """n expressions about as many images, or about one -> milliseconds (20 %, median, 80 %)."""
    model = grounder.model
    size = grounder.clip.image_size
    token_ids = model.tokenizer(["the red circle left of the star"] * n).to(grounder.device)  # (n, T)
    pixels = torch.randn(images, 3, size, size, device=grounder.device)
    padding = torch.zeros(images, size, size, dtype=torch.bool, device=grounder.device)
    with torch.inference_mode():
        return measure(lambda: model(pixels, padding, token_ids), 30, grounder.device)


def bench_start(args):
    """python ground.py as a new process, its files read before: interpreter, imports, weights, one prediction, the
    drawing."""
    command = [sys.executable, str(ROOT / "ground.py"), "--weights", str(args.weights), "--device", args.device]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--output", str(Path(folder, "grounded.png"))]
        times = measure(lambda: run_program(command), 3)
    show("ground.py from start to end", times)
