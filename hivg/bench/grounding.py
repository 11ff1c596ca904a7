"""How long grounding takes: `python -m hivg.bench forward start`."""

import subprocess
import sys

import torch

from hivg.bench.timing import ROOT, measure, show
from hivg.grounder import Grounder


def bench_forward(args):
    """The model alone, adapters merged, on random images and a six-word expression."""
    grounder = Grounder.from_pretrained(args.weights, device=args.device)
    model = grounder.model
    device = grounder.device
    size = grounder.clip.image_size
    for n in (1, 8, 32):
        token_ids = model.tokenizer(["the red circle left of the star"] * n).to(device)  # (n, T)
        images = torch.randn(n, 3, size, size, device=device)
        padding = torch.zeros(n, size, size, dtype=torch.bool, device=device)
        with torch.inference_mode():
            times = measure(lambda: model(images, padding, token_ids), 30, device)
        show(f"forward, {n} expression{'s' if n > 1 else ''}", times)


def bench_start(args):
    """python ground.py from a cold start: interpreter, imports, weights, one prediction, the drawing."""
    command = [sys.executable, str(ROOT / "ground.py"), "--weights", str(args.weights), "--device", args.device]
    times = measure(lambda: subprocess.run(command, check=True, capture_output=True), 3)
    show("ground.py from start to end", times)
