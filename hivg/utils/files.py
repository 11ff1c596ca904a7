"""Files that are written whole or not at all."""

import hashlib
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from hivg.utils.memory import is_out_of_memory
from hivg.utils.messages import quoted, shown

ADVICE = "make room, or write elsewhere"
FULL_DISK = ("[enforce fail", "PytorchStreamWriter", "basic_ios")  # how torch.save's errors begin on a full disk


def write_whole(path, write, advice=ADVICE):
    """Call write(a new file beside it), then rename: a program that is killed, or a power cut, leaves the old file
    or the new one, whole, and of several programs that write it the last one's stays. A link is replaced, not what it
    leads to.

    advice: how the error message ends. Raises OSError, one line that names the file.
    """
    part = path.with_name(f"{path.name[:50]}.part{secrets.token_hex(8)}")  # a name that no other file has
    with written(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        open(part, "xb").close()  # x: never one that is there, nor through a link
        try:
            write(part)
            with open(part, "r+b") as file:
                os.fsync(file.fileno())  # or the new name might survive a power cut, and not the content
            os.replace(part, path)
        finally:
            with suppress(OSError):  # it has the other name
                part.unlink()


@contextmanager
def written(path, advice=ADVICE):
    """Turn what goes wrong in writing a file into an OSError, one line that names it and ends in advice."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save, on a full disk
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if reason.startswith(FULL_DISK):
            reason = "the disk may be full"
        raise OSError(f"{shown(path)}: cannot be written ({shown(reason, 100)}); {advice}") from None


def remove_parts(folder):
    """Remove what killed programs have left of files that `write_whole` was writing to a folder. Call it only where no
    other program writes."""
    for part in folder.glob("*.part" + 16 * "[0-9a-f]"):
        part.unlink(missing_ok=True)


def file_id(path):
    """(device, inode) of a file, the same by whatever path; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return found.st_dev, found.st_ino


def hash_of(path):
    """The sha256 of a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_to_replace(inputs, outputs, advice, what="image"):
    """Raises ValueError if a file to be written is one that is read, by whatever path."""
    existing = {file_id(output): output for output in outputs}
    existing.pop(None, None)
    for path in inputs if existing else ():  # there may be very many
        if file_id(path) in existing:
            raise ValueError(f"{shown(path)}: {shown(existing[file_id(path)])} would replace the {what}; {advice}")


def image_format(path):
    """Pillow's name of the image format that a path's suffix stands for. Raises ValueError if it cannot write one."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{quoted(path)} is not the path of an image; give a string or a Path")
    name = Image.registered_extensions().get(Path(path).suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"{shown(path)}: its suffix is not that of an image format; end the name in .png")
    return name


def save_image(image, path, advice=ADVICE):
    """Write a PIL image in the format of the path's suffix. Raises as image_format and write_whole do."""
    name = image_format(path)
    write_whole(Path(path), lambda part: image.save(part, name), advice)
