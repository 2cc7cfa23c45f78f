"""A trial of a source: how many images it holds, by the sizes of its shards and a few samples of some of them, and what
these are like. Nothing is written, no encoder is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.config import EncodeConfig
from pipeline.config.values.rules import parse_rules
from pipeline.data.format.contract import Contract
from pipeline.data.format.crops import nearest
from pipeline.errors import ParseError, SourceError
from pipeline.parsing.samples import IMAGES
from pipeline.parsing.values import parse_json
from pipeline.planning.cached.members import Files, Ranges, counted, files_of
from pipeline.planning.cached.pictures import cropped, opened, png_sizes, thumbnail_size, upright_size
from pipeline.planning.cached.records import Sampled
from pipeline.storage.patterns import expand, sizes

TRIED = 256
"""Samples that are looked at, at most."""
COUNTED = 20_000
"""Samples that are counted by their headers on a local disk, at most."""
THUMBNAILS = 4
"""Samples of a shard of which a small picture is made."""
WORDS = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_+")
PIECES = 1.15
"""Tokens of a word in the mean, where no tokenizer counts them: of English captions in CLIP's vocabulary."""
PADDING = 10_240
"""Bytes of zeros that a tar ends with, at most: it fills its last 20 blocks."""
TABLES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Trial:
    """What a source holds.

    shards: its number of tars. source_bytes: of all of them. shard_bytes: of each. tried: shards of which samples were
    read. read: samples that were looked at; samples: those that encode would accept, as far as headers and captions
    tell. rejected: the others, by reason. counted: samples that were counted, of which tried_bytes of the source are;
    on a local disk by headers alone, so more than were looked at. estimated_tokens: whether tokens were estimated by
    words. name: of a shard.
    """

    shards: int
    source_bytes: int
    shard_bytes: tuple[int, ...] = ()
    tried: int = 0
    read: int = 0
    counted: int = 0
    tried_bytes: int = 0
    samples: tuple[Sampled, ...] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)
    estimated_tokens: bool = True
    name: str = "00000.tar"

    @property
    def source_images(self) -> int:
        """Samples of the whole source, in proportion to the bytes of those that were counted."""
        return round(self.source_bytes * self.counted / self.tried_bytes) if self.tried_bytes else 0

    @property
    def images(self) -> int:
        """Those that are accepted."""
        return round(self.source_images * len(self.samples) / self.read) if self.read else 0

    @property
    def unit_rows(self) -> tuple[int, ...]:
        """Accepted images of each shard, in proportion to its bytes."""
        images, total, before, rows = self.images, max(self.source_bytes, 1), 0, []
        for size in self.shard_bytes:
            rows.append((before + size) * images // total - before * images // total)
            before += size
        return tuple(rows)

    @property
    def caption_tokens_mean(self) -> float:
        """Tokens of a caption in the mean, start and end included; 0 without captions."""
        counts = [count for one in self.samples for count in one.tokens]
        return sum(counts) / len(counts) if counts else 0.0


def trial(
    config: EncodeConfig,
    contracts: Sequence[Contract],
    shards: int,
    tokens: Callable[[str], int] | None = None,
    most: int = TRIED,
) -> Trial:
    """Looks at config.source, a pattern of tars.

    contracts: of the resolutions (facts.py). shards: of which samples are read, evenly spaced; 0 = the sizes of the
    shards alone, which say nothing about images. tokens: number of a caption's tokens with start and end (Tokenizer.ids
    of models/encoders/tokenizer.py); None = estimated by words. most: samples that are read. Raises SourceError where
    nothing matches, for what is no tar, and where none of the samples is usable; ShardCorrupt, StorageError.
    """
    places = expand(config.source)
    if other := next((key for _, key in places if key.lower().endswith(TABLES)), None):
        raise SourceError(
            f"{config.source}: {other} is a table, and a plan reads tars alone: give images=N, or the finished cache"
        )
    shard_bytes = sizes(places)
    total, count, name = sum(shard_bytes), min(shards, len(places)), places[0][1].rpartition("/")[2]
    if not count:
        return Trial(len(places), total, tuple(shard_bytes), name=name)
    chosen = sorted({i * (len(places) - 1) // max(count - 1, 1) for i in range(count)})
    rules = parse_rules(config.filters.keep)
    samples, rejected = list[Sampled](), Counter[str]()
    read, in_bytes, tried_bytes = 0, 0, 0
    for number in chosen:
        storage, key = places[number]
        size, each = shard_bytes[number], max(1, most // len(chosen))
        many, end, pictures = 0, 0, 0
        for files in islice(files_of(Ranges(storage, key, size), config.limits), each):
            made = sampled(files, config, contracts, tokens or estimated_tokens, rules, small=pictures < THUMBNAILS)
            read, many, end = read + 1, many + 1, files.end
            if isinstance(made, str):
                rejected[made] += 1
            else:
                samples.append(made)
                pictures += 1
        taken = size if size - end <= PADDING else end
        if storage.local_path(key) is not None:
            many, taken = counted(storage, key, size, config.limits, max(each, COUNTED // len(chosen)))
        in_bytes, tried_bytes = in_bytes + many, tried_bytes + taken
    if not samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "no sample"
        raise SourceError(f"{config.source}: none of the first {read} samples is usable ({reasons})")
    return Trial(
        len(places),
        total,
        tuple(shard_bytes),
        len(chosen),
        read,
        in_bytes,
        tried_bytes,
        tuple(samples),
        dict(rejected),
        tokens is None,
        name,
    )


def sampled(
    files: Files,
    config: EncodeConfig,
    contracts: Sequence[Contract],
    tokens: Callable[[str], int],
    rules: Sequence[Any] = (),
    small: bool = False,
) -> Sampled | str:
    """What a sample is like, or the reason for which encode rejects it. small: whether a small picture is made."""
    images = [files.members[suffix] for suffix in IMAGES if suffix in files.members]
    if len(images) != 1:
        return "image_repeated" if images else "image_missing"
    captions = captions_of(files, config)
    if isinstance(captions, str):
        return captions
    filters = config.filters
    if any(len(text) < filters.min_caption for text in captions):
        return "filter:min_caption"
    if filters.max_caption and any(len(text) > filters.max_caption for text in captions):
        return "filter:max_caption"
    columns = columns_of(files) if rules else {}
    for rule in rules:
        if not rule.holds((columns or {}).get(rule.key)):
            return f"filter:{rule}"
    picture = opened(images[0], config.limits)
    if picture is None:
        return "image_unreadable"
    width, height = upright_size(picture)
    if min(width, height) < filters.min_side:
        return "filter:min_side"
    if filters.max_aspect and max(width, height) > filters.max_aspect * min(width, height):
        return "filter:max_aspect"
    pngs, thumbnails = list[tuple[int, ...]](), list[int]()
    for contract in contracts:
        is_png = contract.stored == "pixels" and contract.pixels == "png"
        if not (is_png or small):
            continue
        size = contract.buckets[nearest(contract.buckets, width, height)]
        crop = cropped(picture, size, contract.crop, contract.seed, files.key)
        if crop is None:
            return "image_truncated"
        if is_png:
            pngs.append(png_sizes(crop, 2 if contract.flip else 1))
        if small:
            thumbnails.append(thumbnail_size(crop))
    counts = tuple(tokens(text) for text in captions)
    size_in_source = files.end - files.start
    return Sampled(files.key, width, height, captions, counts, tuple(pngs), tuple(thumbnails), size_in_source)


def captions_of(files: Files, config: EncodeConfig) -> tuple[str, ...] | str:
    """The captions of a sample that are stored, or the reason for which it is rejected."""
    places = config.caption_places
    if not places:
        return ()
    columns = columns_of(files) if any(place != "txt" for place in places) else {}
    if columns is None:
        return "json_unreadable"
    found: list[list[str]] = []
    for place in places:
        value: Any = files.members.get("txt") if place == "txt" else columns.get(place.removeprefix("json:"))
        values = value if isinstance(value, list) and config.captions_most else [value]
        texts = [_text(one, config.limits.caption_bytes) for one in values]
        if not texts or any(text is None for text in texts):
            return "caption_missing" if value is None else "caption_not_text"
        if not all(texts):
            return "caption_empty"
        found.append([text for text in texts if text])
    taken = [0] * len(found)
    for turn in range(max(map(len, found))):  # the first of each place, then the second of each, and so on
        for number, texts_of_place in enumerate(found):
            if turn < len(texts_of_place) and sum(taken) < config.captions:
                taken[number] += 1
    return tuple(text for texts_of_place, count in zip(found, taken, strict=True) for text in texts_of_place[:count])


def _text(value: object, most_bytes: int) -> str | None:
    """A caption without white space at its ends; None for what is no text, or too long."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    if not isinstance(value, str) or len(value.encode("utf-8", "surrogatepass")) > most_bytes:
        return None
    return value.replace("\0", "").strip().removeprefix("\ufeff").strip()


def columns_of(files: Files) -> dict[str, Any] | None:
    """The object of a sample's json; {} where it has none, None where it cannot be read."""
    if "json" not in files.members:
        return {}
    try:
        value = parse_json(files.members["json"], 16 << 20)
    except ParseError:
        return None
    return value if isinstance(value, dict) else None


def estimated_tokens(text: str) -> int:
    """Tokens of a caption with start and end, by its words."""
    return 2 + round(PIECES * len(WORDS.findall(text)))
