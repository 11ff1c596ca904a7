"""Time of using a model, and memory where files are large: `python -m hivg.bench forward start load read`"""

import json
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from hivg.bench.timing import ROOT, measure, measure_alone, run_program, show
from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.published.catalogue import COCO
from hivg.grounder import Grounder
from hivg.utils.cli import choose_device, choose_dtype

EXPRESSIONS = 3  # of each object in REFER's file


def bench_forward(args):
    """The model alone, adapters merged, on random images and a six-word expression, in float32 and, where the machine
    is fast at it, in bfloat16."""
    device = choose_device(args.device)
    for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", device))):
        precision = str(dtype).removeprefix("torch.")
        grounder = Grounder.from_pretrained(args.weights, args.device, precision)
        model = grounder.model
        size = model.config.clip.image_size
        for n, images in ((1, 1), (8, 8), (32, 32), (32, 1)):
            token_ids = model.tokenizer(["the red circle left of the star"] * n).to(device)  # (n, T)
            pixels = torch.randn(images, 3, size, size, device=device)
            padding = torch.zeros(images, size, size, dtype=torch.bool, device=device)
            with torch.inference_mode():
                times = measure(lambda: model(pixels, padding, token_ids), 30, device)
            name = f"forward, {precision}, {n} expression{'s' if n > 1 else ''}"
            show(name if n == images else f"{name} about one image", times)


def bench_start(args):
    """python ground.py as a new process, its files in the disk cache: interpreter, imports, weights, one prediction and
    the drawing."""
    command = [sys.executable, str(ROOT / "ground.py"), "--weights", str(args.weights), "--device", args.device]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--output", str(Path(folder, "grounded.png"))]
        times = measure(lambda: run_program(command), 3)
    show("ground.py as a new process", times)


def bench_load(args):
    """Files as large as OpenAI's: time to load, and peak memory as a multiple of the size in float32."""
    for name in ("ViT-B/16", "ViT-L/14"):
        with torch.device("meta"):
            clip = CLIP(CLIP_SIZES[name])  # for its names and shapes
        size = 4 * sum(p.numel() for p in clip.parameters())  # bytes in float32
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.pt")
            write_openai(clip, path)
            times, most = measure_alone("from hivg import weights", "weights.load_clip(sys.argv[1])", str(path))
        show(f"load {name}, at most {most / size:.2f} x its {size / 1e9:.2f} GB", times)


def write_openai(clip, path):
    """A state dict of random float16 tensors under OpenAI's names."""
    tensors = {}
    for name, tensor in clip.state_dict().items():
        values = torch.randn(tensor.shape).half()
        name = name.removeprefix("text.").replace("blocks.", "transformer.resblocks.")
        if ".q_proj." in name:
            tensors[name.replace(".q_proj.", ".in_proj_")] = torch.cat([values] * 3)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[name] = values
    torch.save(tensors, path)


def bench_read(args):
    """150,000 expressions in REFER's format, of 50,000 outlined objects in 20,000 images, as in RefCOCO."""
    objects = 50_000
    with tempfile.TemporaryDirectory() as folder:
        write_refer(Path(folder), objects, images=20_000)
        count = objects * EXPRESSIONS
        work = f"assert len(read_samples(sys.argv[1], 'refcoco', 'train')) == {count}"
        times, most = measure_alone("from hivg.data.published.reading import read_samples", work, folder)
    show(f"{count:,} samples of REFER, at most {most / 1e9:.2f} GB", times)


def write_refer(root, objects, images):
    """Write REFER's two files, and empty image files, below the data root `root`."""
    rng = np.random.default_rng(0)
    image_folder = root / COCO
    image_folder.mkdir(parents=True)
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(images)]
    for name in names:
        (image_folder / name).touch()
    outlines = (rng.random((objects, 60)) * 400).round(2).tolist()
    words = "the man on the left"
    refs = []
    annotations = []
    for i in range(objects):
        ids = list(range(EXPRESSIONS * i, EXPRESSIONS * (i + 1)))
        sentences = [{"sent": words, "raw": words.capitalize(), "sent_id": id, "tokens": words.split()} for id in ids]
        refs.append({"ref_id": i, "ann_id": i, "image_id": i % images, "file_name": names[i % images][:-4] + "_1.jpg",
                     "category_id": 1, "split": "train", "sent_ids": ids, "sentences": sentences})
        annotations.append({"id": i, "image_id": i % images, "bbox": [10.5, 20.5, 100.0, 200.0], "area": 1.0,
                            "iscrowd": 0, "category_id": 1, "segmentation": [outlines[i]]})
    records = [{"id": i, "file_name": name, "width": 640, "height": 480} for i, name in enumerate(names)]
    folder = root / "refcoco"
    folder.mkdir()
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (folder / "instances.json").write_text(json.dumps({"images": records, "annotations": annotations}))
