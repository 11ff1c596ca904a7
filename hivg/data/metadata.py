"""What an image file holds beside its pixels: it may say that the image is turned; the rest is not needed here, and
Pillow refuses some files only for an oddity in it."""

import struct
import zlib

from PIL import ExifTags, Image

from hivg.utils.memory import is_out_of_memory

TURNS = {  # EXIF's orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STARTS = (b"II*\0", b"MM\0*", b"\xff\xd8", b"\x89PNG", b"RIFF")  # of the files that `without_metadata` takes
# the tags of a TIFF that its pixels need, and its orientation, 274
TIFF_TAGS = {254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325,
             332, 338, 339, 347, 529, 530, 531, 532}


def turn_of(image):
    """What makes a PIL image upright: an Image.Transpose, or None. What cannot be read turns nothing."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception as error:  # damaged EXIF makes Pillow raise nearly anything
        if is_out_of_memory(error):
            raise
        return None


def without_metadata(data):
    """The bytes of a JPEG, PNG, WebP or TIFF file -> (a file of the same pixels with nothing beside them, the `info` by
    which Pillow finds how it is turned). Raises ValueError, IndexError or struct.error for other or damaged files."""
    if data.startswith((b"II*\0", b"MM\0*")):
        return _bare_tiff(data), {}
    if data.startswith(b"\xff\xd8"):
        kept, others = _split_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        kept, others = _split_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kept, others = _split_webp(data)
    else:
        raise ValueError("of another format")
    info = {}
    for content in others:
        if content.startswith((b"Exif\0\0", b"II*\0", b"MM\0*")):
            info["exif"] = content
        elif b"tiff:Orientation" in content:
            info["XML:com.adobe.xmp"] = content.decode("latin1")  # the key and type that every Pillow looks at
    return b"".join(kept), info


# each -> the parts to keep, in their order, and the contents of the others

def _split_jpeg(data):
    kept, others = [data[:2]], []
    at = 2
    while data[at + 1] != 0xDA:  # the scan
        marker = data[at + 1]
        segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        says_the_colours = marker in (0xE0, 0xEE) and len(segment) >= 16  # JFIF's and Adobe's
        if 0xE0 <= marker <= 0xEF and not says_the_colours or marker == 0xFE:  # a program's, or a comment
            others.append(segment[4:])
        else:
            kept.append(segment)
        at += len(segment)
    return [*kept, data[at:]], others


def _split_png(data):
    kept, others = [data[:8]], []
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(chunk)
        elif chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big"):
            others.append(chunk[8:-4])
        at += len(chunk)
    return kept, others


def _split_webp(data):
    kept, others = [], []
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        chunk = data[at : at + 8 + length + length % 2]
        if kind in (b"ICCP", b"EXIF", b"XMP "):
            others.append(chunk[8:])
        elif kind == b"VP8X":  # its first byte says which of those there are
            kept.append(chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:])
        else:
            kept.append(chunk)
        at += len(chunk)
    size = 4 + sum(map(len, kept))
    return [b"RIFF", struct.pack("<I", size), b"WEBP", *kept], others


def _bare_tiff(data):
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in TIFF_TAGS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # no further image
    return data[:start] + directory + data[start + len(directory) :]  # in place: all else is found by its position
