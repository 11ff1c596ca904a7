"""Downloads of OpenAI's weights and merge table, checked by their sha256.

Sources: the addresses in `clip/clip.py` of the openai/CLIP repository, which contain the weights' hashes, and the merge
table of the same repository.
"""

import http.client
import os
import re
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from hivg.utils.cli import Progress
from hivg.utils.files import hash_of
from hivg.utils.messages import quoted, shown

TABLE = "bpe_simple_vocab_16e6.txt.gz"
HASHES = {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def file_of(name):
    """The name of a model's file: "ViT-B/16" -> "ViT-B-16.pt"."""
    return re.sub("[/@]", "-", name) + ".pt"


FILES = {}  # name -> (address, sha256)
for name, sha256 in HASHES.items():
    FILES[name] = (f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file_of(name)}", sha256)
FILES["table"] = (f"https://github.com/openai/CLIP/raw/main/clip/{TABLE}",
                  "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
CHUNK = 1 << 20  # bytes read at once


def spelled(name):
    """A model's name as FILES has it, from that or from its file's: "ViT-B-16.pt" -> "ViT-B/16"."""
    return {file_of(known): known for known in HASHES}.get(file_of(name.removesuffix(".pt")), name)


def fetch(name, folder):
    """Download a model of FILES and the merge table into `folder` -> their paths. A file that is complete is not
    downloaded again; a partial one is resumed. Raises ValueError."""
    name = spelled(name)
    if name not in FILES:
        raise ValueError(f"no weights are called {quoted(name)}; there are {', '.join(FILES)}")
    return [download(*FILES[name], Path(folder)) for name in dict.fromkeys((name, "table"))]


def download(address, sha256, folder):
    """Download one file -> its path. It gets its name only once its hash is right. Until then it is beside it, under a
    name with its hash, which no other file has. Raises ValueError."""
    path = folder / address.rsplit("/", 1)[1]
    part = path.with_name(f"{path.name}.{sha256[:16]}.part")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        if hash_of(path) != sha256:
            raise ValueError(f"{shown(path)}: exists, but is not the published file (its sha256 differs); remove it "
                             "and fetch again")
        return path
    is_resumed = part.is_file() and part.stat().st_size > 0
    for _ in range(1 + is_resumed):  # a part may be wrong from the start: then once more without it
        done, total = get(address, part)
        if hash_of(part) == sha256:  # whatever length the server gave
            with writing(path):
                os.replace(part, path)
            return path
        if done < total:
            raise ValueError(f"{shown(path)}: the connection ended after {done:,} of {total:,} bytes; run the same "
                             "command again to resume")
        part.unlink()
    raise ValueError(f"{address}: the server sent something other than the published file (its sha256 differs), which "
                     "was removed; try again later, or from another network")


def get(address, part):
    """Add to `part` the bytes of the address that are not in it yet -> how many it has, and how many the server says
    there are. Raises ValueError; what was received stays."""
    done = total = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:  # 206: only the range that was asked for; otherwise everything is sent
                done = 0
            total = done + (answer.length or 0)
            progress = Progress(f"{address.rsplit('/', 1)[1]}, MB", round(total / 1e6))
            with writing(part):
                file = open(part, "ab" if done else "wb")
            with file:
                while data := answer.read(CHUNK):
                    with writing(part):
                        file.write(data)
                        file.flush()  # so that a full disk is noticed here, not when the file is closed
                    done += len(data)
                    progress(round(done / 1e6))
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: nothing is left to send
            raise ValueError(f"{address}: the server answers {error.code} {shown(error.reason, 60)}; try again "
                             "later") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        reason = shown(getattr(reason, "strerror", None) or reason, 36)
        path = shown(part.with_suffix("").with_suffix(""), 78)  # the address stays whole, to be fetched some other way
        raise ValueError(f"{address}: no connection ({reason}); try again, or save it as {path}") from None
    return done, total


@contextmanager
def writing(path):
    """Turn an OSError into a ValueError, so that it is not taken for a failed connection."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{shown(path)}: cannot be written ({error.strerror}); make room, or run the command where "
                         "you may write") from None
