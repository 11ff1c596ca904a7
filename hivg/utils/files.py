"""Files that are there whole or not at all."""

import os
from contextlib import suppress

from hivg.utils.quote import shown


def write_whole(path, write, advice="make room, or write elsewhere"):
    """Call write(a path beside it), then rename: whenever the program is killed, the old file or the new one is there.

    advice: how the message ends. Raises OSError, one line with the file, if it cannot be written.
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
        raise OSError(f"{shown(path)}: cannot be written ({shown(reason, 100)}); {advice}") from None
