"""CLIP's tokenizer: byte-pair encoding over the UTF-8 bytes of cleaned, lower-cased text.

A word is written as one printable character per byte, the last one marked with `</w>`; then the merge that
stands first in a ranked table is applied, again and again, until none applies. What remains are the tokens:

    "lowest"  ->  l o w e s t</w>  ->  lo w e s t</w>  ->  low e s t</w>  ->  lowe s t</w>

Sources: Sennrich, Haddow, Birch 2016 (arXiv 1508.07909) for the algorithm; OpenAI CLIP's `simple_tokenizer.py`
for the cleaning, the word pattern and the order of the vocabulary, which fixes the ids.
"""

import gzip
import html
import json
import zlib
from collections import Counter
from pathlib import Path

import ftfy
import regex
import torch

SOT, EOT = "<|startoftext|>", "<|endoftext|>"
END = "</w>"  # marks the last symbol of a word
HEADER = "#version: 0.2"  # as in Hugging Face's merges.txt, so that our tables are such files
N_CLIP_MERGES = 49152 - 256 - 2  # OpenAI's file goes on after these, but CLIP was trained with no more
MEND = "give CLIP's bpe_simple_vocab_16e6.txt.gz, or the merges.txt or tokenizer.json of a Hugging Face CLIP"

WORD_PATTERN = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def bytes_to_unicode():
    """One printable character for each of the 256 bytes: {byte: character}, in CLIP's order (byte 33, "!", first)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]  # blanks and controls borrow the characters from 256 on
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTE_TO_CHAR = bytes_to_unicode()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def clean(text):
    """Mends mojibake, resolves HTML entities (twice, for "&amp;lt;"), makes every run of blanks one, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


def split_words(text):
    """Cleaned text in CLIP's words: contractions, runs of letters, single digits, runs of anything else."""
    return WORD_PATTERN.findall(clean(text))


def word_symbols(word):
    """The symbols a word starts as: "low" -> ("l", "o", "w</w>")."""
    chars = [BYTE_TO_CHAR[b] for b in word.encode("utf-8")]
    return (*chars[:-1], chars[-1] + END)


def merge_pair(symbols, pair):
    """Joins every occurrence of `pair`, from the left: ("l", "o", "w</w>"), ("l", "o") -> ("lo", "w</w>")."""
    merged, i = [], 0
    while i < len(symbols):
        step = 2 if symbols[i : i + 2] == pair else 1
        merged.append("".join(symbols[i : i + step]))
        i += step
    return tuple(merged)


def learn_merges(texts, n_merges):
    """Learns a merge table: the most frequent pair of neighbours becomes one symbol, `n_merges` times over.

    Ties go to the pair that sorts first, so the same texts always give the same table. Stops early once no pair
    occurs twice. It recounts everything for each merge: right for a few hundred merges and a small corpus.

    Returns: list of (left, right) in rank order, for `Tokenizer(merges)`.
    Source: Sennrich et al. 2016, algorithm 1.
    """
    words = Counter(word_symbols(w) for text in texts for w in split_words(text) if w not in (SOT, EOT))
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for symbols, count in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        merged = Counter()
        for symbols, count in words.items():
            merged[merge_pair(symbols, best)] += count
        words = merged
    return merges


def parse_merges(lines):
    """Merges from "left right" strings or (left, right) pairs; ValueError names the first that is neither."""
    merges = []
    for i, line in enumerate(lines, start=1):
        pair = tuple(line.split()) if isinstance(line, str) else tuple(line) if isinstance(line, list) else ()
        if len(pair) != 2 or not all(isinstance(s, str) and s for s in pair):
            raise ValueError(f"merge {i} ({line!r:.60}) is not two symbols")
        merges.append(pair)
    return merges


def merges_from_json(text):
    """The merges of a Hugging Face tokenizer.json; ValueError where there are none or they are not CLIP's kind."""
    data = json.loads(text)
    model = data.get("model") if isinstance(data, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list):
        raise ValueError("no list of merges under model.merges")
    if model.get("end_of_word_suffix") not in (None, END):
        raise ValueError(f"words end in {model['end_of_word_suffix']!r:.60}, not {END!r}, so it is not CLIP's")
    return parse_merges(merges)


def read_text(path):
    """The text of a plain or gzipped file; the content says which it is, as downloads lose their suffixes."""
    data = path.read_bytes()
    return (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8")


class Tokenizer:
    """Text to CLIP's token ids and back.

    The vocabulary is the 256 byte symbols, the same 256 ending a word, one symbol per merge, then the start and
    the end token. The end token has the largest id: CLIP finds it as the argmax of a row.

    Args:
        merges: list of (left, right) in rank order.
        context_length: the most tokens in a row, start and end included; 77 in CLIP.

    Raises ValueError for a table that cannot be CLIP's kind: a repeated merge, or one of a symbol that is neither
    a byte nor made by an earlier merge.
    """

    def __init__(self, merges, context_length=77):
        merges, chars = [tuple(pair) for pair in merges], list(BYTE_TO_CHAR.values())
        self.symbols = chars + [c + END for c in chars] + ["".join(pair) for pair in merges] + [SOT, EOT]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.merges = merges
        self.context_length = check_context_length(context_length)
        self.vocab_size = len(self.symbols)
        self.sot_id, self.eot_id = self.vocab_size - 2, self.vocab_size - 1
        self._cache = {}  # word -> ids; expressions repeat their words
        self._check_merges()

    def _check_merges(self):
        # A blank is never part of a word, so a merge of one betrays a GPT-2 table, which would otherwise load.
        blank = BYTE_TO_CHAR[ord(" ")]
        known = set(self.symbols[:512]) - {blank, blank + END}
        for i, pair in enumerate(self.merges, start=1):
            left, right = pair
            if left not in known or right not in known or left.endswith(END):
                raise ValueError(f"merge {i} ({left + ' ' + right!r:.60}) joins symbols that nothing before it makes")
            if self.ranks[pair] != i - 1:
                raise ValueError(f"merge {i} ({left + ' ' + right!r:.60}) is repeated further down")
            known.add(left + right)

    @classmethod
    def from_file(cls, path, context_length=77):
        """Reads OpenAI's bpe_simple_vocab_16e6.txt.gz, merges.txt, tokenizer.json (by that suffix), or `to_text()`.

        Each may be gzipped. Raises ValueError, one line with the file and the mend, for anything else.
        """
        path = Path(path)
        check_context_length(context_length)  # outside the try: it is not the file's fault
        try:
            text = read_text(path)
            if ".json" in path.suffixes:
                return cls(merges_from_json(text)[:N_CLIP_MERGES], context_length)
            return cls.from_text(text, context_length)
        except OSError as error:  # also a broken gzip header
            problem = error.strerror or str(error)
        except (EOFError, zlib.error):
            problem = "the gzip data is damaged or cut short"
        except UnicodeDecodeError:
            problem = "not a text file"
        except (json.JSONDecodeError, RecursionError) as error:  # the latter: brackets nested by the thousand
            problem = f"not valid JSON ({error})"
        except ValueError as error:
            problem = str(error)
        raise ValueError(f"{path}: no merge table read: {problem}; {MEND}")

    @classmethod
    def from_text(cls, text, context_length=77):
        """The tokenizer of a merge table, one "left right" per line under an optional "#version" header line."""
        lines = text.removesuffix("\n").split("\n")
        if "#version" in lines[0]:
            lines = lines[1:]
        return cls(parse_merges(lines[:N_CLIP_MERGES]), context_length)

    def to_text(self):
        """The merge table as text, read back exactly by `from_text`; a weights file carries it in its metadata."""
        return "\n".join([HEADER, *(f"{left} {right}" for left, right in self.merges)]) + "\n"

    def _word_ids(self, word):
        if word in (SOT, EOT):
            return [self.ids[word]]
        if word not in self._cache:
            symbols = word_symbols(word)
            while True:
                pair = min(zip(symbols, symbols[1:]), key=lambda p: self.ranks.get(p, len(self.ranks)), default=None)
                if pair not in self.ranks:
                    break
                symbols = merge_pair(symbols, pair)
            self._cache[word] = [self.ids[s] for s in symbols]
        return self._cache[word]

    def encode(self, text):
        """Token ids of any text, without start and end token and not truncated: list of ints.

        As in CLIP, "<|startoftext|>" and "<|endoftext|>" written out in the text become those tokens.
        """
        return [i for word in split_words(text) for i in self._word_ids(word)]

    def decode(self, ids):
        """The cleaned text of token ids (any iterable, or a 1-d tensor), a blank after each word.

        A start token is dropped and reading stops at the end token, so a padded row gives its text alone. A token
        cut out of the middle of a character gives U+FFFD.
        """
        data = bytearray()
        for i in ids:
            symbol = self.symbols[int(i)]
            if symbol == EOT:
                break
            if symbol != SOT:
                data += bytes(CHAR_TO_BYTE[c] for c in symbol.removesuffix(END))
                data += b" " if symbol.endswith(END) else b""
        return data.decode("utf-8", errors="replace").strip()

    def __call__(self, texts, context_length=None, pad_to="longest"):
        """Token ids of a batch: start token, text, end token, then zeros.

        Args:
            texts: a string or a list of B strings. A blank one gives start and end token alone.
            context_length: the most tokens in a row, the tokenizer's own by default. What is longer is cut, and its
                last kept token becomes the end token, as with `truncate=True` in CLIP.
            pad_to: "longest" makes the rows as long as the longest of the batch, "context" as `context_length`.

        Returns: (B, T) int64. Zero is also the id of "!": ask `padding_after_end`, not the ids, what is padding.
        """
        length = check_context_length(self.context_length if context_length is None else context_length)
        if pad_to not in ("longest", "context"):
            raise ValueError(f'pad_to must be "longest" or "context", not {pad_to!r}')
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.sot_id, *self.encode(text)[: length - 2], self.eot_id] for text in texts]
        T = length if pad_to == "context" else max(map(len, rows), default=2)
        token_ids = torch.zeros(len(rows), T, dtype=torch.long)
        for out, row in zip(token_ids, rows):
            out[: len(row)] = torch.tensor(row)
        return token_ids


def check_context_length(length):
    if length < 2:
        raise ValueError(f"context_length must hold the start and the end token, so at least 2, not {length}")
    return length


def end_positions(token_ids):
    """Where each row ends: token_ids (B, T) -> (B,) int64, the first position of the row's largest id, as in CLIP."""
    return token_ids.argmax(dim=-1)


def padding_after_end(token_ids, eot_id=None):
    """What follows the end token: token_ids (B, T) -> (B, T) bool, True = padding.

    The end token is the row's largest id, or `eot_id` where given (a row without it has no padding). The id 0 says
    nothing: it fills the padding, but it is a real token too, "!" inside a word.
    """
    is_end = token_ids == (token_ids.amax(dim=-1, keepdim=True) if eot_id is None else eot_id)  # (B, T)
    return is_end.cumsum(dim=-1) - is_end.long() > 0  # an end token stands somewhere before this position
