"""The tokenizer against the real CLIP's tokens where they are at hand, and against small cases worked out here."""

import gzip
import json
import pickle

import pytest
import torch
from makers import GOLDEN, refusal

from hivg.clip import end_positions
from hivg.tokenizer import BYTE_TO_CHAR, N_CLIP_MERGES, Tokenizer, clean, learn_merges, merge_pair

TABLE, TOKENS = GOLDEN.parent / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", GOLDEN / "tokens.json"
needs_clip = pytest.mark.skipif(not (TABLE.exists() and TOKENS.exists()), reason="no ../shared with CLIP's tokens here")

MERGES = [("l", "o"), ("lo", "w"), ("low", "e"), ("lo", "w</w>")]
CORPUS = ["the red cup on the left", "the cup left of the red box", "a photo of a giraffe", "the largest giraffe"]
TEXTS = ["the giraffe left of the fence", "it's 10th , isn't it ?", "日本語 の 😀", "café naïve", "!!! ??? ...",
         "</ w >", ""]


@pytest.fixture(scope="module")
def clip():
    return Tokenizer.from_file(TABLE)


@pytest.fixture(scope="module")
def small():
    return Tokenizer(learn_merges(CORPUS, 50))


CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def text_of(tokenizer, ids):
    """The text of token ids, a blank after each word: the bytes that their symbols stand for."""
    symbols = "".join(tokenizer.symbols[i] for i in ids)
    words = [bytes(CHAR_TO_BYTE[char] for char in word).decode() for word in symbols.split("</w>")]
    return " ".join(words).strip()


# --- the real table ---


@needs_clip
def test_golden_tokens(clip):
    for case in json.loads(TOKENS.read_text(encoding="utf-8")):
        assert clip(case["text"])[0].tolist() == case["ids"], case["text"]


@needs_clip
def test_clip_vocabulary(clip):
    assert (clip.vocab_size, clip.sot_id, clip.eot_id) == (49408, 49406, 49407)
    assert Tokenizer.from_text(clip.to_text()).merges == clip.merges  # OpenAI's file has more, ours has not
    assert len(clip.merges) == N_CLIP_MERGES
    for text in TEXTS:
        assert text_of(clip, clip.encode(text)).replace(" ", "") == text.replace(" ", "")


# --- text to ids and back ---


def test_tokens_spell_the_text(small):
    for text in TEXTS:  # "it's" and "10th" are split: compared without blanks
        assert text_of(small, small.encode(text)).replace(" ", "") == text.replace(" ", "")
    for text in CORPUS + ["日本語 の 😀"]:
        assert text_of(small, small.encode(text)) == text


def test_every_byte_has_a_printable_character():
    """Its own where it has one, and no two share one; none is a blank, which parts the symbols in a table's file."""
    assert sorted(BYTE_TO_CHAR) == list(range(256)) and len(set(BYTE_TO_CHAR.values())) == 256
    assert list(BYTE_TO_CHAR)[0] == 33
    for byte, char in BYTE_TO_CHAR.items():
        assert char.isprintable() and not char.isspace()
        assert char == chr(byte) or ord(char) >= 256


def test_merge_pair():
    assert merge_pair(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")  # from the left
    assert merge_pair(("b", "a", "b", "a"), ("b", "a")) == ("ba", "ba")
    assert merge_pair(("a",), ("a", "a")) == ("a",)


def test_vocabulary_layout():
    tokenizer = Tokenizer(MERGES)
    assert tokenizer.vocab_size == 256 + 256 + len(MERGES) + 2
    assert (tokenizer.sot_id, tokenizer.eot_id) == (516, 517)
    assert 256 + 256 + N_CLIP_MERGES + 2 == 49408  # CLIP's
    # "!" is byte 33, the first printable one; a word's last symbol is the same one 256 further on.
    assert tokenizer.encode("!") == [256] and tokenizer.encode("!?") == [0, 256 + ord("?") - 33]


def test_merges_apply_by_rank():
    tokenizer = Tokenizer(MERGES)
    assert [tokenizer.symbols[i] for i in tokenizer.encode("lowest low")] == ["lowe", "s", "t</w>", "low</w>"]
    # "w e" ranks first here, so "lo" never meets a "w" in "lowe"
    tokenizer = Tokenizer([("w", "e"), ("l", "o"), ("lo", "w")])
    assert [tokenizer.symbols[i] for i in tokenizer.encode("lowest")] == ["lo", "we", "s", "t</w>"]


@pytest.mark.parametrize("raw, cleaned", [
    ("  multiple   spaces\tand\nnewlines ", "multiple spaces and newlines"), ("UPPER MiXeD", "upper mixed"),
    ("a &amp; b &amp;lt;c&gt;", "a & b <c>"), ("giraffe’s", "giraffe's"), ("left\u3000of\xa0it", "left of it"),
    ("a < b &amp;gt; c", "a < b > c"),  # of a text with "<" ftfy leaves the entities alone
    ("â€œmojibakeâ€\x9d", '"mojibake"'), ("\ud800", "\ufffd")])  # half a surrogate pair, which has no UTF-8
def test_clean(small, raw, cleaned):
    assert clean(raw) == cleaned
    assert small.encode(raw) == small.encode(cleaned)


@pytest.mark.parametrize("text, words", [
    ("The  red-star,\tplease! ", ["The", "red-star,", "please!"]),
    ("a&nbsp;b red", ["a", "b", "red"]),
    ("caf\u00c3\u00a9 <|endoftext|> 3rd", ["caf\u00c3\u00a9", "<|endoftext|>", "3rd"]),
    ("red\u200bstar &amp;amp;amp;lt; x", ["red\u200bstar", "&amp;amp;amp;lt;", "x"]),
])
def test_tokens_by_word(small, text, words):
    counts = small.count_by_word(text)
    assert [word for word, _ in counts] == words
    assert sum(count for _, count in counts) == len(small.encode(text))


def test_special_tokens_in_text(small):
    ids = small.encode("a <|startoftext|> b <|endoftext|>")
    assert ids == [*small.encode("a"), small.sot_id, *small.encode("b"), small.eot_id]


def test_pickles_for_data_loader_workers(small):
    assert pickle.loads(pickle.dumps(small)).encode(CORPUS[0]) == small.encode(CORPUS[0])


# --- batches ---


def test_batch_shapes_and_padding(small):
    texts = ["cup", "the red cup on the left"]
    token_ids = small(texts)
    longest = 2 + len(small.encode(texts[1]))
    assert token_ids.shape == (2, longest) and token_ids.dtype == torch.long
    for row, text in zip(token_ids, texts):
        ids = [small.sot_id, *small.encode(text), small.eot_id]
        assert row.tolist() == ids + [0] * (longest - len(ids))
    assert torch.equal(small(texts[1]), token_ids[1:])  # a string is a batch of one


@pytest.mark.parametrize("text", ["", "   \t\n", "\x00"])
def test_blank_text(small, text):
    assert small(text).tolist() == [[small.sot_id, small.eot_id]]


def test_truncation(small):
    text = "word " * 400
    row, ids = small(text)[0].tolist(), small.encode(text)
    assert len(ids) > 400 and row == [small.sot_id, *ids[:75], small.eot_id]
    assert Tokenizer(small.merges, context_length=5)(text)[0].tolist() == [small.sot_id, *ids[:3], small.eot_id]
    assert Tokenizer(small.merges, context_length=2)(text)[0].tolist() == [small.sot_id, small.eot_id]
    exact = "! " * 75  # one token a word: fits, with nothing to spare
    assert small(exact)[0].tolist() == [small.sot_id, *small.encode(exact), small.eot_id]


def test_exclamation_mark_is_not_padding(small):
    texts = ["!?", "red !?!? cup", ""]
    token_ids = small(texts)
    assert token_ids[0, 1] == 0  # a real token with id 0
    assert end_positions(token_ids).tolist() == [1 + len(small.encode(text)) for text in texts]


def test_context_length_without_room_for_start_and_end(tmp_path):
    for length in (1, 0):
        with pytest.raises(ValueError, match="at least 2"):
            Tokenizer([], length)
    with pytest.raises(ValueError, match="at least 2"):  # it is not the file's fault
        Tokenizer.from_file(tmp_path / "missing.txt", length)


# --- learning ---


def test_learner_on_paper():
    # low</w>, lower</w>, lowest</w>: "l o" occurs 3 times. Then "lo w" and "w e" twice each, and "lo w" sorts first.
    # Then "low e" twice. Then "lowe r</w>", "lowe s", "s t</w>" and "lo w</w>" once each: nothing left to learn.
    assert learn_merges(["low lower lowest"], 10) == [("l", "o"), ("lo", "w"), ("low", "e")]
    assert learn_merges(["low lower lowest"], 2) == [("l", "o"), ("lo", "w")]


def test_learner_counts_words_not_kinds_of_words():
    assert learn_merges(["xy", "xy", "ab ab", "ab"], 2) == [("a", "b</w>"), ("x", "y</w>")]


def test_learner_edges():
    assert learn_merges([], 5) == learn_merges(["", "  "], 5) == learn_merges(["a b a b"], 5) == []
    assert learn_merges(CORPUS, 0) == []
    assert learn_merges(CORPUS, 20) == learn_merges(CORPUS[::-1], 20) == learn_merges(CORPUS, 40)[:20]
    assert learn_merges(["<|endoftext|> <|endoftext|>"], 5) == []
    unicode = Tokenizer(learn_merges(["日本語 日本語 日本語"], 20))
    assert len(unicode.encode("日本語")) == 1 and text_of(unicode, unicode.encode("日本語")) == "日本語"


# --- files ---

LINES = "\n".join(" ".join(pair) for pair in MERGES) + "\n"
FORMATS = {
    "bpe_simple_vocab_16e6.txt.gz": gzip.compress(('"bpe_simple_vocab_16e6.txt#version: 0.2\n' + LINES).encode()),
    "merges.txt": ("#version: 0.2\n" + LINES).encode(),
    "windows.txt": ("#version: 0.2\n" + LINES).replace("\n", "\r\n").encode(),
    "no_header.txt": LINES.encode(),
    "gzip_without_its_suffix": gzip.compress(LINES.encode()),
    "tokenizer.json": json.dumps({"model": {"end_of_word_suffix": "</w>", "merges": LINES.splitlines()}}).encode(),
    "pairs.json": json.dumps({"model": {"merges": MERGES}}).encode(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_file_formats(tmp_path, monkeypatch, name):
    """All merges, or as many as CLIP has: OpenAI's file holds five times as many."""
    (tmp_path / name).write_bytes(FORMATS[name])
    tokenizer = Tokenizer.from_file(tmp_path / name, context_length=9)
    assert tokenizer.merges == MERGES and tokenizer.context_length == 9
    monkeypatch.setattr("hivg.tokenizer.N_CLIP_MERGES", 2)
    assert Tokenizer.from_file(tmp_path / name).merges == MERGES[:2]


def test_text_survives_json_metadata(small):
    for tokenizer in (small, Tokenizer([]), Tokenizer(learn_merges(["日本語 日本語 é é"], 20))):
        text = json.loads(json.dumps({"merges": tokenizer.to_text()}))["merges"]
        assert Tokenizer.from_text(text).merges == tokenizer.merges


MALFORMED = {  # name: (content, None for a file that is not there; part of the message)
    "missing.txt": (None, "No such file"), ".": (None, ""),  # the folder itself
    "empty.txt": (b"", "not two symbols"),
    "prose.txt": (b"The quick brown fox\n", "merge 1 ('The quick brown fox') is not two symbols"),
    "words.txt": (b"#version: 0.2\nl o\nhello world\n", "merge 2 ('hello world') joins symbols"),
    "order.txt": (b"lo w\nl o\n", "merge 1 ('lo w') joins symbols"),
    "over_the_end.txt": (b"l o</w>\nlo</w> w\n", "merge 2 ('lo</w> w') joins symbols"),
    "twice.txt": (b"l o\nl o\n", "merge 1 ('l o') is repeated"),
    "gap.txt": (b"l o\n\nlo w\n", "merge 2 ('') is not two symbols"),
    "gpt2.txt": ("#version: 0.2\nĠ t\n".encode(), "merge 1 ('Ġ t') joins symbols"),
    "weights.safetensors": (b"\x80\xff\x00\x01", "not a text file"),
    "cut.txt.gz": (gzip.compress(LINES.encode())[:-12], "damaged or cut short"),
    "broken.txt.gz": (b"\x1f\x8b" + b"nonsense, not deflated", "not a merge table: Unknown compression method"),
    "cut.json": (FORMATS["pairs.json"][:20], "not valid JSON"),
    "vocab.json": (b'{"a": 0}', "no list of merges under model.merges"),
    "list.json": (b"[1, 2]", "no list of merges under model.merges"),
    "numbers.json": (b'{"model": {"merges": [["l", "o"], [1, 2]]}}', "merge 2 ([1, 2]) is not two symbols"),
    "deep.json": (b"[" * 100_000, "not valid JSON"),
    "null.json": (b'{"model": {"merges": [null]}}', "merge 1 (None) is not two symbols"),
    "gpt2.json": (b'{"model": {"end_of_word_suffix": "", "merges": []}}', "not '</w>'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_get_one_line(tmp_path, name):
    content, problem = MALFORMED[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = refusal(Tokenizer.from_file, path)
    assert message.startswith(f"{path}: ") and problem in message and "merges.txt or tokenizer.json" in message
