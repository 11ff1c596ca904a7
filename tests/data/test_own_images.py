"""How images are read: people's own upright, the published ones as the released program reads them; and damaged ones,
which are named."""

import numpy as np
import pytest
import torch
from makers import python, refusal
from makers_data import TURNED, make_scenes, write_list, write_rows
from PIL import Image

from hivg.data.batches import open_dataset, training_batches
from hivg.data.images import ImageError, open_image, open_published, upright_size
from hivg.data.published.catalogue import COCO
from hivg.data.published.check import check
from hivg.data.published.reading import Report, read_samples


def write_turned(path, width=40, height=20):
    """An image whose left half is red, stored on its side: upright it is `height` wide, its upper half red."""
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height))
    image.save(path, exif=TURNED, quality=95)


def write_lines(folder, name, *boxes):
    rows = [{"image": name, "expression": "x", "bbox": box, "split": "train"} for box in boxes]
    return write_rows(folder / "mine.jsonl", rows)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_own_images_are_upright(tmp_path, suffix):
    name = f"a.{suffix}"
    write_turned(tmp_path / name)
    assert upright_size(tmp_path / name) == open_image(tmp_path / name).size == (20, 40)
    # as wide as the stored image, and so beyond the upright one; as high as the upright image
    path = write_lines(tmp_path, name, [0, 0, 38, 18], [2, 21, 18, 39])
    report = Report()
    samples = read_samples(tmp_path, path, "train", report=report)
    assert [sample.box for sample in samples] == [(2, 21, 18, 39)]
    assert "20 x 40" in report.first["box outside the image"]
    data = open_dataset(path, "train", 64)
    image = np.asarray(data.image(0))
    assert image.shape == (40, 20, 3)
    assert image[:18, :, 0].min() > 200 and image[22:, :, 2].min() > 200  # red above blue
    assert data[0]["letterboxes"][0].width == 20


def test_published_images_are_not_turned(tmp_path):
    scenes = make_scenes(tmp_path, 2)
    write_list(tmp_path, {"val": scenes})
    for scene in scenes:
        write_turned(tmp_path / COCO / scene.file, *scene.size)
    data = open_dataset("refcoco", "val", 64, data_root=tmp_path)
    for number, scene in enumerate(scenes):
        assert data.image(number).size == scene.size


def test_transparency_and_16_bits(tmp_path):
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((9, 9), 65535 // 2, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, own, published in (("clear.png", 255, 0), ("deep.png", 127, 255)):
        data = open_dataset(write_lines(tmp_path, name, [1, 1, 8, 8]), "train", 32)
        assert np.asarray(data.image(0))[0, 0, 1] == own, name
        assert np.asarray(open_published(tmp_path / name))[0, 0, 1] == published, name


def test_a_published_photograph_is_not_copied(tmp_path, monkeypatch):
    """Of a worker's time a copy takes a quarter, most of it for fresh memory."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    image.save(tmp_path / "a.jpg")
    pixels = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    monkeypatch.delattr(Image.Image, "copy")
    opened = open_published(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").unlink()
    assert opened.mode == "RGB" and (np.asarray(opened) == pixels).all()
    assert opened.resize((30, 20), box=(0, 0, 60, 39)).size == (30, 20)


def test_a_program_is_no_image(tmp_path):
    """Pillow would have Ghostscript run it."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for read in (open_image, open_published, upright_size):
        with pytest.raises(ImageError, match="EPS"):
            read(tmp_path / "a.png")


# --- damaged ones ---


def write_damaged(folder):
    """mine.jsonl of 8 images, of which the sixth lost its end: its header is whole."""
    rows = []
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "expression": f"cup {i}", "bbox": [1, 1, 30, 30], "split": "train"})
    data = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(data[: len(data) // 2])
    return write_rows(folder / "mine.jsonl", rows)


@pytest.mark.parametrize("workers, folder", [(0, "images"), (2, "images"), (0, "x" * 200)])
def test_a_damaged_image_is_named_in_one_line(tmp_path, workers, folder):
    """Within 290 characters, where command lines cut a message."""
    folder = tmp_path / folder
    folder.mkdir()
    data = open_dataset(write_damaged(folder), "train", 32)
    seen = 0
    with pytest.raises(ImageError) as caught:
        for batch in training_batches(data, 0, 2, 4, workers=workers):
            seen += len(batch["expressions"])
    message = str(caught.value)
    assert seen == 4
    assert message.startswith(str(tmp_path)[:20]) and "\n" not in message and len(message) <= 290
    assert message.endswith("copy or download it again; `python -m hivg.data check NAME --decode` lists all")


@pytest.mark.parametrize("own", [True, False])
def test_too_large_an_image_is_not_damaged(tmp_path, own):
    if own:
        path, dataset, split = tmp_path / "a.pgm", write_lines(tmp_path, "a.pgm", [1, 1, 8, 8]), "train"
    else:
        scenes = make_scenes(tmp_path, 1)[:1]
        write_list(tmp_path, {"val": scenes}, "unc", new=False)
        path, dataset, split = tmp_path / COCO / scenes[0].file, "unc", "val"
    path.write_bytes(b"P5 30000 30000 255\n")  # 900 megapixels
    report = Report()
    assert not read_samples(tmp_path, dataset, split, report=report)
    assert report.problems == {"image of more than 178 megapixels": 1}
    for read in (open_image, open_published, upright_size):
        with pytest.raises(ImageError, match="has more than 178 megapixels; make it smaller"):
            read(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_outline_of_another_size_is_named(tmp_path, workers):
    """The image was replaced after its annotations were read."""
    scenes = make_scenes(tmp_path, 1)[:1]
    path = tmp_path / COCO / scenes[0].file
    width, height = scenes[0].size
    rle = {"size": [height, width], "counts": [width * height - 3, 3]}
    row = (scenes[0].file, scenes[0].coco_size(), [1, 1, 5, 5], "cup", rle)
    (tmp_path / "unc").mkdir()
    torch.save([row], tmp_path / "unc/unc_val.pth")
    data = open_dataset("unc", "val", 32, data_root=tmp_path, masks="segmentation")
    Image.new("RGB", (7, 7)).save(path)
    message = refusal(list, training_batches(data, 0, 1, 1, workers=workers))
    assert message.startswith(str(path)) and "run-length mask" in message


def test_check_reads_every_image_if_asked(tmp_path):
    path = write_damaged(tmp_path)
    assert "cannot be read" not in check(tmp_path, path)
    (tmp_path / "7.png").write_bytes((tmp_path / "5.png").read_bytes())
    header, *listed = check(tmp_path, path, decode=True).splitlines()[1:4]
    assert header == f"{path} train: 2 of 8 images cannot be read:"
    for line, name in zip(listed, ("5.png", "7.png"), strict=True):
        assert line.startswith(f"  {tmp_path / name}: the image is damaged")
    done = python("-m", "hivg.data", "check", path, "--decode")
    assert done.returncode == 0 and header in done.stdout
    (tmp_path / "3.png").write_bytes(b"no image at all")  # left out before any image is read, and listed too
    text = check(tmp_path, path, decode=True)
    assert "3 of 8 images cannot be read:" in text and f"  {tmp_path / '3.png'}: " in text
    for name in ("3.png", "5.png", "7.png"):
        (tmp_path / name).write_bytes((tmp_path / "4.png").read_bytes())
    assert "all 8 images can be read" in check(tmp_path, path, decode=True)
