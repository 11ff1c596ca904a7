"""Benchmarks. Times are medians with the 20 % and 80 % quantiles; run them on an otherwise idle machine.

    python -m hivg.bench             forward, data, start, load and read
    python -m hivg.bench NAME ...    only these, of

    forward       the model alone, on 1, 8 and 32 expressions, and on 32 about one image
    data          training data: drawn images, photographs
    start         ground.py in a new process
    load          weights files of CLIP's size: time and memory
    read          a data set of RefCOCO's size: time and memory
    step          a training step of a preset: time and memory by batch size
    launches      the kernels that a training step launches on a GPU, by part of the model and by kind; needs no GPU
    efficiency    the paper's Figure 4: parameters, operations by part, time and memory by batch size
    fusion        the Triton kernel beside plain PyTorch and torch.compile: needs a GPU and five minutes
    compile       the Triton kernels compiled for GPUs that need not be present: registers, spills, hazards
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from hivg.clip import CLIP_SIZES
from hivg.grounder import DEFAULT_WEIGHTS
from hivg.training.presets import PRESETS
from hivg.utils.cli import Parser, choose_device, fail, run

# {benchmark: its file}; launches, fusion and compile need Triton, so files are imported when they are asked for
BENCHES = {"forward": "use", "data": "training", "start": "use", "load": "use", "read": "use", "step": "training",
           "launches": "launches", "efficiency": "efficiency", "fusion": "fusion", "compile": "compile"}
DEFAULT = ["forward", "data", "start", "load", "read"]


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE", help="for forward and start: a HiVG")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help="for step and launches: a row of "
                        "hivg/training/presets.py; without it step takes refcoco-base, launches the default run")
    parser.add_argument("--batch_size", type=int, metavar="N", help="for launches (default: the preset's)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8], metavar="N",
                        help="for step and efficiency")
    parser.add_argument("--size", default="ViT-B/16", metavar="NAME", help=f"for efficiency: {', '.join(CLIP_SIZES)}")
    parser.add_argument("--output", default="runs/bench", metavar="FOLDER",
                        help="for efficiency and fusion: gets their tables (Markdown) and charts")
    args = parser.parse_args()
    for flag, sizes in (("batch_size", [args.batch_size]), ("batch_sizes", args.batch_sizes)):
        for size in sizes:
            if size is not None and size < 1:
                fail(f"--{flag}: {size} given, 1 or more needed")
    for name in args.names:
        if name not in BENCHES:
            fail(f"no benchmark is called {name!r}; there are {', '.join(BENCHES)}")
        if name in ("launches", "fusion", "compile") and find_spec("triton") is None:
            fail(f"{name} needs Triton; on Linux, `pip install -r requirements.txt` installs it")
    return args


def main():
    args = arguments()
    device = choose_device(args.device)
    threads = f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else threads}")
    for name in args.names or DEFAULT:
        getattr(import_module(f"hivg.bench.{BENCHES[name]}"), f"bench_{name}")(args)


if __name__ == "__main__":
    run(main)
