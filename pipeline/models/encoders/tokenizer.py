"""Captions to token ids: CLIP's byte-pair encoding (Radford et al. 2021), without PyTorch.

The ids are those of open_clip's SimpleTokenizer, to which tests hold it. That one sits behind an import of torch,
torchvision and timm, seconds and hundreds of megabytes in every process that decodes; this module needs ftfy and regex.
"""

from __future__ import annotations

import gzip
import html
import json
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ftfy
import regex

from pipeline.config import EncodersConfig
from pipeline.errors import WeightsError
from pipeline.models.encoders.fetched import part_folder

DEMO = Path(__file__).resolve().parent.parent.parent / "assets" / "demo" / "clip"
CONFIG, MERGES = "open_clip_config.json", "bpe.txt.gz"
SPECIAL = ("<start_of_text>", "<end_of_text>")
MOST_MERGES = 49152 - 256 - 2  # that CLIP takes of its file, which holds more
WORDS = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CACHED, CACHED_LENGTH = 65_536, 64  # most words kept, and the longest one: captions are not trusted


class Tokenizer:
    """CLIP's tokenizer with a context length and a padding id. Pickles, and may be used by several threads.

    length: L, tokens of a caption with start, end and padding. pad: id after the end token. sot, eot: ids of the start
    and the end token. merges: pairs of pieces, the first to be joined first. vocabulary: piece -> id.
    """

    def __init__(self, merges: Sequence[tuple[str, ...]], length: int, pad: int) -> None:
        self.merges, self.length, self.pad = tuple(merges), length, pad
        self._bytes = _printable_bytes()
        letters = list(self._bytes.values())
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, self.merges), *SPECIAL]
        self.vocabulary = {piece: i for i, piece in enumerate(pieces)}
        self.sot, self.eot = (self.vocabulary[name] for name in SPECIAL)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._words = regex.compile("|".join(SPECIAL) + WORDS, regex.IGNORECASE)
        self._cache: dict[str, list[int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.merges, self.length, self.pad)

    def ids(self, caption: str) -> tuple[list[int], int]:
        """One caption's L ids (start, at most L - 2 of the caption, end, padding), and how many tokens it has with
        start and end: more than L when it was truncated."""
        tokens = self.encode(caption)
        kept = [self.sot, *tokens[: self.length - 2], self.eot]
        return kept + [self.pad] * (self.length - len(kept)), len(tokens) + 2

    def encode(self, caption: str) -> list[int]:
        """A caption's ids, without start, end and padding, however many. Lower case; whitespace counts as one space;
        text whose encoding was confused is mended first (ftfy)."""
        text = html.unescape(html.unescape(ftfy.fix_text(caption)))
        return [i for word in self._words.findall(" ".join(text.split()).lower()) for i in self._word(word)]

    def _word(self, word: str) -> list[int]:
        """Ids of one word."""
        if word in self._cache:
            return self._cache[word]
        if word in SPECIAL:
            return [self.vocabulary[word]]
        ids = [self.vocabulary[piece] for piece in self._join([self._bytes[byte] for byte in word.encode()])]
        if len(word) <= CACHED_LENGTH:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _join(self, letters: list[str]) -> Iterator[str]:
        """Joins pairs of neighbours, those of the lowest rank first and from left to right, until there is none to
        join. n log n for n letters, so that a caption that is one enormous word is no trap."""
        pieces: list[str | None] = [*letters[:-1], f"{letters[-1]}</w>"]  # a piece lies where its first letter was
        after, before = list(range(1, len(pieces) + 1)), list(range(-1, len(pieces) - 1))

        def rank(i: int) -> int | None:
            """Of the piece at i and the next one; None when they are not joined, or no longer there."""
            here, there = (pieces[i], pieces[after[i]]) if i >= 0 and after[i] < len(pieces) else (None, None)
            return None if here is None or there is None else self._ranks.get((here, there))

        heap = [(found, i) for i in range(len(pieces)) if (found := rank(i)) is not None]
        heapify(heap)
        while heap:
            lowest, touched = heap[0][0], []
            while heap and heap[0][0] == lowest:
                i = heappop(heap)[1]
                if rank(i) != lowest:
                    continue
                j = after[i]
                pieces[i], pieces[j] = f"{pieces[i]}{pieces[j]}", None
                after[i] = after[j]
                if after[i] < len(pieces):
                    before[after[i]] = i
                touched += [before[i], i]
            for i in touched:
                if (found := rank(i)) is not None:
                    heappush(heap, (found, i))
        return (piece for piece in pieces if piece is not None)


def load_tokenizer(config: EncodersConfig) -> Tokenizer:
    """The tokenizer of the text tower that `config` names, without its weights. Raises WeightsError when there is no
    such tower, or when it has another tokenizer than CLIP's."""
    return tokenizer_of(*find_tower(config), config)


def tokenizer_of(architecture: dict[str, Any], folder: Path | None, config: EncodersConfig) -> Tokenizer:
    """The tokenizer of an open_clip `model_cfg`, with the merges of `folder` where it has some, else CLIP's."""
    text = architecture["text_cfg"]
    siglip = folder is None and "siglip" in config.text.lower()  # open_clip, too, knows them by their names
    if text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs") or siglip:
        raise WeightsError(f"encoders.text={config.text} uses another tokenizer than CLIP's, which is not supported")
    path = merges_of(folder)
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : MOST_MERGES + 1]
    except (OSError, EOFError, ValueError) as error:
        raise WeightsError(f"{path} is missing or damaged: {error}") from None
    return Tokenizer([tuple(line.split()) for line in lines], config.text_length, config.text_pad)


def merges_of(folder: Path | None) -> Path:
    """The file of merges of a tower's folder, or CLIP's own where it has none."""
    own = folder / MERGES if folder else None
    return own if own and own.exists() else _open_clip() / "bpe_simple_vocab_16e6.txt.gz"


def find_tower(config: EncodersConfig) -> tuple[dict[str, Any], Path | None]:
    """The open_clip `model_cfg` of the tower that `config` names, and its folder: what was fetched, the shipped one or
    one of the user's own (None: a name of open_clip's list). Raises WeightsError."""
    if config.weights:
        folder = part_folder(config, "text")
    else:
        folder = DEMO if config.text == "demo" else Path(config.text).expanduser()
    if config.weights or config.text == "demo" or folder.is_dir():
        return read_folder(folder)["model_cfg"], folder
    listed = _open_clip() / "model_configs" / f"{config.text}.json"
    if "/" in config.text or not listed.is_file():
        raise WeightsError(f"encoders.text={config.text} is neither demo, nor a folder, nor one of open_clip's models")
    return json.loads(listed.read_text()), None


def read_folder(folder: Path) -> dict[str, Any]:
    """open_clip_config.json of a tower's folder. Raises WeightsError."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        _ = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder} is not an open_clip folder: {CONFIG}: {error!r}") from None
    return config


def _open_clip() -> Path:
    """Where open_clip's files lie, without importing it."""
    found = find_spec("open_clip")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def _printable_bytes() -> dict[int, str]:
    """Each byte as a character that is neither blank nor a control, in the order of CLIP's ids: printable ones of
    Latin-1 as they are, then the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
