"""The letterbox: pixels, masks and boxes land in the same place, there and back, for any shape of image."""

import numpy as np
import pytest
import torch
from makers import GOLDEN, assert_close, needs_golden, random_boxes
from makers_data import extent, filled
from PIL import Image
from safetensors.torch import load_file

from hivg.boxes import cxcywh_to_xyxy
from hivg.data.transforms import NORMALIZATION, Letterbox

SIZES = [(300, 200), (200, 300), (128, 128), (131, 127), (90, 640), (4000, 8), (8, 4000), (10, 7), (1, 1), (5, 1)]


def pixels(letterbox, image):
    """The square back in 0..1, (size, size, 3)."""
    mean, std = torch.tensor(NORMALIZATION["clip"])
    return letterbox.image(image).permute(1, 2, 0) * std + mean


@needs_golden
@pytest.mark.parametrize("name", ["landscape", "portrait"])
def test_golden_transform(name):
    image = Image.open(GOLDEN / f"transform_{name}.png").convert("RGB")
    golden = load_file(GOLDEN / f"transform_{name}.expected.safetensors")
    letterbox = Letterbox(*image.size, 224)
    assert_close("image", letterbox.image(image, "imagenet"), golden["image"], 1e-4)
    assert torch.equal(letterbox.padding_mask(), golden["padding_mask"])
    source = golden["source_box_xyxy"]
    assert_close("box", letterbox.boxes_to_square(source[None])[0], golden["box"], 1e-4)
    ours = letterbox.mask(filled(source, *image.size))
    expected = golden["object_mask"][0].bool()
    # the released mask is of a box rounded in the square, ours of the box in the image: a pixel at its edges
    assert (ours & expected).sum() / (ours | expected).sum() > 0.95


@pytest.mark.parametrize("width, height", SIZES)
def test_layout(width, height):
    """The long side fills the square, the image is in the middle, whole, and nothing else is not padding."""
    letterbox = Letterbox(width, height, 128)
    w, h = letterbox.inner
    left, top = letterbox.corner
    assert max(w, h) == 128 and min(w, h) >= 1
    exact = min(width, height) * 128 / max(width, height)
    assert abs(min(w, h) - exact) <= 0.5 or (min(w, h) == 1 and exact < 1)
    for before, side in ((left, w), (top, h)):
        assert before >= 0 and abs(before - (128 - side - before)) <= 1
    keep = ~letterbox.padding_mask()
    assert keep.shape == (128, 128) and keep.dtype == torch.bool and keep.sum() == w * h
    assert keep.any(1).nonzero().flatten().tolist() == list(range(top, top + h))
    assert keep.any(0).nonzero().flatten().tolist() == list(range(left, left + w))


@pytest.mark.parametrize("width, height", SIZES)
def test_boxes_there_and_back(width, height):
    letterbox = Letterbox(width, height, 128)
    boxes = random_boxes(50).float() * torch.tensor([width, height] * 2)
    square = letterbox.boxes_to_square(boxes)
    assert square.shape == (50, 4) and (square[:, 2:] <= 1).all()
    back = letterbox.boxes_to_image(square)
    assert_close("boxes, in long sides", back / max(width, height), boxes / max(width, height), 1e-6)
    whole = torch.tensor([[0.0, 0, width, height]])
    assert_close("one box, no batch", letterbox.boxes_to_image(letterbox.boxes_to_square(whole[0])), whole[0], 1e-3)
    assert_close("all of the square", letterbox.boxes_to_image(torch.tensor([[0.5, 0.5, 1, 1]])), whole, 1e-3)
    outside = letterbox.boxes_to_image(torch.tensor([[-1.0, -1, 0.1, 0.1], [2, 2, 0.1, 0.1]]))
    assert torch.equal(outside, torch.tensor([[0.0] * 4, [width, height] * 2]))


@pytest.mark.parametrize("fill, place, inner, corner", [
    (1, (0.5, 0.5), (50, 25), (0, 12)), (0.8, (0, 1), (40, 20), (0, 30)), (0.8, (1, 0), (40, 20), (10, 0)),
    (0.8, (0.5, 0.5), (40, 20), (5, 15))])
def test_box_on_paper(fill, place, inner, corner):
    """200 x 100 into 50: with fill 1 halved twice, so that 25 rows are free, of which the released code puts 12 above;
    with fill 0.8 40 x 20, so that 10 columns and 30 rows are free. The box is not square."""
    letterbox = Letterbox(200, 100, 50, fill, place)
    assert (letterbox.inner, letterbox.corner) == (inner, corner)
    x0, y0, x1, y1 = torch.tensor([40.0, 20, 120, 80]) * fill / 4
    left, top = corner
    expected = torch.tensor([[left + (x0 + x1) / 2, top + (y0 + y1) / 2, x1 - x0, y1 - y0]]) / 50
    assert_close("box", letterbox.boxes_to_square(torch.tensor([[40, 20, 120, 80]])), expected, 1e-6)


@pytest.mark.parametrize("height, top", [(23, 13), (25, 12), (24, 13), (50, 0)])
def test_an_odd_row_is_below(height, top):
    """As in the released code: with 27 free rows, 13 are above."""
    assert Letterbox(50, height, 50).corner == (0, top)


@pytest.mark.parametrize("width, height", [size for size in SIZES if max(size) >= 128])  # shrunk
def test_pixels_land_where_the_boxes_say(width, height):
    """Red says how far right, green how far down in the image a pixel was. Each pixel of the square, asked where it
    came from, is there within a pixel: the resized sides are whole numbers, and colours come in steps of 1 / 255."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    image = np.stack([x, y, 0 * x], -1) * 255
    letterbox = Letterbox(width, height, 128)
    square = pixels(letterbox, Image.fromarray(image.round().astype(np.uint8)))
    rows, columns = (~letterbox.padding_mask()).nonzero().T
    from_x, from_y = square[rows, columns, 0] * width, square[rows, columns, 1] * height
    landed = cxcywh_to_xyxy(letterbox.boxes_to_square(torch.stack([from_x, from_y, from_x, from_y], -1))) * 128
    assert_close("x", landed[:, 0], columns + 0.5, 1)
    assert_close("y", landed[:, 1], rows + 0.5, 1)


@pytest.mark.parametrize("width, height", [(300, 200), (200, 300), (131, 127), (90, 640)])
def test_mask_and_box_of_an_object_agree(width, height):
    box = torch.tensor([width // 4, height // 3, width // 2, height - height // 5])
    mask = filled(box, width, height)
    letterbox = Letterbox(width, height, 128)
    square = letterbox.mask(mask)
    assert square.shape == (128, 128) and square.dtype == torch.bool
    assert_close("extent of the mask", extent(square), cxcywh_to_xyxy(letterbox.boxes_to_square(box)) * 128, 1)
    assert not square[letterbox.padding_mask()].any()

    drawn = pixels(letterbox, Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255))[..., 0] > 0.5
    differ = (drawn & ~letterbox.padding_mask()) ^ square
    assert differ.sum() <= (extent(square)[2:] - extent(square)[:2]).sum()  # half of the mask's outline

    back = letterbox.map_to_image(square.float()) > 0.5
    assert back.shape == (height, width)
    pixel = max(width, height) / 128  # of the square, in the image
    assert_close("extent in the image", extent(torch.from_numpy(back)), box, max(pixel, 1))


@pytest.mark.parametrize("width, height", SIZES)
def test_map_to_image(width, height):
    """The size of the image, and nothing of the padding leaks in."""
    letterbox = Letterbox(width, height, 128)
    square = torch.where(letterbox.padding_mask(), 1000.0, 0.25)
    for given in (square, square.double().numpy()):
        back = letterbox.map_to_image(given)
        assert back.shape == (height, width) and back.dtype == np.float32
        assert np.abs(back - 0.25).max() < 1e-6


def test_shrinking_smooths_images_and_picks_pixels_of_masks():
    pattern = np.random.default_rng(0).random((128, 256)) > 0.5
    letterbox = Letterbox(256, 128, 128)
    picked = torch.from_numpy(pattern[1::2, 1::2])  # nearest to the middle of 2 x 2 pixels, as PIL breaks the tie
    assert torch.equal(letterbox.mask(pattern)[32:96], picked)
    checks = (np.indices((128, 256)).sum(0) % 2 * 255).astype(np.uint8)
    grey = pixels(letterbox, Image.fromarray(np.repeat(checks[..., None], 3, 2)))[33:95, 1:-1]
    assert_close("checks", grey, torch.full_like(grey, 0.5), 0.01)


@pytest.mark.parametrize("width, height", SIZES)
def test_labels_are_the_masks_of_each(width, height):
    labels = np.random.default_rng(0).integers(0, 4, (height, width), dtype=np.uint8)
    letterbox = Letterbox(width, height, 128)
    square = letterbox.labels(labels)
    assert square.shape == (128, 128) and not square[letterbox.padding_mask()].any()
    for label in range(1, 4):
        assert torch.equal(square == label, letterbox.mask(labels == label))
    assert torch.equal(letterbox.mask(np.ones((height, width), dtype=bool)), ~letterbox.padding_mask())
