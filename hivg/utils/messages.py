"""Names and values in messages: short, on one line, without control characters that a terminal would obey."""


def shown(text, limit=120):
    """A path, name or message on one line: control characters are escaped ("\\x1b"), a long text loses its middle."""
    text = _shorten(str(text), limit)
    return _shorten("".join(char if char.isprintable() else repr(char)[1:-1] for char in text), limit)


def quoted(value, limit=60):
    """The repr of any value in at most `limit` characters. What is nested in a list is only named, not written out:
    lists that contain each other many times over would take forever."""
    if not isinstance(value, (list, tuple)):
        return _quoted(value, limit)
    text = ", ".join([_quoted(part, limit) for part in value[:8]] + ["..."] * (len(value) > 8))
    return _shorten(f"[{text}]" if isinstance(value, list) else f"({text})", limit)


def _quoted(value, limit):
    if isinstance(value, str):
        return _shorten(repr(_shorten(value, limit)), limit)
    if isinstance(value, bytes):
        return repr(value[:limit])[:limit]
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    if isinstance(value, int | float | None):  # bool is an int
        return repr(value)
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _shorten(text, limit):
    half = (limit - 2) // 2
    return text if len(text) <= limit else f"{text[:half]}..{text[-half:]}"
