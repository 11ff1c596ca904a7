"""What HiVG costs, the paper's Figure 4 as a command: python -m hivg.bench efficiency --size ViT-B/16 --output FOLDER

Parameters, total and trained in each stage; operations of a forward by part; and for each batch size the time, peak
memory and rate of a forward (adapters merged, as in use) and of a training step (stage 3, with AdamW's update), in
float32 and, where the hardware has it, in bfloat16. Weights and images are random; no files are needed. FOLDER gets
efficiency.md, the tables, and efficiency.png.

An operation is a multiplication or an addition of a matrix product, as torch.utils.flop_counter counts them. Memory is
that of tensors on a GPU; on a CPU that of the whole process, of which PyTorch itself takes some 400 MiB. The last
column is the share of the rate of one large product, measured in the same run.
"""

import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hivg.bench.timing import measure, peak_memory, reset_peak_memory
from hivg.bench.training import random_batch, train_step_of
from hivg.clip import CLIP_SIZES
from hivg.losses import LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training.criterion import Criterion
from hivg.utils.charts import plot_panels
from hivg.utils.cli import choose_device, choose_dtype

CPU = torch.device("cpu")
STAGES = ("warm-up", "Hi LoRA 1", "Hi LoRA 2", "Hi LoRA 3")
LAST = len(STAGES) - 1
REPEATS = 5
COLUMNS = ("pass", "dtype", "expressions", "20 % ms", "median ms", "80 % ms", "peak MiB", "expressions a second",
           "TFLOP/s", "of a large product")


# ---- counted on fake tensors, which have sizes and no data

def parameters(config):
    """-> rows (stage, parameters trained in it, parameters in all)."""
    with FakeTensorMode():
        model = HiVG(config)
        rows = []
        for stage, name in enumerate(STAGES):
            if stage:
                model.add_stage(stage)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows.append((name, trained, sum(p.numel() for p in model.parameters())))
    return rows


def count_operations(function):
    """Operations of the matrix products in a call, including its backward if it runs one."""
    # attention as plain products, as the counter does not know all fused ones
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def operations(config):
    """Operations of a forward with one image and one expression of 20 tokens -> {part: count}, which sum up to it."""
    with FakeTensorMode():
        return operations_of(HiVG(config).eval(), random_batch(1, config.clip, CPU))


def operations_of(model, batch):
    """The parts one by one, each on the output of those before it."""
    images = batch["images"]
    token_ids, is_text, is_key = model.find_text(batch["token_ids"])
    states = model.clip.text(token_ids)
    text = model.clip.text.project(states[-1])
    keys = model.bridge_keys(states, text)
    visual_states = model.clip.visual(images, model.bridges, keys, is_key)
    is_visual = model.find_visual(batch["padding_mask"], (model.side, model.side))

    def text_tower():
        model.clip.text.project(model.clip.text(token_ids)[-1])

    def vision_with_bridges():
        model.clip.visual(images, model.bridges, model.bridge_keys(states, text), is_key)

    def encoder():
        visual = model.visual_proj(model.join_levels(visual_states))
        model.encode(visual, model.text_proj(text), is_visual, is_text)

    counts = {"text tower": count_operations(text_tower), "ViT": count_operations(lambda: model.clip.visual(images))}
    counts["bridges"] = count_operations(vision_with_bridges) - counts["ViT"]
    counts["grounding encoder"] = count_operations(encoder)
    whole = count_operations(lambda: model(images, batch["padding_mask"], token_ids))
    counts["heads"] = whole - sum(counts.values())
    return counts


def step_operations(config):
    """Operations of a training step for each expression, forward and backward."""
    with FakeTensorMode():
        criterion = Criterion(trained_model(config), LossWeights(), "smooth_l1")
        batch = random_batch(1, config.clip, CPU)
        return count_operations(lambda: sum(criterion(batch).values()).backward())


def trained_model(config):
    """A model of random weights with the adapters of all stages, the last ones trained."""
    model = HiVG(config)
    for stage in range(1, LAST + 1):
        model.add_stage(stage)
    return model.train()


# ---- measured

def product_rate(dtype, device):
    """Operations a second of one large product: the most that the machine gives."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    _, median, _ = measure(lambda: a @ a, REPEATS, device)
    return 2 * n**3 / (median / 1000)


def measure_pass(function, device):
    """-> milliseconds (20 %, median, 80 %), peak memory in MiB."""
    reset_peak_memory(device)
    return measure(function, REPEATS, device), peak_memory(device) / 2**20


def measure_forward(config, sizes, device, dtype):
    """-> (expressions, times, peak) for each batch size."""
    model = HiVG(config).for_prediction(device, dtype)
    found = []
    for n in sizes:
        batch = random_batch(n, config.clip, device)
        with torch.inference_mode():
            measured = measure_pass(lambda: model(batch["images"], batch["padding_mask"], batch["token_ids"]), device)
        found.append((n, *measured))
    return found


def measure_steps(config, sizes, device, dtype):
    """As measure_forward, of a training step: forward, backward and AdamW's update."""
    train_step = train_step_of(trained_model(config).to(device), device, dtype)
    found = []
    for n in sizes:
        batch = random_batch(n, config.clip, device)
        found.append((n, *measure_pass(lambda: train_step(batch), device)))
    return found


def bench_efficiency(args):
    """The tables on stdout and in args.output, with a chart. Raises ValueError for an unknown size."""
    if args.size not in CLIP_SIZES:
        raise ValueError(f"no CLIP is called {args.size!r:.40}; there are {', '.join(CLIP_SIZES)}")
    device = choose_device(args.device)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    config = HiVGConfig.for_clip(CLIP_SIZES[args.size])
    lines = []

    def say(line):
        lines.append(line)
        print(line, flush=True)

    say(f"HiVG on {args.size}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    say("| stage | parameters trained | parameters in all |\n| --- | --- | --- |")
    for name, trained, whole in parameters(config):
        say(f"| {name} | {trained:,} | {whole:,} |")
    counts = operations(config)
    say("\n| part of a forward | GFLOP | share |\n| --- | --- | --- |")
    for name, count in counts.items():
        say(f"| {name} | {count / 1e9:.2f} | {count / sum(counts.values()):.0%} |")
    say(f"| in all | {sum(counts.values()) / 1e9:.2f} | |")

    say("\n| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    rates = {}  # {pass: {type: [(batch size, expressions a second)]}}
    peaks = {}
    for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", device))):
        precision = str(dtype).removeprefix("torch.")
        most = product_rate(dtype, device)
        for name, measured, work in (("forward", measure_forward, sum(counts.values())),
                                     ("training step", measure_steps, step_operations(config))):
            for n, (low, median, high), peak in measured(config, args.batch_sizes, device, dtype):
                a_second = n / (median / 1000)
                speed = work * a_second
                say(f"| {name} | {precision} | {n} | {low:.1f} | {median:.1f} | {high:.1f} | {peak:.0f} "
                    f"| {a_second:.1f} | {speed / 1e12:.3f} | {speed / most:.0%} |")
                rates.setdefault(name, {}).setdefault(precision, []).append((n, a_second))
                peaks.setdefault(name, {}).setdefault(precision, []).append((n, peak))
    (folder / "efficiency.md").write_text("\n".join(lines) + "\n")
    plot_panels(panels_of(rates, "expressions a second") + panels_of(peaks, "peak MiB"), folder / "efficiency.png")
    print(f"{folder / 'efficiency.md'} and {folder / 'efficiency.png'}")


def panels_of(curves, label):
    panels = []
    for name, by_type in curves.items():
        panels.append({"title": f"{name}: {label}", "x_label": "expressions together", "y_label": label,
                       "curves": by_type})
    return panels
