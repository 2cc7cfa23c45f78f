"""The bytes that a record takes in a tar, by member, from the contract and what its sample is like.

Each member is a header of 512 bytes, then its content up to a whole block of 512: a .npy file with its own head, or the
record's json. So what a caption costs is seldom its length: most records' json fits one block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.format.contract import Contract, Member, TextFacts
from pipeline.data.format.crops import nearest, place_crop
from pipeline.data.format.members import has_several, member_shape
from pipeline.data.format.records import npy_head
from pipeline.parsing.tar import BLOCK

JSON = "json"
PNG_SHARE = 0.58
"""Bytes of a PNG over those of its pixels, where no picture was looked at: of two photographs at 256 pixels
(docs/how_to/cache_pixels.md). A trial of a few shards replaces it."""
CAPTION, TOKENS = "a" * 60, 17
"""A caption and its tokens, start and end included, where none was looked at: of web images (LAION-400M: 59 characters
in the mean; Schuhmann et al. 2021)."""
SIDES = (1024, 768)
"""Width and height of an image where none was looked at."""


@dataclass(frozen=True)
class Sampled:
    """What a sample of a source is like, as far as the bytes of its records depend on it.

    key: in the source. width, height: of the upright image in pixels. captions: those that are stored. tokens: of each,
    start and end included, before truncation. pngs: bytes of its crop as a PNG for each target, as its records hold it,
    and flipped where that is stored too; () = not looked at. thumbnails: bytes of a small JPEG of its crop for each
    target; () = not looked at. source_bytes: of its files in the source.
    """

    key: str = "000000000"
    width: int = SIDES[0]
    height: int = SIDES[1]
    captions: tuple[str, ...] = (CAPTION,)
    tokens: tuple[int, ...] = (TOKENS,)
    pngs: tuple[tuple[int, ...], ...] = ()
    thumbnails: tuple[int, ...] = ()
    source_bytes: int = 0


ASSUMED = Sampled()
"""The sample that every one is taken to be like where no source is looked at."""


@dataclass(frozen=True)
class RecordSize:
    """Bytes of a record in its tar. members: by member ("json", "moments", "cond.mask", ...), with headers and padding.
    size: (width, height) of its crop in pixels."""

    members: dict[str, int] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)

    @property
    def total(self) -> int:
        return sum(self.members.values())


def record_bytes(
    contract: Contract, sample: Sampled = ASSUMED, *, target: int = 0, flipped: bool = False
) -> RecordSize:
    """What the record of a sample takes. target: number of the contract's resolution among those of the encode.
    flipped: of the second record that `flip` stores."""
    size = contract.buckets[nearest(contract.buckets, sample.width, sample.height)]
    members = {JSON: in_tar(len(json_bytes(contract, sample, size, flipped)))}
    for member in contract.members:
        members[member.name] = in_tar(_array_bytes(member, contract, sample, size, target, flipped))
    return RecordSize(members, size)


def in_tar(content: int) -> int:
    """Bytes of a member of a tar whose content has `content` bytes."""
    return BLOCK + content + -content % BLOCK


def npy_file_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a .npy file. dtype: numpy's name."""
    kind = np.dtype(dtype)
    return len(npy_head(kind.str, shape)) + math.prod(shape) * kind.itemsize


def json_bytes(contract: Contract, sample: Sampled, size: tuple[int, int], flipped: bool = False) -> bytes:
    """The json of a record: of the length that encode's has, and of its content but for the place of a random crop."""
    text = contract.text
    crop = place_crop(sample.width, sample.height, size, contract.crop, contract.seed, sample.key)
    captions, tokens = (sample.captions, sample.tokens) if text is not None else ((), ())
    length = text.length if text is not None else 0
    facts: dict[str, Any] = {
        "key": sample.key,
        "caption": captions[0] if captions else "",
        "tokens": min(tokens[0], length) if tokens else 0,
        "truncated": bool(tokens) and tokens[0] > length,
        "width": sample.width,
        "height": sample.height,
        "resized": list(crop.resized),
        "crop": list(crop.box),
    }
    if has_several(text):
        facts["captions"] = list(captions)
    if flipped:
        facts["flipped"] = True
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def rows_of_text(text: TextFacts, tokens: Sequence[int]) -> int:
    """Rows of the states that `trimmed` stores of captions of so many tokens."""
    return sum(min(count, text.length) for count in tokens[: text.captions])


def _array_bytes(
    member: Member, contract: Contract, sample: Sampled, size: tuple[int, int], target: int, flipped: bool
) -> int:
    """Bytes of the .npy file of an array of the contract in the record of a sample whose crop is `size`."""
    found: tuple[int, ...] | None = None
    if member.name == "text" and contract.text is not None and contract.trimmed:
        found = (rows_of_text(contract.text, sample.tokens), *member.shape[1:])
    elif member.name == "pixels" and len(member.shape) == 1:
        found = (_png_bytes(sample, size, target, flipped),)
    return npy_file_bytes(member.dtype, member_shape(member, contract, size, found))


def _png_bytes(sample: Sampled, size: tuple[int, int], target: int, flipped: bool) -> int:
    """Bytes of the PNG of a crop, as they were found, or else by PNG_SHARE."""
    if target < len(sample.pngs) and sample.pngs[target]:
        found = sample.pngs[target]
        return found[min(int(flipped), len(found) - 1)]
    return round(PNG_SHARE * 3 * size[0] * size[1])
