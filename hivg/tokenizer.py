"""CLIP's tokenizer: byte-pair encoding over the UTF-8 bytes of cleaned, lower-cased text.

A word is spelled as one printable character per byte, the last one marked with `</w>`. Then the merge that comes
first in a ranked table is applied, again and again, until none applies. The remaining symbols are the tokens:

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

from hivg.utils.messages import quoted, shown

SOT = "<|startoftext|>"
EOT = "<|endoftext|>"
END = "</w>"  # marks the last symbol of a word
HEADER = "#version: 0.2"  # as in Hugging Face's merges.txt, so that our tables are such files
MAX_BYTES = 16 * 2**20  # of a merge table; the largest of CLIP's, its tokenizer.json, has about 4 MB
N_CLIP_MERGES = 49152 - 256 - 2  # OpenAI's file has more lines, but CLIP was trained with only these
ACCEPTED_FILES = "CLIP's bpe_simple_vocab_16e6.txt.gz, or the merges.txt or tokenizer.json of a Hugging Face CLIP"

# start and end token spelled out, English contractions, runs of letters, single digits, runs of anything else
WORD_PATTERN = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def bytes_to_unicode():
    """One printable character for each of the 256 bytes: {byte: character}, in CLIP's order (byte 33, "!", first)."""
    # the printable characters of Latin-1 stand for themselves
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    # spaces and control characters, which a text file could not hold, borrow the characters from 256 on
    others = [byte for byte in range(256) if byte not in printable]
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTE_TO_CHAR = bytes_to_unicode()


def clean(text):
    """Text repaired, without HTML entities, in lower case, each run of whitespace a single space."""
    text = ftfy.fix_text(text)  # mojibake; curly quotes and full-width letters become plain
    text = html.unescape(html.unescape(text))  # twice, for "&amp;lt;", as CLIP does
    return regex.sub(r"\s+", " ", text).strip().lower()


def split_words(text):
    """Text -> its cleaned words, a list of strings."""
    return WORD_PATTERN.findall(clean(text))


def word_symbols(word):
    """The symbols that a word starts as: "low" -> ("l", "o", "w</w>")."""
    # bytes, not characters, so that 256 symbols spell any text
    chars = [BYTE_TO_CHAR[byte] for byte in word.encode("utf-8")]
    return (*chars[:-1], chars[-1] + END)


def merge_pair(symbols, pair):
    """Join every occurrence of `pair`, from the left: ("l", "o", "w</w>"), ("l", "o") -> ("lo", "w</w>")."""
    merged = []
    i = 0
    while i < len(symbols):
        step = 2 if symbols[i : i + 2] == pair else 1
        merged.append("".join(symbols[i : i + step]))
        i += step
    return tuple(merged)


def merge_words(words, pair):
    """{symbols of a word: how often it occurs} with a pair of neighbours as one symbol."""
    merged = Counter()
    for symbols, count in words.items():
        merged[merge_pair(symbols, pair)] += count
    return merged


def learn_merges(texts, n_merges, known=()):
    """Learn a merge table: the most frequent pair of neighbours becomes one symbol, until there are `n_merges`.

    Ties go to the pair that sorts first, so the same texts always give the same table. Stops early once no pair
    occurs twice. Recounts everything for each merge, which is fast enough for a few hundred merges and a small corpus.
    known: the merges of a table that is to be continued.

    Returns: list of (left, right) in rank order, for `Tokenizer(merges)`.
    Source: Sennrich et al. 2016, algorithm 1.
    """
    words = Counter()  # {symbols of a word: how often it occurs}
    for text in texts:
        for word in split_words(text):
            if word not in (SOT, EOT):  # these are tokens already
                words[word_symbols(word)] += 1

    merges = list(known)
    for pair in known:
        words = merge_words(words, pair)
    while len(merges) < n_merges:
        pairs = Counter()  # {pair of neighbours: how often it occurs}
        for symbols, count in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        # the largest count, then the smallest pair
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break  # a pair that occurs once says nothing about other texts
        merges.append(best)
        words = merge_words(words, best)
    return merges


def parse_merges(lines):
    """Merges from "left right" strings or [left, right] lists; ValueError names the first that is neither."""
    merges = []
    for number, line in enumerate(lines, start=1):
        pair = line.split() if isinstance(line, str) else line
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(symbol, str) and symbol for symbol in pair):
            raise ValueError(f"merge {number} ({quoted(line, 30)}) is not two symbols")
        merges.append(tuple(pair))
    return merges


def merges_from_json(text):
    """The merges of a Hugging Face tokenizer.json; ValueError if there are none or they are not of CLIP's kind."""
    # it may be any JSON, so each level is checked before the next
    data = json.loads(text)
    model = data.get("model") if isinstance(data, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list):
        raise ValueError("no list of merges under model.merges")
    # GPT-2 does not mark the end of a word; its merges would load, but give other tokens
    if model.get("end_of_word_suffix") not in (None, END):
        raise ValueError(f"words end in {quoted(model['end_of_word_suffix'])}, not {END!r}, so it is not CLIP's")
    return parse_merges(merges)


def read_text(path):
    """The text of a plain or gzipped file, told apart by content, as downloads lose their suffixes. Raises ValueError
    for more than MAX_BYTES, without reading them."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_gzip else open)(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it holds more than {MAX_BYTES:,} bytes")
    return data.decode("utf-8")


class Tokenizer:
    """Text to CLIP's token ids.

    The vocabulary is the 256 byte symbols, the same 256 at the end of a word, one symbol per merge, then the start and
    the end token. The end token has the largest id: CLIP finds it as the argmax of a row.

    Args:
        merges: list of (left, right) in rank order.
        context_length: the most tokens in a row, start and end included; 77 in CLIP.

    Raises ValueError for a table that cannot be of CLIP's kind: with a repeated merge, or one of a symbol that is
    neither a byte nor made by an earlier merge.
    """

    def __init__(self, merges, context_length=77):
        merges = [tuple(pair) for pair in merges]
        # the order fixes the ids
        self.symbols = list(BYTE_TO_CHAR.values())
        self.symbols += [char + END for char in BYTE_TO_CHAR.values()]
        self.symbols += ["".join(pair) for pair in merges]
        self.symbols += [SOT, EOT]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}  # the lowest is merged first
        self.merges = merges
        self.context_length = check_context_length(context_length)
        self.room = context_length - 2  # tokens of a text that are kept, between the start and the end token
        self.vocab_size = len(self.symbols)
        self.sot_id = self.vocab_size - 2
        self.eot_id = self.vocab_size - 1  # the largest, as `end_positions` in clip.py asks
        self._cache = {}  # word -> ids; expressions repeat their words
        self._check_merges()

    def _check_merges(self):
        # a space is never part of a word, so a merge with one gives away a GPT-2 table, which would load otherwise
        blank = BYTE_TO_CHAR[ord(" ")]
        known = set(self.symbols[:512]) - {blank, blank + END}
        for number, (left, right) in enumerate(self.merges, start=1):
            merge = f"merge {number} ({quoted(left + ' ' + right, 30)})"
            # nothing follows a symbol that ends a word
            if left not in known or right not in known or left.endswith(END):
                raise ValueError(f"{merge} joins symbols that no earlier merge makes")
            if self.ranks[left, right] != number - 1:
                raise ValueError(f"{merge} is repeated further down")
            known.add(left + right)

    @classmethod
    def from_file(cls, path, context_length=77):
        """Read OpenAI's bpe_simple_vocab_16e6.txt.gz, merges.txt, tokenizer.json (by that suffix), or `to_text()`.

        Each may be gzipped. Raises ValueError for anything else: one line with the file, the problem and what to do.
        """
        path = Path(path)
        check_context_length(context_length)  # outside the try: not the file's fault
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
            problem = f"not valid JSON ({shown(error, 80)})"
        except ValueError as error:
            problem = str(error)
        raise ValueError(f"{shown(path, 100)}: not a merge table: {problem}; give {ACCEPTED_FILES}")

    @classmethod
    def from_text(cls, text, context_length=77):
        """The tokenizer of a merge table, one "left right" per line under an optional "#version" header line."""
        lines = text.removesuffix("\n").split("\n", N_CLIP_MERGES + 1)  # the rest is not CLIP's
        if "#version" in lines[0]:  # preceded by the file's name in OpenAI's
            lines = lines[1:]
        return cls(parse_merges(lines[:N_CLIP_MERGES]), context_length)

    def to_text(self):
        """The merge table as text, read back exactly by `from_text`; stored in the metadata of a weights file."""
        lines = [HEADER, *(f"{left} {right}" for left, right in self.merges)]
        return "\n".join(lines) + "\n"

    def _word_ids(self, word):
        if word in (SOT, EOT):
            return [self.ids[word]]
        if word not in self._cache:
            symbols = word_symbols(word)  # ("l", "o", "w", "e", "s", "t</w>")
            while True:
                # the neighbours whose merge was learned first; those without a merge come last
                pairs = zip(symbols, symbols[1:])
                first = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)), default=None)
                if first not in self.ranks:
                    break
                symbols = merge_pair(symbols, first)
            self._cache[word] = [self.ids[symbol] for symbol in symbols]
        return self._cache[word]

    def encode(self, text):
        """Token ids of a text, without start and end token, not truncated: list of ints.

        As in CLIP, "<|startoftext|>" and "<|endoftext|>" spelled out in the text become those tokens.
        """
        ids = []
        for word in split_words(text):
            ids += self._word_ids(word)
        return ids

    def count_by_word(self, text):
        """What lies between the spaces of a text, and how many of `encode`'s tokens spell it: list of (word, count).
        Words are as they are typed, unless cleaning the text moves its spaces."""
        cleaned = clean(text).split(" ")
        typed = text.split()
        words = typed if len(typed) == len(cleaned) else cleaned
        counts = [sum(len(self._word_ids(part)) for part in WORD_PATTERN.findall(word)) for word in cleaned]
        return list(zip(words, counts))

    def __call__(self, texts):
        """Token ids of a batch: start token, text, end token, then zeros up to the longest of the batch.

        Args:
            texts: a string or a list of B strings. A blank one gives only the start and the end token; one longer than
                `context_length` is cut, and its last token becomes the end token, as with `truncate=True` in CLIP.

        Returns: (B, T) int64. Zero is also the id of "!": padding is what follows `end_positions` (clip.py).
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = []  # B lists of ids
        for text in texts:
            ids = self.encode(text)[: self.room]
            rows.append([self.sot_id, *ids, self.eot_id])
        T = max(map(len, rows), default=2)
        padded = [row + [0] * (T - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long, device="cpu").view(len(rows), T)


def check_context_length(length):
    """The length; ValueError if a row could not even hold the start and the end token."""
    if length < 2:
        raise ValueError(f"context_length: {length}, at least 2 needed (the start and the end token)")
    return length
