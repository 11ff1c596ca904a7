"""Running out of memory, which every library reports in a way of its own."""

import errno
import re
from contextlib import contextmanager

SIGNS = r"out of memory|enough memory|allocate memory|ALLOC_FAILED"  # PyTorch's, CUDA's, Pillow's and the system's


def is_out_of_memory(error):
    """Whether an error says that memory ran out, that of the computer or of a GPU."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return not isinstance(error, ValueError) and bool(re.search(SIGNS, str(error)))


@contextmanager
def enough_memory(name, lower):
    """Turn what is raised inside where memory runs out into a MemoryError: one line that says what needed it, and what
    to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or "not enough memory" in str(error).partition("\n")[0]:
            raise
        place = " on the GPU" if re.search("cuda|cublas|cudnn", str(error), re.IGNORECASE) else ""
        raise MemoryError(f"{name}not enough memory{place}; {lower}") from None
