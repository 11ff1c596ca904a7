"""Timings: python -m hivg.bench [forward] [data] [start] [load] [read]; all of them with no name. Medians, with the
20 % and 80 % quantiles; run it on an otherwise idle machine. And on request:

    python -m hivg.bench step --preset refcoco-base --batch_sizes 8 16 32     time and memory of a step, to choose from
    python -m hivg.bench fusion      the Triton kernel beside plain PyTorch and torch.compile, on a GPU
    python -m hivg.bench compile     registers, shared memory and spills of the kernels, without one
"""

import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.annotations import COCO, Sample
from hivg.data.augment import Augment
from hivg.data.batches import SampleTensors, ShapesTensors
from hivg.grounder import DEFAULT_WEIGHTS, Grounder
from hivg.losses import LossWeights, grounding_losses
from hivg.model import HiVG, HiVGConfig
from hivg.training.presets import PRESETS, preset
from hivg.utils.cli import Parser, choose_device, choose_dtype, fail

ROOT = Path(__file__).parents[2]


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
    with tempfile.TemporaryDirectory() as folder:  # a photograph's worth of detail, in a JPEG of COCO's usual size
        path = Path(folder, "photo.jpg")
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.BICUBIC).save(path, quality=90)
        outline = [[100.0, 100.0, 400.0, 120.0, 380.0, 300.0, 120.0, 320.0]]
        samples = [Sample(path, "the dog", (100.0, 100.0, 400.0, 320.0), outline, path.name)]
        for name, augment in (("read and fitted", None), ("and augmented", Augment())):
            dataset, index = SampleTensors(samples, 224, augment=augment), iter(range(10**6))
            times = measure(lambda: dataset[next(index) if augment else 0], 100)
            show(f"640 x 480 JPEG {name}, {1000 / times[1]:.0f} a second and worker", times)


def bench_start(args):
    """python ground.py from a cold start: interpreter, imports, weights, one prediction, the drawing."""
    command = [sys.executable, str(ROOT / "ground.py"), "--weights", str(args.weights), "--device", args.device]
    show("ground.py from start to end", measure(lambda: subprocess.run(command, check=True, capture_output=True), 3))


def resident(name):
    """A line of /proc/self/status in bytes: VmRSS what is resident, VmHWM the most that was."""
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def show_alone(name, work, argument, unit, sign):
    """Time and most memory of a piece of code with an argument, three times in a process of its own, so that nothing else
    counts. Memory is shown over `unit` bytes."""
    code = f"""
import sys, time
from hivg import weights
from hivg.bench import __main__ as bench
from hivg.data.annotations import read_samples
before, start = bench.resident("VmRSS"), time.perf_counter()
{work}
print(1000 * (time.perf_counter() - start), bench.resident("VmHWM") - before)
"""
    command = [sys.executable, "-c", code, argument]
    runs = [subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True) for _ in range(3)]
    times, memory = zip(*(map(float, run.stdout.split()) for run in runs))
    show(f"{name}, at most {max(memory) / unit:.2f} {sign}", np.quantile(times, [0.2, 0.5, 0.8]))


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
            size32 = 4 * sum(p.numel() for p in clip.parameters())
            show_alone(f"load {size}", "weights.load_clip(sys.argv[1])", path, size32, f"x its {size32 / 1e9:.2f} GB")


def bench_read(args):
    """150,000 expressions in REFER's format, of 50,000 outlined objects in 20,000 pictures, as in RefCOCO."""
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        pictures, objects = root / COCO, 50_000
        pictures.mkdir(parents=True)
        names = [f"COCO_train2014_{i:012d}.jpg" for i in range(20_000)]
        for name in names:
            (pictures / name).touch()
        refs = [{"ref_id": i, "ann_id": i, "image_id": i % 20_000, "file_name": names[i % 20_000][:-4] + "_1.jpg",
                 "category_id": 1, "split": "train", "sent_ids": [3 * i, 3 * i + 1, 3 * i + 2], "sentences": [
                     {"sent": "the man on the left", "raw": "The man on the left", "sent_id": 3 * i + k,
                      "tokens": "the man on the left".split()} for k in range(3)]} for i in range(objects)]
        outlines = (rng.random((objects, 60)) * 400).round(2).tolist()
        annotations = [{"id": i, "image_id": i % 20_000, "bbox": [10.5, 20.5, 100.0, 200.0], "area": 1.0, "iscrowd": 0,
                        "category_id": 1, "segmentation": [outlines[i]]} for i in range(objects)]
        images = [{"id": i, "file_name": name, "width": 640, "height": 480} for i, name in enumerate(names)]
        (root / "refcoco").mkdir()
        (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
        (root / "refcoco" / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        del refs, outlines, annotations
        show_alone("150,000 samples of REFER", "assert len(read_samples(sys.argv[1], 'refcoco', 'train')) == 150_000",
                   folder, 1e9, "GB")


def bench_step(args):
    """A training step of a preset at several batch sizes: random weights and pictures, expressions of 20 tokens."""
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    row = preset(args.preset)
    name = "ViT-L/14" if args.preset.endswith("large") else "ViT-B/16"
    clip = CLIP(CLIP_SIZES[name])
    config = HiVGConfig.for_clip(clip.config, **{key: row[key] for key in (
        "bridge", "text_layers", "lora_rank", "lora_alpha") if key in row})
    model = HiVG.from_clip(clip, config)
    for stage in (1, 2, 3):
        model.add_stage(stage)
    model = model.to(device).train()
    model.clip.visual.checkpoint = row.get("checkpoint", False)
    size = clip.config.image_size
    for n in args.batch_sizes:
        batch = {"images": torch.randn(n, 3, size, size), "padding_mask": torch.zeros(n, size, size).bool(),
                 "boxes": torch.full((n, 4), 0.5), "masks": torch.zeros(n, size, size).bool(),
                 "token_ids": torch.full((n, 20), 320), "image_ids": torch.arange(n)}
        batch["token_ids"][:, -1] = clip.config.vocab_size - 1
        batch = {k: v.to(device) for k, v in batch.items()}

        def step():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model(batch["images"], batch["padding_mask"], batch["token_ids"])
                terms = grounding_losses(output, batch, output.logits_per_text, batch["image_ids"], LossWeights())
            sum(terms.values()).backward()
            model.zero_grad()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = measure(step, 3, device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
        show(f"{args.preset}, {name}, {n} together, {str(dtype)[6:]}, {peak / 2**30:.1f} GiB", times)


def bench_fusion(args):
    from hivg.bench import fusion  # Triton is only needed here
    fusion.bench_fusion(choose_device(args.device))


def bench_compile(args):
    from hivg.bench import fusion
    fusion.bench_compile()


BENCHES = {"forward": bench_forward, "data": bench_data, "start": bench_start, "load": bench_load, "read": bench_read}
ON_REQUEST = {"step": bench_step, "fusion": bench_fusion, "compile": bench_compile}


def main():
    parser = Parser(description=__doc__)
    benches = BENCHES | ON_REQUEST
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(benches))
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, metavar="FILE")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--preset", default="refcoco-base", choices=PRESETS, metavar="NAME", help="for `step`")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8], help="for `step`")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in benches]:
        fail(f"no benchmark is called {unknown[0]!r}; there are {', '.join(benches)}")
    try:
        device = choose_device(args.device)
        threads = f"{torch.get_num_threads()} CPU threads"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
        print(f"torch {torch.__version__}, {where}")
        for name in args.names or BENCHES:
            benches[name](args)
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
