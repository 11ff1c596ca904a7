"""Benchmarks: medians, with the 20 % and 80 % quantiles. Run them on an otherwise idle machine.

    python -m hivg.bench             all of: forward, data, start, load, read
    python -m hivg.bench forward     the model alone: 1, 8 and 32 expressions, and 32 about one image
    python -m hivg.bench data        the items of a training batch: drawn images, photographs
    python -m hivg.bench start       ground.py as a new process
    python -m hivg.bench load        loading weights files of CLIP's size: time and memory
    python -m hivg.bench read        reading a data set of RefCOCO's size: time and memory

Only on request:

    python -m hivg.bench step --preset refcoco-base --batch_sizes 8 16 32     time and memory of a training step
    python -m hivg.bench efficiency --size ViT-B/16 --output FOLDER     the paper's Figure 4: parameters, operations by
                                     part, time and memory by batch size, as tables and a chart in FOLDER
    python -m hivg.bench fusion --output FOLDER     the Triton kernel against plain PyTorch and torch.compile: a table
                                     and a chart in FOLDER; needs a GPU and less than five minutes
    python -m hivg.bench compile     registers, spills, shared memory and hazards of the Triton kernels, compiled for
                                     compute capabilities 80 and 90; needs no GPU
"""

from importlib.util import find_spec

import torch

from hivg.bench.efficiency import bench_efficiency
from hivg.bench.timing import table_head, table_row
from hivg.bench.training import bench_data, bench_step
from hivg.bench.use import bench_forward, bench_load, bench_read, bench_start
from hivg.clip import CLIP_SIZES
from hivg.grounder import DEFAULT_WEIGHTS
from hivg.training.presets import PRESETS
from hivg.utils.cli import Parser, choose_device, fail, run


def bench_fusion(args):
    from hivg.bench import fusion  # only here and below is Triton needed

    fusion.bench_fusion(choose_device(args.device), args.output)


def bench_compile(args):
    from hivg.bench.compile import compile_all

    rows = [*compile_all(80), *compile_all(90)]
    print(table_head(rows[0]))
    print("\n".join(table_row(row.values()) for row in rows))


DEFAULT = {"forward": bench_forward, "data": bench_data, "start": bench_start, "load": bench_load, "read": bench_read}
BENCHES = DEFAULT | {"step": bench_step, "efficiency": bench_efficiency, "fusion": bench_fusion,
                     "compile": bench_compile}


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE", help="a HiVG, for forward and start")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--preset", default="refcoco-base", choices=PRESETS, metavar="NAME", help="for step")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8], metavar="N", help="for step, efficiency")
    parser.add_argument("--size", default="ViT-B/16", metavar="NAME", help=f"for efficiency: {', '.join(CLIP_SIZES)}")
    parser.add_argument("--output", default="runs/bench", metavar="FOLDER", help="for fusion, efficiency")
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHES:
            fail(f"no benchmark is called {name!r}; there are {', '.join(BENCHES)}")
        if name in ("fusion", "compile") and find_spec("triton") is None:
            fail(f"{name} needs Triton, which is not installed here; on Linux, install it with requirements.txt")
    if min(args.batch_sizes) < 1:
        fail(f"--batch_sizes must be 1 or more, not {min(args.batch_sizes)}")
    return args


def main():
    args = arguments()
    device = choose_device(args.device)
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {machine}")
    for name in args.names or DEFAULT:
        BENCHES[name](args)


if __name__ == "__main__":
    run(main)
