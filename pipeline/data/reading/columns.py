"""Locates the arrays of many records in the bytes of their block, for all records at once.

The records of a dataset are alike: they have the same files in the same order, and the files' headers differ only in
key and size. So tar headers are read as columns, and headers of arrays are compared with those of the first record.
Records that are not alike (long names of other writers, trimmed texts) are read one by one. This module does not prove
that the bytes are right; the hashes of the records do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.records import parse_npy, require_members, role_of, split_key, walk
from pipeline.errors import ShardCorrupt
from pipeline.parsing.tar import BLOCK, parse_header

SIZE, CHECKSUM, PREFIX = slice(124, 135), slice(148, 156), slice(345, 500)  # fields of a tar header
OCTAL = 8 ** np.arange(10, -1, -1)
NPY_PREAMBLE = 10  # bytes before the text of a .npy header


@dataclass(frozen=True)
class Column:
    """One array of each record of a block. starts: byte offsets of their data. shapes: one per record, or one for
    all."""

    starts: list[int]
    dtype: np.dtype
    shapes: list[tuple[int, ...]] | tuple[int, ...]

    def shape(self, place: int) -> tuple[int, ...]:
        """Shape of the array of record `place`."""
        return self.shapes if isinstance(self.shapes, tuple) else self.shapes[place]

    def moved(self, by: int) -> Column:
        """The same column in bytes that begin `by` bytes before."""
        return Column([start + by for start in self.starts], self.dtype, self.shapes)


def find_columns(
    data: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    members: Sequence[str],
    layout: Mapping[str, str] | None = None,
) -> dict[str, Column]:
    """The columns `members` of the records at `offsets` (n,) with `sizes` (n,) in `data` (m,) uint8.

    layout: names of the files, as in records.unpack. Raises ShardCorrupt when a record's bytes are not exactly one
    record, or a member is missing.
    """
    if len(offsets) == 0:
        return {}
    columns = _alike(data, offsets, sizes, members, layout)
    return columns if columns is not None else _one_by_one(data, offsets, sizes, members, layout)


def _alike(
    data: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, members: Collection[str], layout: Mapping[str, str] | None
) -> dict[str, Column] | None:
    """The columns of records that are alike; None if they are not."""
    if len(data) % BLOCK or (offsets % BLOCK).any() or (sizes % BLOCK).any():
        return None
    blocks, positions, ends = data.reshape(-1, BLOCK), offsets // BLOCK, (offsets + sizes) // BLOCK
    columns: dict[str, Column] = {}
    stem = ""
    while positions[0] < ends[0]:
        if (positions >= ends).any():
            return None
        headers = blocks[positions]
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
        sizes_vary = varies[SIZE].any()
        varies[:length] = varies[SIZE] = varies[CHECKSUM] = False
        if varies.any() or first.kind != b"0" or headers[0, PREFIX].any():
            return None
        payloads: np.ndarray | int = first.size
        if sizes_vary:
            digits = headers[:, SIZE].astype(np.int64) - ord("0")
            if ((digits < 0) | (digits > 7)).any():
                return None
            payloads = digits @ OCTAL
        positions = positions + 1
        if (role := role_of(file, layout)) in members:
            column = None if sizes_vary else _array(blocks, positions, first.size)
            if column is None:
                return None
            columns[role] = column
        positions = positions + -(-payloads // BLOCK)
        if (positions > ends).any():
            return None
    if (positions != ends).any():
        return None
    require_members(stem, columns, members, layout)
    return columns


def _array(blocks: np.ndarray, starts: np.ndarray, length: int) -> Column | None:
    """The column of .npy files of `length` bytes that begin at blocks `starts`; None unless all have the header of the
    first one, within their first block."""
    head = blocks[starts]
    size = NPY_PREAMBLE + int.from_bytes(head[0, NPY_PREAMBLE - 2 : NPY_PREAMBLE].tobytes(), "little")
    if size > BLOCK or (head[:, :size] != head[0, :size]).any():
        return None
    start = int(starts[0]) * BLOCK
    first = parse_npy(blocks.data.cast("B")[start : start + length])
    return Column((starts * BLOCK + size).tolist(), first.dtype, first.shape)


def _one_by_one(
    data: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, members: Collection[str], layout: Mapping[str, str] | None
) -> dict[str, Column]:
    """The columns of any records, read one by one. Raises ShardCorrupt."""
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
