"""What messages quote from files and flags: short, on one line, without control characters."""


def shown(text, limit=120):
    """A path, name or message on one line: control characters are escaped ("\\x1b"), a long text loses its middle."""
    text = _shorten(str(text), limit)
    spelled = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return _shorten(spelled, limit)


def quoted(value, limit=60):
    """Any value as Python would write it, shortened to `limit` characters. Lists inside lists are only counted, as
    lists that share lists would take forever to write."""
    if isinstance(value, (list, tuple)):
        parts = [_plainly(part, limit) for part in value[:8]]
        text = ", ".join(parts + ["..."] * (len(value) > 8))
        return _shorten(f"[{text}]" if isinstance(value, list) else f"({text})", limit)
    return _plainly(value, limit)


def _plainly(value, limit):
    if isinstance(value, (str, bytes)):
        return _shorten(repr(_shorten(value, limit)), limit) if isinstance(value, str) else repr(value[:limit])[:limit]
    if isinstance(value, bool | float | None) or (isinstance(value, int) and abs(value) < 10**20):
        return repr(value)
    if isinstance(value, int):
        return "a huge number"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _shorten(text, limit):
    if len(text) <= limit:
        return text
    half = (limit - 2) // 2
    return f"{text[:half]}..{text[-half:]}"
