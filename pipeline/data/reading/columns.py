"""Where the arrays of many records lie in the bytes of their block: found for all records together.

Records of one dataset look alike: the same files in the same order, whose headers differ in key and size alone. So the
tar headers are read as columns, and those of the arrays compared with the first record's. Records that do not look
alike (others' long names, texts that end where captions do) are read one by one. Nothing here proves that the bytes are
the right ones; the hashes of the records do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.records import BLOCK, parse_header, parse_npy, require_members, role_of, split_key, walk
from pipeline.errors import ShardCorrupt

SIZE, CHECKSUM, PREFIX = slice(124, 135), slice(148, 156), slice(345, 500)  # of a tar header
OCTAL = 8 ** np.arange(10, -1, -1)
NPY_PREAMBLE = 10  # bytes before a .npy header's text


@dataclass(frozen=True)
class Column:
    """One array of each record of a block. starts: byte offsets of their data; shapes: one each, or one for all."""

    starts: list[int]
    dtype: np.dtype
    shapes: list[tuple[int, ...]] | tuple[int, ...]

    def shape(self, place: int) -> tuple[int, ...]:
        return self.shapes if isinstance(self.shapes, tuple) else self.shapes[place]


def find_columns(
    data: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    members: Sequence[str],
    layout: Mapping[str, str] | None = None,
) -> dict[str, Column]:
    """The columns `members` of records that lie at `offsets` (n,) with `sizes` (n,) in `data` (m,) uint8.

    layout: names of the files, as of records.unpack. Raises ShardCorrupt when a record's bytes are not exactly one
    record, or a member is missing.
    """
    if len(offsets) == 0:
        return {}
    found = _alike(data, offsets, sizes, members, layout)
    return found if found is not None else _one_by_one(data, offsets, sizes, members, layout)


def _alike(
    data: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, members: Collection[str], layout: Mapping[str, str] | None
) -> dict[str, Column] | None:
    """None where the records do not look alike."""
    if len(data) % BLOCK or (offsets % BLOCK).any() or (sizes % BLOCK).any():
        return None
    blocks, at, ends = data.reshape(-1, BLOCK), offsets // BLOCK, (offsets + sizes) // BLOCK
    found: dict[str, Column] = {}
    stem = ""
    while at[0] < ends[0]:
        if (at >= ends).any():
            return None
        headers = blocks[at]
        first = parse_header(headers[0].data)
        if not stem:
            stem = split_key(first.name.decode("utf-8", "replace"))[0]
            length = len(stem.encode())
            keys = headers[:, :length].copy()
            if bytes(keys[0]) != stem.encode() or (keys == ord(".")).any():
                return None
        elif (headers[:, :length] != keys).any():
            return None
        file = split_key(first.name.decode("utf-8", "replace"))[1]
        varies = (headers != headers[0]).any(axis=0)
        sized = varies[SIZE].any()
        varies[:length] = varies[SIZE] = varies[CHECKSUM] = False
        if varies.any() or first.kind != b"0" or headers[0, PREFIX].any():
            return None
        payloads: np.ndarray | int = first.size
        if sized:
            digits = headers[:, SIZE].astype(np.int64) - ord("0")
            if ((digits < 0) | (digits > 7)).any():
                return None
            payloads = digits @ OCTAL
        at = at + 1
        if (role := role_of(file, layout)) in members:
            column = None if sized else _array(blocks, at, first.size)
            if column is None:
                return None
            found[role] = column
        at = at + -(-payloads // BLOCK)
        if (at > ends).any():
            return None
    if (at != ends).any():
        return None
    require_members(stem, found, members, layout)
    return found


def _array(blocks: np.ndarray, at: np.ndarray, length: int) -> Column | None:
    """The arrays of .npy files of `length` bytes that begin at blocks `at`; None unless they have the first one's
    header, within their first block."""
    head = blocks[at]
    size = NPY_PREAMBLE + int.from_bytes(head[0, NPY_PREAMBLE - 2 : NPY_PREAMBLE].tobytes(), "little")
    if size > BLOCK or (head[:, :size] != head[0, :size]).any():
        return None
    start = int(at[0]) * BLOCK
    first = parse_npy(blocks.data.cast("B")[start : start + length])
    return Column((at * BLOCK + size).tolist(), first.dtype, first.shape)


def _one_by_one(
    data: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, members: Collection[str], layout: Mapping[str, str] | None
) -> dict[str, Column]:
    """Whatever the records look like."""
    view = data.data
    starts: dict[str, list[int]] = {name: [] for name in members}
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in members}
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        key, roles = "", []
        for stem, file, start, length in walk(view[offset : offset + size]):
            key = stem
            if (role := role_of(file, layout)) in members and role not in roles:
                array = parse_npy(view[offset + start : offset + start + length])
                starts[role].append(offset + start + length - array.nbytes)
                arrays[role].append(array)
                roles.append(role)
        require_members(key, roles, members, layout)
    columns = {}
    for name in members:
        dtypes = {array.dtype for array in arrays[name]}
        if len(dtypes) > 1:
            raise ShardCorrupt(f"{name} differs in dtype between records")
        columns[name] = Column(starts[name], dtypes.pop(), [array.shape for array in arrays[name]])
    return columns
