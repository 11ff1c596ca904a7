"""How long it takes, and how much memory, to read large files: `python -m hivg.bench load read`. Each is read in a
process of its own."""

import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch

from hivg.bench.timing import measure_alone, show
from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.published.catalogue import COCO

EXPRESSIONS = 3  # of an object, in REFER's file


def bench_load(args):
    """Files as large as OpenAI's: the time to load one, and the memory it takes at most, over that of its float32."""
    for name in ("ViT-B/16", "ViT-L/14"):
        with torch.device("meta"):
            clip = CLIP(CLIP_SIZES[name])  # for the names and shapes
        size = 4 * sum(p.numel() for p in clip.parameters())  # bytes in float32
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.pt")
            write_openai(clip, path)
            times, most = measure_alone("from hivg import weights", "weights.load_clip(sys.argv[1])", str(path))
        show(f"load {name}, at most {most / size:.2f} x its {size / 1e9:.2f} GB", times)


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
        work = f"assert len(read_samples(sys.argv[1], 'refcoco', 'train')) == {count}"
        times, most = measure_alone("from hivg.data.published.reading import read_samples", work, folder)
    show(f"{count:,} samples of REFER, at most {most / 1e9:.2f} GB", times)


def write_refer(root, objects, images):
    """REFER's two files and empty image files below the data root `root`."""
    rng = np.random.default_rng(0)
    image_folder = root / COCO
    image_folder.mkdir(parents=True)
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(images)]
    for name in names:
        (image_folder / name).touch()
    outlines = (rng.random((objects, 60)) * 400).round(2).tolist()
    refs = [refer_object(i, i % images, names[i % images]) for i in range(objects)]
    annotations = [coco_object(i, i % images, outlines[i]) for i in range(objects)]
    records = [{"id": i, "file_name": name, "width": 640, "height": 480} for i, name in enumerate(names)]
    folder = root / "refcoco"
    folder.mkdir()
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (folder / "instances.json").write_text(json.dumps({"images": records, "annotations": annotations}))


def refer_object(number, image, file_name):
    first = EXPRESSIONS * number
    sentence_ids = list(range(first, first + EXPRESSIONS))
    words = "the man on the left"
    sentences = []
    for sentence_id in sentence_ids:
        sentences.append({"sent": words, "raw": words.capitalize(), "sent_id": sentence_id, "tokens": words.split()})
    return {"ref_id": number, "ann_id": number, "image_id": image, "file_name": file_name[:-4] + "_1.jpg",
            "category_id": 1, "split": "train", "sent_ids": sentence_ids, "sentences": sentences}


def coco_object(number, image, outline):
    return {"id": number, "image_id": image, "bbox": [10.5, 20.5, 100.0, 200.0], "area": 1.0, "iscrowd": 0,
            "category_id": 1, "segmentation": [outline]}
