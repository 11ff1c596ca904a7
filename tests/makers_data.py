"""Data sets on disk that the test files share: random scenes, written as the published formats and as people's own."""

import json
import pickle
import pickletools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hivg.data.drawn.scenes import Shapes
from hivg.data.masks import run_lengths_of
from hivg.data.published.catalogue import COCO


@dataclass(frozen=True)
class Scene:
    """One expression about an image; box is xyxy."""

    file: str
    size: tuple
    box: tuple
    expression: str
    segmentation: list | dict | None
    number: int

    def coco_size(self):
        return {"height": self.size[1], "width": self.size[0]}


def make_scenes(root, n=6, seed=0, folder=COCO, head="COCO_train2014_"):
    """n random images, written below root, with an object or two: a Scene for each expression."""
    rng = random.Random(seed)
    scenes = []
    (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        width, height = rng.randint(20, 90), rng.randint(20, 90)
        number = 1000 * seed + i
        file = f"{head}{number:012d}.jpg"
        Image.new("RGB", (width, height)).save(root / folder / file)
        for _ in range(rng.randint(1, 2)):
            # quarters of pixels: sums of them are exact
            w, h = rng.randint(1, 4 * width) / 4, rng.randint(1, 4 * height) / 4
            x, y = rng.randint(0, int(4 * (width - w))) / 4, rng.randint(0, int(4 * (height - h))) / 4
            polygon = [[x, y, x + w, y, x + w, y + h]]
            rle = {"size": [height, width], "counts": [width * height - 3, 3]}
            text = rng.choice(["the red cup", "Zebra on the LEFT", "café, 2nd", "man in a hat, looking up"])
            scenes.append(Scene(file, (width, height), (x, y, x + w, y + h), f"{text} {i}",
                                rng.choice([None, polygon, rle]), number))
    return scenes


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def expected(root, scenes, folder=COCO, segmentation=True):
    """The samples of these scenes as `found` shows them."""
    return [(root / folder / s.file, s.expression, s.box, s.segmentation if segmentation else None, s.file)
            for s in scenes]


def found(samples):
    return [(s.image, s.expression, s.box, s.segmentation, s.image_id) for s in samples]


# --- the published formats; splits is {split: scenes} ---


def python2(data):
    """`data` as Python 2's pickle wrote it: text as byte strings."""
    out = pickle.dumps(data, protocol=2)
    for op, _, at in reversed(list(pickletools.genops(out))):
        if op.name == "BINUNICODE":  # its length takes four bytes, that of SHORT_BINSTRING one
            assert not any(out[at + 2 : at + 5])
            out = out[:at] + b"U" + out[at + 1 : at + 2] + out[at + 5 :]
    return out


def write_refer(root, splits, place="refcoco/refs(unc).p", dump=python2):
    refs, annotations, images = [], [], {}
    for split, scenes in splits.items():
        for s in scenes:
            n = len(refs) + 1
            stem, suffix = s.file.rsplit(".", 1)
            sentence = {"sent": s.expression, "raw": s.expression.upper(), "sent_id": n, "tokens": s.expression.split()}
            refs.append({"ref_id": n, "ann_id": 10 * n, "image_id": s.number, "category_id": 3, "sent_ids": [n],
                         "file_name": f"{stem}_{n}.{suffix}", "split": split, "sentences": [sentence]})
            annotations.append({"id": 10 * n, "image_id": s.number, "bbox": xywh(s.box),
                                "segmentation": s.segmentation, "iscrowd": 0})
            images[s.number] = {"id": s.number, "file_name": s.file, **s.coco_size()}
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dump(refs))
    instances = {"annotations": annotations, "images": list(images.values())}
    path.with_name("instances.json").write_text(json.dumps(instances))


def write_list(root, splits, dataset="refcoco", new=True, array=False, legacy=False):
    """new: the generation with sizes and segmentations; array: boxes as numpy arrays; legacy: the older torch.save."""
    for split, scenes in splits.items():
        rows = []
        for s in scenes:
            box = list(s.box) if dataset in ("referit", "flickr") else xywh(s.box)
            box = np.array(box) if array else box
            if dataset == "flickr":
                rows.append((s.file, box, s.expression))
            elif new:
                rows.append((s.file, s.coco_size(), box, s.expression, s.segmentation))
            else:
                rows.append((s.file, f"{s.number}.mat", box, s.expression, [["r1", ["none"]], ["r2", ["red"]]]))
        path = root / dataset / f"{dataset}_{split}.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, path, _use_new_zipfile_serialization=not legacy)


def write_mdetr(root, splits):
    for split, scenes in splits.items():
        images, boxes = [], []
        for i, s in enumerate(scenes):
            images.append({"id": i, "file_name": s.file, **s.coco_size(), "original_id": s.number,
                           "caption": s.expression, "dataset_name": "refcoco"})
            boxes.append({"id": i, "image_id": i, "bbox": xywh(s.box), "segmentation": s.segmentation, "area": 1,
                          "iscrowd": 0, "tokens_positive": [[0, 3]]})
        data = {"info": {}, "licenses": [], "images": images, "annotations": boxes[::-1], "categories": []}
        (root / f"finetune_refcoco_{split}.json").write_text(json.dumps(data))


# --- boxes as masks, and back ---


def filled(box, width, height):
    """A box of whole numbers, a tensor (4,), as a mask (height, width)."""
    x0, y0, x1, y1 = box.int().tolist()
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def extent(mask):
    """(4,) xyxy, the tight box of a mask (H, W)."""
    rows, columns = mask.nonzero().T
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


# --- JSON, as this and other programs write it ---


PROGRAMS = {  # name: (its file for a split, the record of a scene without its size)
    "HiVG": ("{}.jsonl", lambda s: {"image": s.file, "expression": s.expression, "bbox": s.box}),
    "Qwen-VL, InternVL": ("refcoco_{}.jsonl", lambda s: {
        "image": f"data/coco/train2014/{s.file}", "sent": s.expression, "bbox": s.box}),
    "Shikra": ("REC_refcoco_unc_{}.jsonl", lambda s: {"img_path": s.file, "expression": s.expression, "bbox": s.box}),
    "VLM-R1": ("refcoco_{}.json", lambda s: {
        "image": f"coco/train2014/{s.file}", "problem": "Where is it?", "normal_caption": s.expression,
        "solution": s.box}),
    "MiniGPT-v2": ("refcoco_{}.json", lambda s: {
        "img_id": s.file.removesuffix(".jpg"), "sents": s.expression, "bbox": xywh(s.box)}),
    "CRIS": ("{}.json", lambda s: {
        "img_name": s.file, "sentences": [{"sent_id": 1, "sent": s.expression}], "bbox": xywh(s.box)}),
    "SeqTR, SimVG": ("{}.json", lambda s: {
        "image_id": s.number, "expressions": [s.expression], "bbox": xywh(s.box), "mask": s.segmentation}),
}


def write_program(root, splits, program="HiVG", sizes=True):
    name, record = PROGRAMS[program]
    for split, scenes in splits.items():
        path = root / "refcoco" / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [{"segmentation": s.segmentation} | record(s) | (s.coco_size() if sizes else {}) for s in scenes]
        path.write_text("\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records))


# --- people's own data ---

TURNED = Image.Exif()  # of an image that lies on its side
TURNED[0x0112] = 6


def write_rows(path, rows):
    """JSON lines -> their path."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_own(folder, n=40, **fields):
    """mine.jsonl: two expressions about each of n images; `fields` are added to its rows."""
    (folder / "images").mkdir()
    rows = []
    for i in range(n):
        Image.new("RGB", (30, 20)).save(folder / "images" / f"{i}.png")
        for word in ("cup", "dog"):
            rows.append({"image": f"images/{i}.png", "expression": f"{word} {i}", "bbox": [1, 2, 11, 12.5]} | fields)
    return write_rows(folder / "mine.jsonl", rows)


def write_shapes(folder, scenes=12, split="train", to="train"):
    """Scenes of the bundled data set as people's own data, masks too; a second call adds to the first."""
    shapes = Shapes(split)
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "mine.jsonl"
    with open(path, "a") as file:
        for i in range(scenes):
            item = shapes[i]
            name = f"images/{split}{i}.png"
            item["image"].save(folder / name)
            for text, box, target in zip(item["expressions"], item["boxes"].tolist(), item["targets"]):
                row = {"image": name, "expression": text, "bbox": box, "split": to,
                       "segmentation": run_lengths_of(item["labels"] == target + 1)}
                file.write(json.dumps(row) + "\n")
    return path
