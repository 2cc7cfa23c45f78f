"""The index of a cached tar: the place and the hash of every record, read strictly before anything is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.format.manifest import ShardEntry
from pipeline.data.format.rows import digests, require_dense, whole
from pipeline.errors import ParseError
from pipeline.parsing.bounds import LONGEST_NAME
from pipeline.parsing.tar import BLOCK
from pipeline.parsing.values import parse_json

FORMAT = 2
DIGEST = 32  # bytes of a SHA-256
ROW_BYTES = 128
"""Most bytes of a row of an index: two numbers, a SHA-256, brackets and commas."""
FACTS_BYTES = 1 << 14
"""Most bytes of everything else in it."""
_ARRAY = re.compile(r"[^\0]*npy")
IMAGES = {"moments", "latents"}
"""Names of a layout of which each has one."""
LAYOUT = {
    "moments": _ARRAY,
    "latents": _ARRAY,
    "text": _ARRAY,
    "caption": re.compile(r"txt|json:[^\0]*"),
    "cond.boxes": _ARRAY,
    "cond.class": _ARRAY,
}
"""What the files of a layout may be called (records.py)."""
WITH_TEXT = {"text", "caption"}
"""Names of a layout that only a dataset with captions has, and both."""


@dataclass(frozen=True)
class Index:
    """A shard's index: (n,) int64 offsets and sizes of its records, (n, 32) uint8 SHA-256, and their layout."""

    offsets: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    layout: dict[str, str] | None = None

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.sizes.nbytes + self.digests.nbytes

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(offset, size) of each record."""
        return list(zip(self.offsets.tolist(), self.sizes.tolist(), strict=True))


def most_index_bytes(samples: int) -> int:
    """Most bytes of the index of a tar of `samples` records."""
    return FACTS_BYTES + ROW_BYTES * samples


def parse_index(data: bytes, entry: ShardEntry) -> Index:
    """The index of the tar `entry`.

    Raises ParseError unless it is of that tar, and its records stand in order, whole and without overlap in the tar's
    bytes.
    """
    require_dense(data)
    facts = parse_json(data, most_index_bytes(entry.samples))
    if type(facts) is not dict or type(facts.get("records")) is not list:
        raise ParseError("it is no index of a tar")
    if facts.get("format") != FORMAT:
        raise ParseError(f"its format is {str(facts.get('format'))[:20]}, this version reads {FORMAT}")
    for name in ("samples", "bytes", "sha256"):
        if facts.get(name) != getattr(entry, name):
            raise ParseError(f"its {name} is not what the manifest says of {entry.name}")
    records = facts["records"]
    if len(records) != entry.samples:
        raise ParseError(f"it has {len(records)} records, the manifest says {entry.samples}")
    if not set(map(type, records)) <= {list} or not set(map(len, records)) <= {3}:
        raise ParseError("its records are not lists of offset, size and SHA-256")
    offsets, sizes, hashes = ([record[i] for record in records] for i in range(3))
    if not whole(0, entry.bytes)(offsets) or not whole(2 * BLOCK, entry.bytes)(sizes) or not digests(hashes):
        raise ParseError("its records hold an offset, a size or a SHA-256 that cannot be right")
    index = Index(
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(-1, DIGEST),
        _layout(facts.get("layout")),
    )
    ends = index.offsets + index.sizes
    if len(ends) and (ends[-1] > entry.bytes or (index.offsets[1:] < ends[:-1]).any()):
        raise ParseError(f"its records overlap, or lie beyond the {entry.bytes} bytes of {entry.name}")
    return index


def _layout(value: Any) -> dict[str, str] | None:
    """The names of a record's files, None where they are those of `encode`. Raises ParseError."""
    if value is None:
        return None
    if type(value) is not dict or len(IMAGES & set(value)) != 1 or len(WITH_TEXT & set(value)) == 1:
        raise ParseError(f"its layout does not name moments, {', '.join(sorted(WITH_TEXT))}")
    if unknown := sorted(set(value) - set(LAYOUT)):
        raise ParseError(f"its layout names {unknown[0][:40]!r}, which no record holds")
    for name, pattern in ((name, pattern) for name, pattern in LAYOUT.items() if name in value):
        file = value[name]
        if type(file) is not str or len(file) > LONGEST_NAME or not pattern.fullmatch(file):
            raise ParseError(f"its layout names a file of {name} that records cannot have")
    return value
