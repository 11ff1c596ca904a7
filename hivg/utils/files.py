"""Files that appear whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from PIL import Image

from hivg.utils.messages import shown

TORCHS_OWN = ("[enforce fail", "PytorchStreamWriter", "basic_ios")  # how the errors of torch.save begin on a full disk


def write_whole(path, write, advice="make room, or write elsewhere"):
    """Call write(a path beside it), then rename: if the program is killed, either the old file or the new one is left.

    advice: the end of the error message. Raises OSError, one line with the file, if it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # the latter from torch.save, e.g. on a full disk
        with suppress(OSError):
            part.unlink()
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if reason.startswith(TORCHS_OWN):  # which tells the reader nothing
            reason = "the disk may be full"
        raise OSError(f"{shown(path)}: cannot be written ({shown(reason, 100)}); {advice}") from None


def save_image(image, path, advice="make room, or write elsewhere"):
    """Write a PIL image in the format of the suffix of `path`. Raises ValueError for an unknown suffix, and as
    write_whole does."""
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{shown(path)}: unknown image suffix; end the name in .png")
    write_whole(path, lambda part: image.save(part, kind), advice)
