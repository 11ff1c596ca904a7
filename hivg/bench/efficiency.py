"""What HiVG costs, as in the paper's Figure 4: python -m hivg.bench efficiency --size ViT-B/16 --output FOLDER

Parameters, in all and trained in each stage; operations of a forward by part; and for each batch size time, peak memory
and throughput of a forward (adapters merged, as in use) and of a training step (last stage, with AdamW's update), in
float32 and, where the machine is fast at it, in bfloat16. Weights and images are random; no files are needed. The
tables go to FOLDER/efficiency.md, the charts to FOLDER/efficiency.png.

An operation is a multiplication or an addition of a matrix product, as torch.utils.flop_counter counts them. Memory is
that of tensors on a GPU, that of the whole process on a CPU (of which PyTorch is some 230 MiB, with an optimizer 400);
each row has a process of its own, which no other row has enlarged. The last column compares the speed with that of one
large matrix product in the same run.
"""

import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from hivg.bench.timing import CPU, ROOT, Report, measure, peak_memory, product_rate, reset_peak_memory, run_program
from hivg.bench.training import forward_backward, last_stage, random_batch, train_step_of
from hivg.clip import CLIP_SIZES
from hivg.fast import training_copy
from hivg.model import HiVG, HiVGConfig
from hivg.utils.cli import choose_device, choose_dtype, name_of

STAGES = ("warm-up", "Hi LoRA 1", "Hi LoRA 2", "Hi LoRA 3")
REPEATS = 5


def parameters(config):
    """-> rows (stage, parameters trained in it, parameters in all)."""
    model = HiVG(config)
    rows = []
    for stage, name in enumerate(STAGES):
        if stage:
            model.add_stage(stage)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append((name, trained, sum(p.numel() for p in model.parameters())))
    return rows


def count_operations(function):
    """Operations of the matrix products in a call, its backward included if it runs one."""
    from torch.utils.flop_counter import FlopCounterMode  # here: it takes 70 MiB, which are no row's

    # attention as plain products: the counter does not know every fused kernel
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def operations(config):
    """Operations of a forward on one image and one expression of 20 tokens, {part: count}."""
    model = HiVG(config).eval()
    batch = random_batch(1, config.clip, CPU)
    images = batch["images"]
    token_ids, is_text, is_key = model.find_text(batch["token_ids"])
    states = model.clip.text(token_ids)
    text = model.clip.text.project(states[-1])
    is_visual = model.find_visual(batch["padding_mask"], (model.side, model.side))

    def vit_with_bridges():
        return model.clip.visual(images, model.bridges, model.bridge_keys(states, text), is_key)

    def encoder():
        visual = model.visual_proj(model.join_levels(visual_states))
        model.encode(visual, model.text_proj(text), is_visual, is_text)

    visual_states = vit_with_bridges()
    counts = {"text tower": count_operations(lambda: model.clip.text.project(model.clip.text(token_ids)[-1])),
              "ViT": count_operations(lambda: model.clip.visual(images))}
    counts["bridges"] = count_operations(vit_with_bridges) - counts["ViT"]
    counts["grounding encoder"] = count_operations(encoder)
    whole = count_operations(lambda: model(images, batch["padding_mask"], token_ids))
    return counts | {"heads": whole - sum(counts.values())}


def step_operations(config):
    """Operations of a training step, forward and backward, on one image and one expression."""
    model = training_copy(last_stage(config), torch.float32)
    batch = random_batch(1, config.clip, CPU)
    return count_operations(lambda: forward_backward(model, batch, torch.float32))


def forward_of(model, device, dtype):
    """-> a function of a batch."""
    model = model.for_prediction(device, dtype)
    return torch.inference_mode()(lambda batch: model(batch["images"], batch["padding_mask"], batch["token_ids"]))


ROW = "import sys; from hivg.bench.efficiency import print_row; print_row(*sys.argv[1:])"


def print_row(name, size, device, dtype, n):
    """One row of the table, all arguments as text: prints 20 %, median and 80 % of the milliseconds, and peak bytes."""
    device, dtype, n = choose_device(device), choose_dtype(dtype, CPU), int(n)
    make_model, function_of = PASSES[name]
    config = HiVGConfig.for_clip(CLIP_SIZES[size])
    function = function_of(make_model(config), device, dtype)
    batch = random_batch(n, config.clip, device)
    reset_peak_memory(device)
    times = measure(lambda: function(batch), REPEATS, device)
    print(*times, peak_memory(device))


PASSES = {"forward": (HiVG, forward_of), "training step": (last_stage, train_step_of)}


def bench_efficiency(args):
    """Tables on stdout and in args.output, with charts. Raises ValueError for an unknown size."""
    if args.size not in CLIP_SIZES:
        raise ValueError(f"--size: no CLIP is called {args.size!r:.40}; there are {', '.join(CLIP_SIZES)}")
    device = choose_device(args.device)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    config = HiVGConfig.for_clip(CLIP_SIZES[args.size])
    with FakeTensorMode():  # counting needs shapes alone
        stages = parameters(config)
        counts = operations(config)
        step_work = step_operations(config)
    work = sum(counts.values())

    report = Report()
    report.say(f"HiVG on {args.size}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    report.header("stage", "trained parameters", "all parameters")
    for name, trained, whole in stages:
        report.row(name, f"{trained:,}", f"{whole:,}")
    report.header("part of a forward", "GFLOP", "share")
    for name, count in (counts | {"total": work}).items():
        report.row(name, f"{count / 1e9:.2f}", f"{count / work:.0%}")
    report.header("pass", "dtype", "batch size", "20 % ms", "median ms", "80 % ms", "peak MiB",
                  "expressions per second", "TFLOP/s", "of a large product")
    for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", device))):
        limit = product_rate(dtype, device)
        for name, flops in zip(PASSES, (work, step_work)):
            for n in args.batch_sizes:
                row = map(str, (name, args.size, device, name_of(dtype), n))
                low, median, high, peak = map(float, run_program([sys.executable, "-c", ROW, *row], cwd=ROOT).split())
                peak /= 2**20
                rate = n / (median / 1000)
                report.row(name, name_of(dtype), n, f"{low:.1f}", f"{median:.1f}", f"{high:.1f}", f"{peak:.0f}",
                           f"{rate:.1f}", f"{flops * rate / 1e12:.3f}", f"{flops * rate / limit:.0%}")
                for label, y in (("expressions per second", rate), ("peak MiB", peak)):
                    report.charts[name, label][name_of(dtype)].append((n, y))
    report.save(folder, "efficiency")
