"""Downloads of OpenAI's weights and merge table, checked by their sha256. Sources: the addresses in `clip/clip.py` of
the openai/CLIP repository, which hold the weights' hashes, and the merge table of the same repository.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from hivg.utils.cli import Progress

TABLE = "bpe_simple_vocab_16e6.txt.gz"
MODELS = "https://openaipublic.azureedge.net/clip/models"
# name -> (address, sha256)
FILES = {
    "ViT-B/32": (f"{MODELS}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
                 "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": (f"{MODELS}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
                 "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": (f"{MODELS}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
                 "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": (f"{MODELS}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
                       "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    "table": (f"https://github.com/openai/CLIP/raw/main/clip/{TABLE}",
              "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
}
CHUNK = 1 << 20


def fetch(name, folder):
    """Bring a model of FILES and the merge table into `folder` -> their paths. What is there and whole is not fetched
    again; what is there in part (`.part`) goes on. Raises ValueError."""
    if name not in FILES:
        raise ValueError(f"no weights are called {name!r:.60}; there are {', '.join(FILES)}")
    return [download(*FILES[n], Path(folder)) for n in dict.fromkeys((name, "table"))]


def download(address, sha256, folder):
    """One file -> its path. It gets its name only once its hash is right. Raises ValueError."""
    path = folder / address.rsplit("/", 1)[1]
    part = path.with_name(path.name + ".part")
    if path.is_file():
        if hash_of(path) == sha256:
            return path
        raise ValueError(f"{path}: is there, but is not the published file (its sha256 differs); remove it and fetch "
                         "again")
    folder.mkdir(parents=True, exist_ok=True)
    for fresh in (False, True):  # a part that turns out wrong is fetched once more, from its start
        if fresh:
            part.unlink(missing_ok=True)
        resumed = part.is_file() and part.stat().st_size > 0
        get(address, part)
        if hash_of(part) == sha256:
            os.replace(part, path)
            return path
        if not resumed:
            break
    part.unlink()
    raise ValueError(f"{address}: what came is not the published file (its sha256 differs), and was removed; try again "
                     "later, or from another network")


def get(address, part):
    """Append to `part` what of the address is not in it yet. Raises ValueError if the connection fails; what came by
    then stays."""
    done = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if done and answer.status != 206:  # no ranges here: it sends everything
                done = 0
            total = done + int(answer.headers.get("Content-Length", 0))
            progress = Progress(f"{part.name.removesuffix('.part')}, MB", round(total / 1e6))
            with open(part, "r+b" if done else "wb") as file:
                file.seek(done)
                while data := answer.read(CHUNK):
                    file.write(data)
                    done += len(data)
                    progress(round(done / 1e6))
            if done < total:
                raise ValueError(f"{address}: the connection ended after {done:,} of {total:,} bytes; the same command "
                                 "goes on where it was")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send
            raise ValueError(f"{address}: the server answers {error.code} {error.reason}; try again later") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise ValueError(f"{address}: no connection ({getattr(error, 'reason', error)}); check the network, or bring "
                         f"the file on another way as {part.with_suffix('')}; what came is kept, and the same command "
                         "goes on there") from None


def hash_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
