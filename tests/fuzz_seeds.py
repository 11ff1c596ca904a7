"""The valid files that fuzz.py damages: small, and one of each kind that is read."""

import pickle

import numpy as np
import torch
from makers import make_clip, make_hivg
from makers_data import TURNED, make_scenes, python2, write_list, write_mdetr, write_program, write_refer, write_rows
from makers_weights import TABLES, WRITERS, make_published_clip, make_released, to_released
from PIL import Image

from hivg import weights
from hivg.data.published.catalogue import COCO


def write_weights(folder):
    weights.save(folder / "clip.safetensors", make_clip(dtype=torch.float32, vision_layers=2), {"accuracy": 0.5})
    weights.save(folder / "hivg.safetensors", make_hivg(dtype=torch.float32, stage=2), {"stage": "lora2"})
    published = make_published_clip(vision_layers=1, text_layers=1)
    for name in ("openai state dict", "openai legacy", "openai archive", "huggingface safetensors", "huggingface bin"):
        WRITERS[name](published, folder / name)
    torch.save(to_released(make_released(), adapters=True), folder / "released.pth")


def write_tables(folder):
    for name, write in TABLES.items():
        write(folder / name)


def write_annotations(folder):
    """The files themselves lie in the folder, their images below it."""
    scenes = make_scenes(folder, 6)
    splits = {"val": scenes}
    for name, dump in (("python2", python2), ("python3", pickle.dumps), ("text", lambda data: pickle.dumps(data, 0))):
        write_refer(folder, splits, f"refs {name}.p", dump)
    variants = {"list": {}, "arrays": {"array": True}, "legacy": {"legacy": True}, "old": {"new": False}}
    for name, options in variants.items():
        write_list(folder / "lists", splits, **options)
        (folder / "lists/refcoco/refcoco_val.pth").rename(folder / f"{name}.pth")
    write_mdetr(folder, splits)
    (folder / "finetune_refcoco_val.json").rename(folder / "mdetr.json")
    write_program(folder / "lists", splits, "CRIS")
    (folder / "lists/refcoco/val.json").rename(folder / "cris.json")
    write_rows(folder / "mine.jsonl", [
        {"image": f"{COCO}/{scene.file}", "expression": scene.expression, "bbox": scene.box,
         "segmentation": scene.segmentation, "split": "train", "id": scene.number} for scene in scenes])


def write_images(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 4), dtype=np.uint8)
    image = Image.fromarray(pixels[..., :3])
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "ico", "tga", "jp2", "pcx"):
        image.save(folder / f"plain.{suffix}")
    for suffix in ("png", "jpg", "webp", "tif"):
        image.save(folder / f"turned.{suffix}", exif=TURNED)
    image.save(folder / "packed.tif", compression="tiff_lzw")
    image.save(folder / "progressive.jpg", progressive=True)
    Image.fromarray(pixels).save(folder / "clear.png")
    Image.fromarray(pixels).save(folder / "clear.webp")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(folder / "float.tif")
    image.quantize(16).save(folder / "palette.png", transparency=3)
    image.quantize(16).save(folder / "moving.gif", save_all=True, append_images=[image] * 2)
