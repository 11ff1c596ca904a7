"""What HiVG costs, the paper's Figure 4 as a command: python -m hivg.bench efficiency --size ViT-B/16 --output FOLDER

Parameters by stage, operations by part, and by batch size the time, peak memory and energy of a forward (adapters
merged, as for prediction) and of a training step (stage 3, with AdamW's update), in float32 and, where the machine is
fast at it, in bfloat16. Parameters and images are random. FOLDER gets efficiency.md, the tables, and efficiency.png.

Operations are the multiplications and additions of matrix products, as torch.utils.flop_counter counts them. Memory is
that of tensors on a GPU, and of the whole process on a CPU, some 400 MiB of it PyTorch itself. Energy is what the GPU,
or all processors of the machine, used meanwhile; "-" where it cannot be read.
"""

import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hivg.bench.timing import WARM_UP, Report, energy, measure, peak_memory, reset_peak_memory, table_head, table_row
from hivg.bench.training import CPU, adapted_model, forward_backward, random_batch, train_step_of
from hivg.clip import CLIP_SIZES
from hivg.losses import LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training.criterion import Criterion
from hivg.utils.cli import choose_device, choose_dtype

STAGES = ("warm-up", "Hi LoRA 1", "Hi LoRA 2", "Hi LoRA 3")
REPEATS = 5
COLUMNS = ("pass", "dtype", "expressions", "20 % ms", "median ms", "80 % ms", "peak MiB", "expressions/s",
           "J/expression", "TFLOP/s", "of a large product")


# ---- counted, on fake tensors, which hold no data

def parameters(config):
    """-> rows (stage, parameters trained in it, parameters in all)."""
    rows = []
    with FakeTensorMode():
        model = HiVG(config)
        for stage, name in enumerate(STAGES):
            if stage:
                model.add_stage(stage)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows.append((name, trained, sum(p.numel() for p in model.parameters())))
    return rows


def count_operations(function):
    """Operations of the matrix products in a call, with those of its backward if it runs one."""
    # attention as plain products: the counter does not know every fused one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def operations(config):
    """Operations of a forward of one image and one expression of 20 tokens -> {part: count}; their sum is the whole."""
    with FakeTensorMode():
        model = HiVG(config).eval()
        clip = model.clip
        batch = random_batch(1, config.clip, CPU)
        images = batch["images"]
        token_ids, is_text, is_key = model.find_text(batch["token_ids"])
        is_visual = model.find_visual(batch["padding_mask"], (model.side, model.side))
        states = clip.text(token_ids)
        text = clip.text.project(states[-1])

        def vision():
            return clip.visual(images, model.bridges, model.bridge_keys(states, text), is_key)

        visual_states = vision()

        def encoder():
            model.encode(model.visual_proj(model.join_levels(visual_states)), model.text_proj(text), is_visual, is_text)

        counts = {"text tower": count_operations(lambda: clip.text.project(clip.text(token_ids)[-1])),
                  "ViT": count_operations(lambda: clip.visual(images))}
        counts["bridges"] = count_operations(vision) - counts["ViT"]
        counts["grounding encoder"] = count_operations(encoder)
        whole = count_operations(lambda: model(images, batch["padding_mask"], token_ids))
        counts["heads"] = whole - sum(counts.values())
    return counts


def step_operations(config):
    """Operations of a training step for each expression, forward and backward."""
    with FakeTensorMode():
        criterion = Criterion(adapted_model(config), LossWeights(), "smooth_l1")
        batch = random_batch(1, config.clip, CPU)
        return count_operations(lambda: forward_backward(criterion, batch))


# ---- measured

def product_rate(dtype, device):
    """Operations a second of one large matrix product, the most that the machine gives."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    _, median, _ = measure(lambda: a @ a, REPEATS, device)
    return 2 * n**3 / (median / 1000)


def pass_of(name, config, device, dtype):
    """-> the forward or the training step, a function of a batch."""
    if name == "training step":
        return train_step_of(adapted_model(config).to(device), device, dtype)
    model = HiVG(config).for_prediction(device, dtype)
    return torch.inference_mode()(lambda batch: model(batch["images"], batch["padding_mask"], batch["token_ids"]))


def measure_pass(function, device):
    """-> milliseconds (20 %, median, 80 %), peak memory in MiB, joules of a call or None."""
    reset_peak_memory(device)
    before = energy(device)
    times = measure(function, REPEATS, device)
    after = energy(device)
    joules = None
    if before is not None and after is not None and after >= before:  # the counter may have restarted at 0
        joules = (after - before) / (WARM_UP + REPEATS)
    return times, peak_memory(device) / 2**20, joules


def bench_efficiency(args):
    """The tables on stdout and in args.output, with a chart. Raises ValueError for an unknown size."""
    if args.size not in CLIP_SIZES:
        raise ValueError(f"no CLIP is called {args.size!r:.40}; there are {', '.join(CLIP_SIZES)}")
    device = choose_device(args.device)
    config = HiVGConfig.for_clip(CLIP_SIZES[args.size])
    report = Report(args.output, "efficiency")
    report.say(f"HiVG on {args.size}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    report.say(table_head(["stage", "parameters trained", "parameters in all"]))
    for name, trained, whole in parameters(config):
        report.say(table_row([name, f"{trained:,}", f"{whole:,}"]))
    counts = operations(config)
    total = sum(counts.values())
    report.say("\n" + table_head(["part of a forward", "GFLOP", "share"]))
    for name, count in counts.items():
        report.say(table_row([name, f"{count / 1e9:.2f}", f"{count / total:.0%}"]))
    report.say(table_row(["in all", f"{total / 1e9:.2f}", ""]))

    report.say("\n" + table_head(COLUMNS))
    work = {"forward": total, "training step": step_operations(config)}
    for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", device))):
        precision = str(dtype).removeprefix("torch.")
        most = product_rate(dtype, device)
        for name in work:
            function = pass_of(name, config, device, dtype)
            for n in args.batch_sizes:
                batch = random_batch(n, config.clip, device)
                times, peak, joules = measure_pass(lambda: function(batch), device)
                throughput = n / (times[1] / 1000)
                speed = work[name] * throughput
                report.say(table_row([name, precision, n, *(f"{ms:.1f}" for ms in times), f"{peak:.0f}",
                                      f"{throughput:.1f}", "-" if joules is None else f"{joules / n:.3g}",
                                      f"{speed / 1e12:.3f}", f"{speed / most:.0%}"]))
                report.draw(f"{name}: expressions/s", "expressions/s", precision, n, throughput)
                report.draw(f"{name}: peak MiB", "peak MiB", precision, n, peak)
    report.save()
