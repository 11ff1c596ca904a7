"""Pixels that are fine are read, and turned as EXIF says, whatever else lies beside them in the file."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK

from hivg.data import images
from hivg.data.images import open_image, open_published, stored_size, upright_size

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))  # orientation: to be turned by 90 degrees
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
PROFILE = np.random.default_rng(1).bytes(300)


def exif(*entries, data=b""):
    """A TIFF directory of (tag, type, count, value) entries, and what they refer to."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + data


def saved(**options):
    file = io.BytesIO()
    IMAGE.save(file, **options)
    return file.getvalue()


def chunk(kind, content, wrong=0):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def png(*chunks, late=False):
    data = saved(format="PNG")
    at = -12 if late else 33
    return data[:at] + b"".join(chunks) + data[at:]


def jpeg(*segments):
    data = saved(format="JPEG")
    packed = [b"\xff" + marker + struct.pack(">H", len(content) + 2) + content for marker, content in segments]
    return data[:2] + b"".join(packed) + data[2:]


def webp(**chunks):
    def packed(kind, content):
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    flags = 0x20 * ("ICCP" in chunks) + 0x08 * ("EXIF" in chunks) + 0x04 * ("XMP" in chunks)
    size = (29).to_bytes(3, "little") + (19).to_bytes(3, "little")
    body = packed(b"VP8X", bytes([flags, 0, 0, 0]) + size)
    body += packed(b"ICCP", chunks["ICCP"]) if "ICCP" in chunks else b""
    body += saved(format="WEBP", lossless=True)[12:]
    body += b"".join(packed(name.ljust(4).encode(), chunks[name]) for name in ("EXIF", "XMP") if name in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def tiff(compression=None, **changes):
    """changes: {"x" and a tag's number: (type, count, value), what its entry becomes}."""
    data = bytearray(saved(format="TIFF", compression=compression, exif=Image.Exif(), icc_profile=PROFILE,
                           tiffinfo={0x0112: 6, 700: XMP, 270: "text", 0x8769: 8, 282: 72.0}))
    start, = struct.unpack_from("<I", data, 4)
    count, = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        change = changes.get(f"x{struct.unpack_from('<H', data, at)[0]}")
        if change:
            struct.pack_into("<HII", data, at + 2, *change)
    return bytes(data)


ZEROS = zlib.compress(bytes(MAX_TEXT_CHUNK + 1))
EIGHT = b"eXIf", exif(TURN)
XMP_TEXT = b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
RAW = b"tEXt", b"Raw profile type exif\0\nexif\n  1\n" + (b"Exif\0\0" + exif(TURN)).hex().encode()
ODD = {  # name: a file to be turned; its pixels are fine
    "resolution -1 to 0.jpg": jpeg((b"\xe1", b"Exif\0\0" + exif(
        TURN, (0x011A, 10, 1, struct.pack("<I", 38)), data=struct.pack("<ii", -1, 0)))),
    "resolution as text.jpg": jpeg((b"\xe1", b"Exif\0\0" + exif(TURN, (0x011A, 2, 3, b"72\0\0")))),
    "two orientations.jpg": jpeg((b"\xe1", b"Exif\0\0" + exif((0x0112, 3, 2, struct.pack("<HH", 6, 6))))),
    "no more than JFIF.jpg": jpeg((b"\xe0", b"JFIF\0"), (b"\xe1", b"Exif\0\0" + exif(TURN))),
    "a text too long.png": png(chunk(b"zTXt", b"a\0\0" + ZEROS), chunk(*EIGHT)),
    "a late text too long.png": png(chunk(*EIGHT), chunk(b"zTXt", b"a\0\0" + ZEROS), late=True),
    "a profile too long.png": png(chunk(b"iCCP", b"a\0\0" + ZEROS), chunk(*EIGHT)),
    "a wrong checksum.png": png(chunk(b"tEXt", b"a\0b", wrong=1), chunk(*EIGHT)),
    "a late short chunk, and XMP.png": png(chunk(*XMP_TEXT), chunk(b"gAMA", b""), late=True),
    "XMP.png": png(chunk(*XMP_TEXT)), "a raw profile.png": png(chunk(*RAW)),
    "a late raw profile.png": png(chunk(*RAW), late=True),
    "width -5.webp": webp(EXIF=exif(TURN, (0x0100, 9, 1, struct.pack("<i", -5)))),
    "cut in its XMP.webp": webp(ICCP=PROFILE, EXIF=exif(TURN), XMP=XMP)[:-9],
    "a text of numbers.tif": tiff(x700=(2, 5, 8)),
    "a text of numbers, packed.tif": tiff("tiff_lzw", x270=(12, 2**16, 8)),
    "a directory of nothing.tif": tiff(x34665=(4, 1, 2**31), x282=(5, 0, 0)),
}
UNTURNED = {  # what would turn it cannot be read
    "damaged EXIF.jpg": jpeg((b"\xe1", b"Exif\0\0MM\0*" + bytes(9))),
    "damaged EXIF.png": png(chunk(b"eXIf", b"none" + exif(TURN))),
    "EXIF with a wrong checksum.png": png(chunk(*EIGHT, wrong=1)),
    "damaged EXIF.webp": webp(EXIF=b"none" + exif(TURN)),
}


def assert_read(path, turned, capfd):
    """By every way to read it, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(path)
        assert upright_size(path) == image.size == ((20, 30) if turned else (30, 20))
        with open(path, "rb") as file:
            np.testing.assert_array_equal(np.asarray(open_image(file)), np.asarray(image))
        published = np.asarray(open_published(path))
        if path.suffix != ".tif":  # which old Pillows turn while they read the pixels
            assert stored_size(path) == published.shape[1::-1]
    upright = published if published.shape == (30, 20, 3) else np.rot90(published, -1)  # Pillow turns TIFFs itself
    np.testing.assert_array_equal(np.asarray(image), upright if turned else published)
    if path.suffix != ".jpg":
        np.testing.assert_array_equal(np.asarray(image), np.rot90(PIXELS, -1) if turned else PIXELS)
    assert open_image(image).size == image.size  # not turned again
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ODD | UNTURNED)
def test_odd_metadata(tmp_path, capfd, name):
    path = tmp_path / name
    path.write_bytes((ODD | UNTURNED)[name])
    assert_read(path, name in ODD, capfd)


def damaged(rng, content):
    at = min(rng.randrange(len(content)), rng.randrange(60))
    return content[:at] + rng.randbytes(rng.choice((0, 1, 4))) + content[at + rng.choice((0, 1, 4, 500)) :]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_random_damage_beside_the_pixels(tmp_path, capfd, suffix):
    for number in range(60):
        rng = random.Random(number)
        bad = damaged(rng, exif(TURN, (0x011A, 5, 1, struct.pack("<I", 38)), data=bytes(8))), damaged(rng, PROFILE)
        if suffix == "jpg":
            data = jpeg((b"\xe1", b"Exif\0\0" + bad[0]), (rng.choice((b"\xe0", b"\xe2", b"\xed")), bad[1]))
        elif suffix == "png":
            kind = rng.choice((b"iCCP", b"zTXt", b"iTXt", b"pHYs", b"cHRM", b"acTL", b"sRGB", b"abCd"))
            data = png(chunk(b"eXIf", bad[0]), chunk(kind, bad[1], rng.choice((0, 1))), late=rng.random() < 0.5)
        else:
            data = webp(EXIF=bad[0], ICCP=bad[1], XMP=damaged(rng, XMP))
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(data)
        assert_read(path, upright_size(path) == (20, 30), capfd)


def test_only_images_are_read_whole(tmp_path, monkeypatch):
    """A device has no end, and a film has gigabytes."""
    monkeypatch.setattr(images, "without_metadata", lambda data: [][len(data) - 4])  # an IndexError for four bytes
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0 ftypisom" * 1000)
    for path in ("/dev/zero", tmp_path / "film.mp4"):
        with pytest.raises(images.ImageError, match=Path(path).name):
            open_image(path)


def test_pixels_that_are_cut_short_are_still_refused(tmp_path):
    for name in ("a text too long.png", "no more than JFIF.jpg", "cut in its XMP.webp"):
        path = tmp_path / name
        path.write_bytes(ODD[name][: len(ODD[name]) * 2 // 3])
        with pytest.raises(ValueError, match="damaged|cannot be opened|not an image"):
            open_image(path)
