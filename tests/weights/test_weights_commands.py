"""python -m hivg.weights fetch, convert and show; the programs with other people's weights."""

import hashlib
import http.server
import re
import threading

import pytest
import torch
from makers import TEXTS, make_tokenizer, raising, refusal
from makers_use import call
from makers_weights import (
    assert_same_weights,
    half,
    make_published_clip,
    make_released,
    save_table,
    to_openai,
    to_released,
)
from PIL import Image

import train
from hivg import Grounder, weights
from hivg.weights import WeightsError, download
from hivg.weights.__main__ import convert, describe, main

# --- fetch ---


class Server(http.server.BaseHTTPRequestHandler):
    """A web server on this machine; its settings are attributes of a subclass."""

    files = {}  # name -> bytes
    limit = None  # of bytes sent, after which the connection ends
    ranges = True  # whether it sends a part when asked for one
    code = None  # of an answer that is always the same
    length = None  # that it says, "" for none
    asked = []  # the ranges asked for so far

    def do_GET(self):
        data = self.files[self.path[1:]]
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        self.send_response(self.code or (416 if start >= len(data) else 206 if start else 200))
        if self.length != "":
            self.send_header("Content-Length", str(len(data) - start) if self.length is None else self.length)
        self.end_headers()
        self.wfile.write(data[start : self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A Server with a model and a merge table, known to `fetch` as ViT-B/16."""
    class ThisServer(Server):
        files = {"model.pt": bytes(range(256)) * 9000, download.TABLE: b"table"}
        asked = []

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ThisServer)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    files = {}
    for name, file in (("ViT-B/16", "model.pt"), ("table", download.TABLE)):
        sha256 = hashlib.sha256(ThisServer.files[file]).hexdigest()
        files[name] = (f"http://127.0.0.1:{web.server_port}/{file}", sha256)
    monkeypatch.setattr(download, "FILES", files)
    yield ThisServer
    web.shutdown()
    web.server_close()


def part_of(file, folder):
    """What is received of a file until it is whole."""
    [sha256] = [sha256 for address, sha256 in download.FILES.values() if address.endswith(file)]
    return folder / f"{file}.{sha256[:16]}.part"


def test_fetch_resumes_and_checks(server, tmp_path):
    folder = tmp_path / "weights"
    server.limit = 1_500_000
    with pytest.raises(ValueError, match="1,500,000 of 2,304,000 bytes"):
        download.fetch("ViT-B/16", folder)
    [part] = folder.iterdir()
    assert part == part_of("model.pt", folder)
    server.limit = None
    paths = download.fetch("ViT-B/16", folder)
    assert [p.read_bytes() for p in paths] == [server.files["model.pt"], b"table"]
    assert server.asked == [None, "bytes=1500000-", None]
    assert download.fetch("ViT-B/16", folder) == paths and len(server.asked) == 3  # nothing is fetched twice
    assert download.fetch("table", folder) == paths[1:]
    assert sorted(folder.iterdir()) == sorted(paths)


def test_fetch_from_a_server_without_ranges(server, tmp_path):
    part_of("model.pt", tmp_path).write_bytes(server.files["model.pt"][:1000])
    server.ranges = False
    assert download.fetch("ViT-B/16", tmp_path)[0].read_bytes() == server.files["model.pt"]
    assert server.asked == ["bytes=1000-", None]  # the whole file was sent once; the other is the merge table


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("wrong", [b"something else", bytes(3_000_000)], ids=len)
def test_fetch_starts_again_after_a_wrong_part(server, tmp_path, wrong, ranges):
    server.ranges = ranges
    part_of("model.pt", tmp_path).write_bytes(wrong)
    assert download.fetch("ViT-B/16", tmp_path)[0].read_bytes() == server.files["model.pt"]


def test_fetch_leaves_the_users_files_alone(server, tmp_path):
    """Such as the .part of a browser."""
    (tmp_path / "model.pt.part").write_bytes(b"mine")
    assert download.fetch("ViT-B/16", tmp_path)[0].read_bytes() == server.files["model.pt"]
    assert (tmp_path / "model.pt.part").read_bytes() == b"mine"


@pytest.mark.parametrize("length", ["", "many", "-5", "9000000"])
def test_fetch_is_not_misled_by_a_length(server, tmp_path, length):
    server.length = length
    assert download.fetch("ViT-B/16", tmp_path)[0].read_bytes() == server.files["model.pt"]


@pytest.mark.parametrize("settings, told", [
    ({"length": "1000"}, "its sha256 differs"), ({"code": 416}, "the server answers 416"),
    ({"code": 500}, "the server answers 500")], ids=str)
def test_fetch_refuses_an_answer_that_cannot_be_right(server, tmp_path, settings, told):
    server.length, server.code = settings.get("length"), settings.get("code")
    message = refusal(download.fetch, "ViT-B/16", tmp_path)
    assert told in message and not list(tmp_path.iterdir())


def test_fetch_refuses_anything_but_the_published_file(server, tmp_path):
    server.files["model.pt"] = b"not it"
    with pytest.raises(ValueError, match="sha256"):
        download.fetch("ViT-B/16", tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(ValueError, match="model.pt: exists, but"):
        download.fetch("ViT-B/16", tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"  # nothing of the user's is lost


def test_fetch_without_network_and_unknown_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there are ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, table"):
        download.fetch("RN50", tmp_path)
    monkeypatch.setattr(download, "FILES", {"table": ("http://127.0.0.1:9/x.gz", "0" * 64)})
    with pytest.raises(ValueError, match="no connection"):
        download.fetch("table", tmp_path)


def test_fetch_where_nothing_can_be_written(server, tmp_path, monkeypatch):
    """Not taken for a failure of the connection."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: cannot be written \(File exists\)"):
        download.fetch("ViT-B/16", tmp_path / "file")
    (tmp_path / "folder").mkdir()
    part_of("model.pt", tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"model.pt.*part: cannot be written \(Is a directory\)"):
        download.fetch("ViT-B/16", tmp_path / "folder")
    full_disk = open("/dev/full", "wb")
    monkeypatch.setattr(download, "open", lambda *_, **__: full_disk, raising=False)
    with pytest.raises(ValueError, match=r"model.pt.*part: cannot be written \(No space left on device\); make room"):
        download.fetch("ViT-B/16", tmp_path)


def test_messages_of_fetch_are_short(monkeypatch, tmp_path):
    monkeypatch.setattr(download.urllib.request, "urlopen", raising(OSError(
        "Temporary failure in name resolution, which is told at great length, and then told once more")))
    for address, sha256 in download.FILES.values():
        message = refusal(download.download, address, sha256, tmp_path / ("long" * 50))
        assert "no connection" in message and len(message) <= 290 and address in message  # whole, to be used


# --- convert, show ---


def test_convert_and_show(tmp_path, monkeypatch, capfd):
    clip = make_published_clip()
    path = tmp_path / "ViT.pt"
    torch.save(half(to_openai(clip)), path)
    save_table(tmp_path / download.TABLE)
    code, _, err = call(main, capfd, monkeypatch, "convert", path, tmp_path / "out.safetensors")
    assert code == 0, err
    ours = weights.load_clip(tmp_path / "out.safetensors")
    assert_same_weights(ours, clip)
    assert ours.tokenizer.merges == make_tokenizer().merges and ours.info == {"source": "OpenAI's CLIP"}
    _, shown, _ = call(main, capfd, monkeypatch, "show", path)
    assert "OpenAI's CLIP" in shown and "patches of 16 px" in shown and "2 heads" in shown
    code, _, err = call(main, capfd, monkeypatch, "convert", path, tmp_path / "out.pt")
    assert code == 2 and re.fullmatch(r"error: .*out.pt: [^\n]+\n", err)


def test_convert_replaces_nothing(tmp_path):
    """Neither its source, nor what else is there."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"theirs")
    (tmp_path / "link.safetensors").symlink_to(path)
    (tmp_path / "lost.safetensors").symlink_to(tmp_path / "nothing")
    for target in ("model", "link", "lost"):
        with pytest.raises(ValueError, match=f"{target}.safetensors: exists; give OUT another name"):
            convert(str(path), str(tmp_path / f"{target}.safetensors"))
    assert path.read_bytes() == b"theirs" and len(list(tmp_path.iterdir())) == 3


def test_show_has_a_blank_after_every_name():
    lines = describe(weights.bundled("hivg-tiny.safetensors")).splitlines()
    [line] = [line for line in lines if line.startswith("score_calibrated_on")]
    assert line.startswith("score_calibrated_on ")


def test_show_of_a_released_checkpoint(tmp_path):
    torch.save(to_released(make_released(text_layers=(6, 12)), adapters=True, dataset="unc+"), tmp_path / "x.pth")
    text = describe(tmp_path / "x.pth")
    for part in ("a released HiVG checkpoint", "(6, 12)", "imagenet", "unc+", "hi_lora_stage': 3"):
        assert part in text, text


# --- the programs ---


def test_released_checkpoint_grounds_and_survives_convert(tmp_path):
    image = Image.new("RGB", (90, 60), "red")
    path = tmp_path / "best_checkpoint.pth"
    torch.save(to_released(make_released(), adapters=True), path)
    with pytest.raises(WeightsError, match="merge table"):
        Grounder.from_pretrained(path)
    save_table(tmp_path / download.TABLE)
    results = Grounder.from_pretrained(path, "cpu").ground(image, TEXTS)
    assert all(result.mask.shape == (60, 90) for result in results)
    loaded = weights.load(path)
    weights.save(tmp_path / "ours.safetensors", loaded, loaded.info)
    again = Grounder.from_pretrained(tmp_path / "ours.safetensors", "cpu").ground(image, TEXTS)
    assert [result.box for result in again] == [result.box for result in results]
    assert len({result.box for result in results}) == len(TEXTS)  # else nothing was compared


def test_training_starts_from_any_clip(tmp_path):
    clip = make_published_clip(vision_layers=6, text_layers=4)
    torch.save(half(to_openai(clip)), tmp_path / "ViT.pt")
    settings = train.Settings(clip=str(tmp_path / "ViT.pt"))
    with pytest.raises(WeightsError, match="merge table"):
        train.begin_stage(settings, 0, tmp_path)
    save_table(tmp_path / download.TABLE)
    model, _ = train.begin_stage(settings, 0, tmp_path)
    assert_same_weights(model.clip, clip)
    assert model.tokenizer.merges == make_tokenizer().merges
