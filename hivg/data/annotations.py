"""`hivg.data.annotations.read_samples`, the name under which people import it."""

from hivg.data.published.reading import read_samples  # noqa: F401
