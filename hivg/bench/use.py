"""Time and memory of a model in use: `python -m hivg.bench forward start load read`"""

import io
import json
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hivg.bench.timing import measure, measure_alone, run_program, show
from hivg.bench.training import random_batch
from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.published.catalogue import COCO
from hivg.grounder import Grounder
from hivg.utils.cli import choose_device, choose_dtype, name_of

EXPRESSIONS = 3  # per object, in REFER's file


def bench_forward(args):
    """The model alone, adapters merged, on random images and a six-word expression, in float32 and, where the machine
    is fast at it, in bfloat16."""
    fastest = choose_dtype("auto", choose_device(args.device))
    for dtype in dict.fromkeys(("float32", name_of(fastest))):
        grounder = Grounder.from_pretrained(args.weights, args.device, dtype)
        model = grounder.model
        for n, images in ((1, 1), (8, 8), (32, 32), (32, 1)):
            token_ids = model.tokenizer(["the red circle left of the star"] * n).to(grounder.device)  # (n, T)
            batch = random_batch(images, grounder.clip, grounder.device)
            with torch.inference_mode():
                times = measure(lambda: model(batch["images"], batch["padding_mask"], token_ids), 30, grounder.device)
            name = f"forward, {dtype}, {n} expression{'s' if n > 1 else ''}"
            show(name if n == images else f"{name} about one image", times)


def bench_start(args):
    """ground.py, which is `python -m hivg`, in a new process, its files in the page cache: interpreter, imports,
    weights, one prediction, the drawing."""
    command = [sys.executable, "-m", "hivg", "--weights", str(args.weights), "--device", args.device]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--output", str(Path(folder, "grounded.png"))]
        show("ground.py from start to end", measure(lambda: run_program(command), 3))


def bench_load(args):
    """Files as large as OpenAI's: the time to load one, and its peak memory as a multiple of its size in float32."""
    for name in ("ViT-B/16", "ViT-L/14"):
        with torch.device("meta"):
            clip = CLIP(CLIP_SIZES[name])  # for the names and shapes
        size = 4 * sum(p.numel() for p in clip.parameters())  # bytes in float32
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.pt")
            write_openai(clip, path)
            times, peak = measure_alone("from hivg import weights", "weights.load_clip(sys.argv[1])", str(path))
        show(f"load {name}, peak {peak / size:.2f} x its {size / 1e9:.2f} GB", times)


def write_openai(clip, path):
    """Random weights of a CLIP under OpenAI's names and in float16, as a state dict."""
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
        work = f"if len(read_samples(sys.argv[1], 'refcoco', 'train')) != {count}: sys.exit('error: rows were lost')"
        times, peak = measure_alone("from hivg.data.published.reading import read_samples", work, folder)
    show(f"{count:,} samples of REFER, peak {peak / 1e9:.2f} GB", times)


def write_refer(root, objects, images):
    """REFER's two files, and images of the size that they say, below the data root `root`."""
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(images)]
    outlines = (np.random.default_rng(0).random((objects, 60)) * 400).round(2).tolist()
    words = "the man on the left"
    refs = []
    annotations = []
    for i in range(objects):
        sent_ids = list(range(EXPRESSIONS * i, EXPRESSIONS * (i + 1)))
        sentences = [{"sent": words, "raw": words.capitalize(), "sent_id": sent_id, "tokens": words.split()}
                     for sent_id in sent_ids]
        refs.append({"ref_id": i, "ann_id": i, "image_id": i % images, "file_name": names[i % images][:-4] + "_1.jpg",
                     "category_id": 1, "split": "train", "sent_ids": sent_ids, "sentences": sentences})
        annotations.append({"id": i, "image_id": i % images, "bbox": [10.5, 20.5, 100.0, 200.0], "area": 1.0,
                            "iscrowd": 0, "category_id": 1, "segmentation": [outlines[i]]})
    records = [{"id": i, "file_name": name, "width": 640, "height": 480} for i, name in enumerate(names)]
    (root / COCO).mkdir(parents=True)
    Image.new("L", (640, 480)).save(image := io.BytesIO(), "JPEG")
    for name in names:
        (root / COCO / name).write_bytes(image.getvalue())
    (root / "refcoco").mkdir()
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (root / "refcoco/instances.json").write_text(json.dumps({"images": records, "annotations": annotations}))
