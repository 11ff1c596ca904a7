"""The interactive page: an image and an expression in the browser, and what the model sees.

`python ground.py --page` serves it to this machine alone. What arrives stays in memory, and nothing else is fetched:

    GET /             page.html
    GET /example.png  the image it begins with
    GET /scene        {"image": base64 of a PNG, "expression": text}, a new drawn scene
    POST /ground      {"image": base64 of an image file, or null for the example, "expression": text}
                      -> {"box", "score", "width", "height", "warnings", "token_map", "attention", "words", ..}

Maps are rows of numbers over the patches that show the image (`Result.patches`). Errors are {"error": one line}.
"""

import base64
import html
import io
import json
import os
import random
import re
import sys
import time
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import Lock

import numpy as np

from hivg.data.drawn.expressions import NOTHING
from hivg.data.drawn.scenes import Shapes
from hivg.data.images import open_image
from hivg.evaluate.calibration import RECOMMENDED
from hivg.utils.memory import enough_memory
from hivg.utils.messages import shown

MOST = 20 * 10**6  # bytes of a request's body
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def hash_of(tag):
    """The hash by which the browser accepts the page's own <style> or <script>, and no other."""
    content = re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[1]
    return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"


POLICY = (f"default-src 'none'; style-src {hash_of('style')}; script-src {hash_of('script')}; connect-src 'self'; "
          "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Server(ThreadingTCPServer):
    """A thread for each request, but one forward pass at a time."""

    allow_reuse_address = os.name != "nt"  # on Windows two servers would share the port
    daemon_threads = True  # Ctrl-C waits for no browser

    def __init__(self, port, load, example, expression):
        """Listen on the port of 127.0.0.1, 0 for a free one, then load() the Grounder. example: the path of the image
        to begin with, and the expression about it. Raises ValueError for a port that cannot be had."""
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise ValueError(f"port {port} cannot be used ({error.strerror}); give another --port, or 0 for any that "
                             "is free") from None
        port = self.server_address[1]
        self.address = f"http://127.0.0.1:{port}/"
        self.elsewhere = (f"this page answers its own address alone, {self.address}; a tunnel must keep the port, as "
                          f"ssh -L {port}:localhost:{port} does")
        self.hosts = [f"{name}:{port}".removesuffix(":80") for name in ("127.0.0.1", "localhost")]
        self.lock = Lock()  # of the model
        self.open = lru_cache(maxsize=1)(opened)  # the image stays while one types
        self.example = Path(example).read_bytes()
        self.grounder = load()
        self.grounder.ground(example, expression, attention=True)  # the first takes longer
        score = "Score" if self.grounder.calibration else "Uncalibrated score"
        settings = {"expression": expression, "doubtful": RECOMMENDED, "score": score}
        self.page = PAGE.replace("{settings}", html.escape(json.dumps(settings))).encode()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a browser that went away is no fault
            super().handle_error(request, client_address)

    def scene(self):
        """The answer to GET /scene, of the world that the weights know."""
        dataset = getattr(self.grounder.model, "info", {}).get("dataset")
        world = Shapes("train", captions=False, wide=dataset != "shapes")
        while True:
            item = world[random.randrange(len(world))]
            for expression, target in zip(item["expressions"], item["targets"]):
                if target != NOTHING:
                    file = io.BytesIO()
                    item["image"].save(file, "PNG")
                    return {"image": base64.b64encode(file.getvalue()).decode(), "expression": expression}

    def ground(self, body):
        """The answer to POST /ground. Raises ValueError or MemoryError, one line."""
        start = time.perf_counter()
        data, expression = parsed(body)
        with self.lock, enough_memory("", "make the image smaller"):
            image, small = self.open(self.example if data is None else data)
            result = self.grounder.ground(image, expression, attention=True)
            warnings = self.grounder.warnings(expression, small)
        return {
            "box": result.box, "score": result.score, "width": image.width, "height": image.height,
            "warnings": warnings, "token_map": result.token_map[result.patches],
            "attention": result.attention_map[result.patches],
            "words": [{"text": word.text, "bridges": word.bridges} for word in result.words],
            "milliseconds": 1000 * (time.perf_counter() - start),
        }


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds without a byte from the browser

    def do_GET(self):
        path = self.path.partition("?")[0]
        if not self.is_from_here():
            self.refuse(403, self.server.elsewhere)
        elif path == "/":
            self.reply(200, self.server.page, "text/html; charset=utf-8")
        elif path == "/example.png":
            self.reply(200, self.server.example, "image/png")
        elif path == "/scene":
            self.reply(200, self.server.scene())
        else:
            self.refuse(404, "there is nothing at this address")

    def do_POST(self):
        length = self.headers.get("Content-Length")
        if not self.is_from_here():
            self.refuse(403, self.server.elsewhere)
        elif self.path != "/ground":
            self.refuse(404, "there is nothing at this address")
        elif length is None:
            self.refuse(411, "send a Content-Length")
        elif not re.fullmatch("[0-9]{1,18}", length):
            self.refuse(400, "the Content-Length is no number of bytes")
        elif int(length) > MOST:
            self.refuse(413, f"the request is larger than {MOST // 10**6} MB; make the image smaller")
        else:
            try:
                self.reply(200, self.server.ground(self.rfile.read(int(length))))
            except (ValueError, MemoryError) as error:
                self.reply(400, {"error": re.sub("^file object", "the image", shown(error, 300))})

    def is_from_here(self):
        """Whether the page itself asks: of another site the Origin is foreign, or the Host, if its name leads here."""
        origins = [None, *(f"http://{host}" for host in self.server.hosts)]
        return self.headers.get("Host", "").lower() in self.server.hosts and self.headers.get("Origin") in origins

    def refuse(self, code, message):
        """Reply without reading the body, then drop what still comes of it: a browser that is cut off while it sends
        shows no reply."""
        self.reply(code, {"error": message})
        self.connection.settimeout(1)
        end = time.monotonic() + 3
        with suppress(OSError):
            while "Content-Length" in self.headers and time.monotonic() < end and self.rfile.read1(2**16):
                pass

    def reply(self, code, body, kind="application/json"):
        if not isinstance(body, bytes):  # the numbers of maps have six digits
            body = json.dumps(body, default=lambda map_: map_.astype(np.float64).round(6).tolist()).encode()
        self.send_response(code)
        for name, value in (("Content-Type", kind), ("Content-Length", len(body)), ("Cache-Control", "no-store"),
                            ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def parsed(body):
    """The body of POST /ground -> (the bytes of an image file or None, the expression). Raises ValueError."""
    with suppress(ValueError, RecursionError):  # the latter: brackets nested by the thousand
        body = json.loads(body)
    match body:
        case {"image": None | str() as image, "expression": str(expression)}:
            if image is None:
                return None, expression
            image = image.partition(",")[2] if image.startswith("data:") else image
            try:
                return base64.b64decode("".join(image.split()), validate=True), expression
            except ValueError:
                raise ValueError("the image is not in base64; encode the bytes of its file") from None
    raise ValueError('send {"image": an image file in base64, or null, "expression": text} as JSON')


def opened(data):
    """The bytes of an image file -> upright PIL RGB image, and a small one that shows as well whether it is a
    photograph: of 12 megapixels each copy takes as long as the model. Raises ValueError."""
    image = open_image(io.BytesIO(data))
    return image, image.reduce(max(1, max(image.size) // 256))


def serve(port, load, example, expression):
    """Print the page's address and serve it until Ctrl-C; see Server."""
    with Server(port, load, example, expression) as server, suppress(KeyboardInterrupt):
        print(server.address, flush=True)
        print("open it in a browser on this machine; Ctrl-C ends it", file=sys.stderr)
        server.serve_forever()
