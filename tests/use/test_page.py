"""The interactive page over HTTP, as a command, and in a browser where there is one."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock, Thread

import numpy as np
import pytest
from makers import ROOT
from makers_use import TEXTS, assert_fails, call, huge_png, make_image
from PIL import Image

from hivg import __main__ as ground
from hivg.page import MOST, PAGE, Server


@pytest.fixture(scope="module")
def server(grounder, image, tmp_path_factory):
    example = tmp_path_factory.mktemp("page") / "example.png"
    image.save(example)
    with Server(0, lambda: grounder, example, TEXTS[0]) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method="GET", path="/", body=None, **headers):
    """-> (status, headers, the body as bytes). A header of None is left out."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    own = {"Host": f"127.0.0.1:{port}"} | ({} if body is None else {"Content_Length": len(body)})
    for name, value in (own | headers).items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), str(value).replace("PORT", str(port)))
    connection.endheaders(body)
    reply = connection.getresponse()
    with reply:
        return reply.status, reply.headers, reply.read()


def encoded(data):
    return base64.b64encode(data).decode()


def png_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def grounded(server, image, expression):
    """-> (status, the answer)."""
    body = json.dumps({"image": image and encoded(image), "expression": expression}).encode()
    status, _, answer = ask(server, "POST", "/ground", body)
    return status, json.loads(answer)


# --- answers ---


@pytest.mark.parametrize("turned", [None, False, True], ids=["example", "image", "turned"])
def test_the_answer_is_the_grounders(server, grounder, image, turned):
    shown = image.rotate(90, expand=True) if turned else image
    status, answer = grounded(server, None if turned is None else png_of(shown), TEXTS[2])
    result = grounder.ground(shown, TEXTS[2], attention=True)
    assert status == 200 and (answer["width"], answer["height"]) == shown.size
    assert answer["box"] == list(result.box) and answer["score"] == result.score
    assert answer["warnings"] == grounder.warnings(TEXTS[2], shown) and answer["milliseconds"] > 0
    np.testing.assert_allclose(answer["token_map"], result.token_map[result.patches], atol=1e-6)
    np.testing.assert_allclose(answer["attention"], result.attention_map[result.patches], atol=1e-6)
    assert [word["text"] for word in answer["words"]] == TEXTS[2].split()
    for word, expected in zip(answer["words"], result.words):
        assert list(word["bridges"]) == [str(block) for block in expected.bridges]
        for block, share in expected.bridges.items():
            np.testing.assert_allclose(word["bridges"][str(block)], share, atol=1e-6)


def test_a_score_that_is_no_probability_is_called_uncalibrated(server, grounder, monkeypatch, tmp_path):
    assert grounder.calibration is None and b"Uncalibrated score" in ask(server)[2]
    monkeypatch.setattr(grounder, "calibration", (1.0, 0.0))
    make_image().save(tmp_path / "a.png")
    with Server(0, lambda: grounder, tmp_path / "a.png", TEXTS[0]) as other:
        assert b"&quot;Score&quot;" in other.page


def test_several_tabs_at_once(server, image, monkeypatch):
    """Each gets its own answer, one forward pass at a time, also while another connection says nothing."""
    forward = server.grounder.ground
    under_way = Lock()

    def alone(*args, **options):
        assert under_way.acquire(blocking=False)
        time.sleep(0.01)
        result = forward(*args, **options)
        under_way.release()
        return result

    monkeypatch.setattr(server.grounder, "ground", alone)
    shapes = [(40 + 10 * i, 60) for i in range(4)]
    with socket.create_connection(server.server_address), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda size: grounded(server, png_of(image.resize(size)), "star"), shapes * 2))
    assert [(answer["width"], answer["height"]) for _, answer in answers] == shapes * 2


def test_a_scene_fits_its_expression(server):
    scenes = [json.loads(ask(server, path="/scene")[2]) for _ in range(2)]
    assert scenes[0] != scenes[1]
    for scene in scenes:
        image = base64.b64decode(scene["image"])
        assert Image.open(io.BytesIO(image)).format == "PNG"
        assert grounded(server, image, scene["expression"])[0] == 200


def test_the_page_fetches_nothing_from_elsewhere(server, image):
    status, headers, page = ask(server)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and TEXTS[0] in page.decode()
    assert set(re.findall(r"\w+://[^'\"\s)]*", PAGE)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    markup, _, _ = PAGE.partition("<script>")
    assert not re.search(r"\b(src|href|action)\s*=\s*[\"']?+(?!data:)|@import|url\(", markup)
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    sources = " ".join(policy.values()).split()
    assert all(re.fullmatch(r"'(self|none|sha256-\S+)'|data:", source) for source in sources)
    assert ask(server, path="/example.png")[2] == png_of(image)


# --- refusals ---


def text_of(**changes):
    return json.dumps({"image": None, "expression": "star"} | changes).encode()


@pytest.mark.parametrize("host, origin, status", [
    ("127.0.0.1:PORT", None, 200), ("localhost:PORT", "http://localhost:PORT", 200),
    ("LOCALHOST:PORT", "http://127.0.0.1:PORT", 200),
    (None, None, 403), ("evil.example:PORT", None, 403), ("127.0.0.1", None, 403), ("localhost:1", None, 403),
    ("127.0.0.1:PORT", "http://evil.example", 403), ("127.0.0.1:PORT", "null", 403),
    ("127.0.0.1:PORT", "http://localhost:1", 403), ("127.0.0.1:PORT", "https://127.0.0.1:PORT", 403),
])
def test_only_the_page_itself_is_answered(server, host, origin, status):
    for request in (("GET", "/"), ("GET", "/scene"), ("POST", "/ground", text_of())):
        code, _, body = ask(server, *request, Host=host, Origin=origin)
        assert code == status and (code == 200 or f"{server.address}; a tunnel must keep the port" in body.decode())


def test_base64_as_other_programs_write_it(server, image):
    """With the kind before it, as a browser's data: address has it, and in lines."""
    text = encoded(png_of(image))
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    answers = [json.loads(ask(server, "POST", "/ground", text_of(image=i))[2])
               for i in (text, "data:image/png;base64," + text, lines)]
    assert answers[0]["box"] == answers[1]["box"] == answers[2]["box"]


@pytest.mark.parametrize("body, word", [
    (b"", "JSON"), (b"{", "JSON"), (b"\xff", "JSON"), (b"[" * 100_000, "JSON"), (b"[]", "JSON"), (b"{}", "JSON"),
    (text_of(expression=3), "JSON"), (text_of(image=[1]), "JSON"), (text_of(image="*"), "encode the bytes"),
    (text_of(image=""), "not an image"), (text_of(image=encoded(b"only words")), "the image: not an image"),
    (text_of(image=encoded(huge_png())), "megapixels"), (text_of(expression=" "), "empty"),
])
def test_bad_input_gets_one_line(server, body, word):
    status, _, answer = ask(server, "POST", "/ground", body)
    assert status == 400 and list(json.loads(answer)) == ["error"]
    error = json.loads(answer)["error"]
    assert word in error and "\n" not in error and len(error) <= 300


@pytest.mark.parametrize("length, status", [(None, 411), ("-1", 400), ("many", 400), (MOST + 1, 413), (10**17, 413)])
def test_the_length_is_checked_before_the_body_is_read(server, length, status):
    """No byte of it is sent."""
    got, _, answer = ask(server, "POST", "/ground", Content_Length=length)
    assert got == status and "error" in json.loads(answer)


def test_a_body_too_large_is_answered_while_it_is_sent(server):
    status, _, answer = ask(server, "POST", "/ground", b" " * (MOST + 1))
    assert status == 413 and "20 MB" in json.loads(answer)["error"]
    assert ask(server, path="/nothing")[0] == ask(server, "POST", "/", b"")[0] == 404


# --- the command ---


def test_a_used_port(server):
    with pytest.raises(ValueError, match=f"^port {server.server_address[1]} cannot be used .*--port"):
        Server(server.server_address[1], None, None, None)


@pytest.mark.parametrize("args, word", [
    (["--page", "a.png", "-e", "star"], "--expression, IMAGE"), (["--page", "--json"], "--json"),
    (["--page", "--output", "x.png"], "--output"), (["--page", "--heatmap"], "--heatmap"),
    (["--page", "--port", "70000"], "65535"), (["--page", "--port", "-1"], "65535"), (["--port", "0"], "--page"),
])
def test_flags_that_do_not_go_together(capfd, monkeypatch, args, word):
    assert_fails(call(ground.main, capfd, monkeypatch, *args), word)


@pytest.mark.slow
def test_the_command(weights_file):
    """Its first line is the address; Ctrl-C ends it at once, a browser's open connection or not."""
    command = [sys.executable, ROOT / "ground.py", "--page", "--port", "0", "--weights", weights_file]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # a shell's background jobs, such as these tests may be, ignore Ctrl-C
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **streams, preexec_fn=heed) as program:
        address = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", program.stdout.readline())
        with socket.create_connection(("127.0.0.1", int(address[1]))) as connection:
            asking = http.client.HTTPConnection(*connection.getpeername())
            asking.request("GET", "/")
            assert asking.getresponse().status == 200
            connection.sendall(b"POST /ground HTTP/1.1\r\n")
            start = time.monotonic()
            program.send_signal(signal.SIGINT)
            out, err = program.communicate(timeout=20)
    assert time.monotonic() - start < 2
    assert (program.returncode, out) == (0, "") and err.count("\n") == 1 and "Traceback" not in err


# --- in a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A page of a headless Chromium, by its remote debugging protocol over pipes: JSON messages that end in a zero."""

    def __init__(self, folder):
        down, self.to = os.pipe()
        self.back, up = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        # it reads from file 3 and writes to file 4
        code = f"import os, sys; os.dup2({down}, 3); os.dup2({up}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen([sys.executable, "-c", code, CHROMIUM, *flags],
                                        pass_fds=(down, up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(down)
        os.close(up)
        self.reader = open(self.back, "rb", buffering=0)
        self.session = {}
        self.number = 0
        self.problems = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """-> the result of a command. What the browser complains about meanwhile is kept in `problems`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            text = bytearray()
            while not text.endswith(b"\0"):
                text += self.reader.read(1) or pytest.fail("the browser ended")
            message = json.loads(text[:-1])
            if message.get("id") == self.number:
                return message["result"]
            if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.problems.append(message["params"])

    def run(self, code):
        """-> the value of JavaScript, or of the promise that it is."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, code):
        """-> the value of JavaScript, once it is true."""
        end = time.monotonic() + 20
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"never: {code}"
            time.sleep(0.05)
        return value

    def drop(self, data):
        self.run(f"""{{
            const bytes = Uint8Array.from(atob('{encoded(data)}'), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], 'dropped'));
            dispatchEvent(new DragEvent('drop', {{dataTransfer, cancelable: true}}));
        }}""")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        self.reader.close()
        os.close(self.to)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM or os.name == "nt", reason="no Chromium here")
def test_in_a_browser(server, grounder, image, tmp_path):
    """Someone types, drops an image, goes over words and patches with the keyboard: boxes, and no error."""
    browser = Browser(tmp_path)
    says = "document.querySelector('#status').textContent"
    try:
        browser.call("Page.navigate", url=server.address)
        box = "(f => f && [f.style.left, f.style.top].join())(document.querySelector('#image .frame'))"
        first = browser.wait(box)

        browser.run("expression.focus(); expression.select()")
        browser.call("Input.insertText", text=TEXTS[1])
        score = f"Uncalibrated score {grounder.ground(image, TEXTS[1]).score:.2f}"
        browser.wait(f"document.querySelector('.word')?.textContent === 'star' && {box} !== '{first}'")
        assert score in browser.run(says)

        dropped = image.rotate(90, expand=True)
        browser.drop(png_of(dropped))
        browser.wait(says + f".includes('{dropped.width}\u00a0×\u00a0{dropped.height}')")
        browser.wait("document.querySelector('#image img').naturalHeight === 200")

        browser.run("document.querySelector('#image').focus()")
        for key in ("ArrowDown", "ArrowRight"):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert browser.run("document.querySelectorAll('.patch').length") == 5  # on the image, two maps and two bridges'
        assert "Row" in browser.run("document.querySelector('#spoken').textContent")

        browser.run("document.querySelector('.word').focus()")
        assert "block 1" in browser.run("document.querySelector('#spoken').textContent")

        browser.run("expression.value = ' '; expression.dispatchEvent(new Event('input'))")
        browser.wait(says + ".startsWith('Say in words')")
        browser.run("draw.click()")
        browser.wait(says + ".startsWith('Uncalibrated score')")

        # the first answer comes last
        browser.run("""const fetched = fetch; let late = 300; fetch = async (address, {signal, ...request}) => {
            const wait = late; late = 0;
            const reply = await fetched(address, request);
            await new Promise((done) => setTimeout(done, wait));
            return reply;
        }""")
        browser.run("expression.value = 'late'; ask(); expression.value = 'early'; ask()")
        browser.run("new Promise((done) => setTimeout(done, 600))")
        assert browser.run("document.querySelector('.word').textContent") == "early"
        assert not browser.problems

        browser.drop(b"only words")
        browser.wait(says + ".includes('not an image')")
        browser.run("expression.value = 'star'; ask()")  # about the image before
        browser.wait(says + ".startsWith('Uncalibrated score')")
    finally:
        browser.close()
