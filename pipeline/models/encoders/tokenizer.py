"""Captions to token ids: CLIP's byte-pair encoding (Radford et al. 2021), without PyTorch.

The ids equal those of open_clip's SimpleTokenizer, as tests check. Importing that one imports torch, torchvision and
timm, which costs seconds and hundreds of megabytes in every decoding process; this module needs only ftfy and regex.
"""

from __future__ import annotations

import gzip
import html
import io
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ftfy
import regex

from pipeline.config import EncodersConfig
from pipeline.errors import WeightsError
from pipeline.models.encoders.described import Tower, TowerFile, described_tower, read_described
from pipeline.models.encoders.fetched import part_folder

DEMO = Path(__file__).resolve().parent.parent.parent / "assets" / "demo" / "clip"
CONFIG, MERGES = "open_clip_config.json", "bpe.txt.gz"
SPECIAL = ("<start_of_text>", "<end_of_text>")
MOST_MERGES = 49152 - 256 - 2  # that CLIP reads of its file, which has more
LETTERS = 2 * 256 + len(SPECIAL)  # ids of a vocabulary without merges
MERGES_BYTES = 16 << 20
WORDS = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SLOW = regex.compile(r"&(?:amp;|#0*38;|#x0*26;){8}|\p{M}{32}", regex.IGNORECASE)
"""Entities in entities and towers of accents: repairing n of them takes n^2 steps."""
SLOW_LENGTH = 2048  # characters that are read of a caption that has such; the context takes some 400
CACHED, CACHED_LENGTH = 65_536, 64  # words in the cache, and the longest one, at most: captions are untrusted input


class Tokenizer:
    """CLIP's tokenizer with a context length and a padding id. It can be pickled, and used by several threads.

    length: L, tokens of a caption with start, end and padding. pad: id after the end token. sot, eot: ids of the start
    and end tokens. merges: pairs of pieces in the order in which they are joined. vocabulary: piece -> id.
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
        """One caption's L ids (start, at most L - 2 of the caption, end, padding), and its number of tokens with start
        and end, which exceeds L if it was truncated."""
        tokens = self.encode(caption)
        truncated = [self.sot, *tokens[: self.length - 2], self.eot]
        return truncated + [self.pad] * (self.length - len(truncated)), len(tokens) + 2

    def encode(self, caption: str) -> list[int]:
        """All ids of a caption, without start, end and padding.

        Wrongly decoded text is repaired first (ftfy); then text is lower-cased, and runs of whitespace become a space.
        Of a caption that would take minutes to repair, the first SLOW_LENGTH characters are read.
        """
        if len(caption) > SLOW_LENGTH and SLOW.search(caption):
            caption = caption[:SLOW_LENGTH]
        text = html.unescape(html.unescape(ftfy.fix_text(caption)))
        return [i for word in self._words.findall(" ".join(text.split()).lower()) for i in self._word_ids(word)]

    def _word_ids(self, word: str) -> list[int]:
        """The ids of one word, from the cache if they are there."""
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
        """Join neighbouring pieces, the lowest rank first and from left to right, until no pair can be joined.

        It takes n log n steps for n letters, so that a caption of one enormous word does not stall the process.
        """
        # A piece is stored at the index of its first letter.
        pieces: list[str | None] = [*letters[:-1], f"{letters[-1]}</w>"]
        next_index, previous_index = list(range(1, len(pieces) + 1)), list(range(-1, len(pieces) - 1))

        def rank(i: int) -> int | None:
            """Rank of the pair of the piece at i and the next one; None if they are no pair or no longer there."""
            first, second = (
                (pieces[i], pieces[next_index[i]]) if i >= 0 and next_index[i] < len(pieces) else (None, None)
            )
            return None if first is None or second is None else self._ranks.get((first, second))

        heap = [(pair_rank, i) for i in range(len(pieces)) if (pair_rank := rank(i)) is not None]
        heapify(heap)
        while heap:
            lowest, touched = heap[0][0], []
            while heap and heap[0][0] == lowest:
                i = heappop(heap)[1]
                if rank(i) != lowest:
                    continue
                j = next_index[i]
                pieces[i], pieces[j] = f"{pieces[i]}{pieces[j]}", None
                next_index[i] = next_index[j]
                if next_index[i] < len(pieces):
                    previous_index[next_index[i]] = i
                touched += [previous_index[i], i]
            for i in touched:
                if (pair_rank := rank(i)) is not None:
                    heappush(heap, (pair_rank, i))
        return (piece for piece in pieces if piece is not None)


def load_tokenizer(config: EncodersConfig) -> Tokenizer:
    """The tokenizer of the text tower that `config` names, without loading weights. Raises WeightsError when there is
    no such tower, or when its tokenizer is not CLIP's."""
    return tokenizer_of(*find_tower(config), config)


def tokenizer_of(architecture: dict[str, Any], folder: Path | None, config: EncodersConfig) -> Tokenizer:
    """The tokenizer of an open_clip `model_cfg`, with the merges of `folder` if it has any, else CLIP's."""
    text = described_tower(architecture, f"encoders.text={config.text}").text_cfg
    siglip = folder is None and "siglip" in config.text.lower()  # open_clip recognizes them by name, too
    if text.hf_tokenizer_name or text.tokenizer_kwargs or siglip:
        raise WeightsError(f"encoders.text={config.text} uses another tokenizer than CLIP's, which is not supported")
    merges = read_merges(merges_of(folder))
    if len(merges) != MOST_MERGES and len(merges) + LETTERS != text.vocab_size:
        raise WeightsError(
            f"{merges_of(folder)} has {len(merges)} merges, and a vocabulary of {text.vocab_size} wants "
            f"{text.vocab_size - LETTERS}: take the folder anew from where it came"
        )
    return Tokenizer(merges, config.text_length, config.text_pad)


def read_merges(path: Path) -> tuple[tuple[str, ...], ...]:
    """The pairs of pieces in a file of merges. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path} is no file")
    try:
        merges, what = _parse_merges(path.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise WeightsError(f"{path} is missing or damaged: {error}") from None
    if what:
        raise WeightsError(f"{path} is no list of merges ({what}): take the folder anew from where it came")
    return merges


@lru_cache(maxsize=2)
def _parse_merges(packed: bytes) -> tuple[tuple[tuple[str, ...], ...], str]:
    """What the lines of a file of merges hold, without the empty ones at its end, and what is wrong with them; "" for
    nothing. The same bytes are read once in a process. Raises OSError, EOFError, ValueError, zlib.error."""
    with gzip.open(io.BytesIO(packed)) as file:
        data = file.read(MERGES_BYTES + 1)
    if len(data) > MERGES_BYTES:
        raise ValueError(f"it unpacks to more than {MERGES_BYTES:,} bytes")
    if not data:
        raise ValueError("it is empty")
    merges = [tuple(line.split()) for line in data.decode().split("\n")[1 : MOST_MERGES + 1]]
    while merges and not merges[-1]:
        merges.pop()
    wrong = next((number for number, pair in enumerate(merges, start=2) if len(pair) != 2), 0)
    twice = len(set(merges)) != len(merges) or len({"".join(pair) for pair in merges}) != len(merges)
    return tuple(merges), f"line {wrong} is no pair" if wrong else "a merge is there twice" if twice else ""


def merges_of(folder: Path | None) -> Path:
    """The merges file of a tower's folder, or CLIP's own if it has none."""
    folder_merges = folder / MERGES if folder else None
    return folder_merges if folder_merges and folder_merges.exists() else _open_clip() / "bpe_simple_vocab_16e6.txt.gz"


def find_tower(config: EncodersConfig) -> tuple[dict[str, Any], Path | None]:
    """The open_clip `model_cfg` of the tower that `config` names, and its folder: the fetched one, the shipped demo or
    the user's own. The folder is None for a name of open_clip's list. Raises WeightsError."""
    if config.weights:
        folder = part_folder(config, "text")
    else:
        folder = DEMO if config.text == "demo" else Path(config.text).expanduser()
    if config.weights or config.text == "demo" or folder.is_dir():
        return read_folder(folder)["model_cfg"], folder
    config_file = _open_clip() / "model_configs" / f"{config.text}.json"
    if "/" in config.text or not config_file.is_file():
        raise WeightsError(f"encoders.text={config.text} is neither demo, nor a folder, nor one of open_clip's models")
    return read_described(config_file, Tower)[0], None


def picture_size(config: EncodersConfig) -> tuple[int, int]:
    """(width, height) in pixels of what the tower's image tower sees, by its architecture. Raises WeightsError."""
    side = find_tower(config)[0]["vision_cfg"].get("image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    return width, height


def read_folder(folder: Path) -> dict[str, Any]:
    """The content of open_clip_config.json in a tower's folder. Raises WeightsError."""
    try:
        return read_described(folder / CONFIG, TowerFile)[0]
    except WeightsError as error:
        raise WeightsError(f"{folder} is not an open_clip folder: {error}") from None


def _open_clip() -> Path:
    """The folder of the package open_clip, found without importing it."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _printable_bytes() -> dict[int, str]:
    """A character that is neither blank nor a control for each byte, in the order of CLIP's ids: printable bytes of
    Latin-1 stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(unprintable)}
