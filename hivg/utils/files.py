"""Files that are written whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from PIL import Image

from hivg.utils.memory import is_out_of_memory
from hivg.utils.messages import shown

ADVICE = "make room, or write elsewhere"
FULL_DISK = ("[enforce fail", "PytorchStreamWriter", "basic_ios")  # how torch.save's errors begin on a full disk


def write_whole(path, write, advice=ADVICE):
    """Call write(a path beside it), then rename: a program that is killed, or a power cut, leaves the old file or the
    new one, whole.

    advice: how the error message ends. Raises OSError, one line that names the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb+") as file:  # else a power cut may keep the new name and lose what it names
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save, on a full disk
        with suppress(OSError):
            part.unlink()
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if reason.startswith(FULL_DISK):
            reason = "the disk may be full"
        raise OSError(f"{shown(path)}: cannot be written ({shown(reason, 100)}); {advice}") from None


def image_format(path):
    """Pillow's name of the image format that a path's suffix stands for. Raises ValueError if it cannot write one."""
    name = Image.registered_extensions().get(Path(path).suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"{shown(path)}: its suffix is not that of an image format; end the name in .png")
    return name


def save_image(image, path, advice=ADVICE):
    """Write a PIL image in the format of the path's suffix. Raises as image_format and write_whole do."""
    name = image_format(path)
    write_whole(Path(path), lambda part: image.save(part, name), advice)
