"""Work done in a process of its own, with a limit on its memory and its time: a file must not end the process."""

import inspect

from makers import python


def limit(megabytes):
    """Take no more memory than so much above what there is now."""
    import resource  # which Windows lacks
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


LIMIT = "import sys\n" + inspect.getsource(limit)


def outcomes(imports, work, paths, megabytes=300, seconds=120):
    """What `work(path)`, an expression, gives for each path -> a list of lines: "fine", or its ValueError's message.

    imports: statements done before the memory is limited to `megabytes` more than it is by then. Fails if the process
    crashes, takes longer than `seconds`, or runs out of memory, be it noticed or not.
    """
    script = LIMIT + imports + """
limit(int(sys.argv[1]))
for path in sys.argv[2:]:
    try:
        WORK
        print("fine", flush=True)
    except ValueError as error:
        print(str(error), flush=True)
""".replace("WORK", work)
    done = python("-c", script, megabytes, *paths, timeout=seconds)
    lines = done.stdout.splitlines()
    names = [getattr(path, "name", path) for path in paths]
    assert done.returncode == 0, f"{names[len(lines):][:1]}: {done.returncode} {done.stderr[-2000:]}"
    assert len(lines) == len(paths), done.stdout
    for name, line in zip(names, lines):
        assert "emory" not in line and "alloc" not in line, f"{name}: {line}"
        assert len(line) <= 300 and line.isprintable(), f"{name}: {line}"
    return lines
