"""A rank's part of a global batch, collated from verified blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.data.format.pixels import read_png
from pipeline.data.reading.reader import Block
from pipeline.errors import ShardCorrupt

Take = Callable[[int], np.ndarray]
"""Allocates memory for a number of bytes: count -> (count,) uint8."""
Each = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]
"""Calls a function with each number, in any order and any threads, as `map` does."""


@dataclass
class Batch:
    """One rank's part of one global batch.

    n: number of the global batch's first sample. numbers: (b,) int64, this rank's sample numbers. tensors: (b, ...) in
    the cache's dtypes, by member name ("moments" float16 (b, 2C, h, w), "text" float16 (b, L, D), "cond.class" int32
    (b,), "cond.NAME"), on the stream's device. shards, rows: (b,) int64, each record's shard number and row in its tar.
    read_captions: reads (key, caption) of each record, on demand. wait_s: seconds that the training loop waited for
    this batch.
    """

    n: int
    numbers: Tensor
    tensors: dict[str, Tensor]
    shards: Tensor
    rows: Tensor
    read_captions: Callable[[], list[tuple[str, str]]]
    wait_s: float = 0.0

    @cached_property
    def _keys_captions(self) -> list[tuple[str, str]]:
        return self.read_captions()

    @property
    def keys(self) -> list[str]:
        """The records' keys."""
        return [key for key, _ in self._keys_captions]

    @property
    def captions(self) -> list[str]:
        """The records' captions; "" where the dataset has none."""
        return [caption for _, caption in self._keys_captions]


def collate(
    n: int,
    numbers: np.ndarray,
    records: Sequence[tuple[Block, int]],
    members: Sequence[str],
    length: int,
    take: Take,
    each: Each = map,
) -> Batch:
    """The batch of samples `numbers` (b,), whose records are given as blocks and places in them.

    n: number of the global batch's first sample. length: rows to which `text` is padded with zeros; 0 = no padding.
    each: decodes PNGs. Raises ShardCorrupt for arrays that differ in shape, and for PNGs that cannot be decoded.
    """

    def read_captions() -> list[tuple[str, str]]:
        parsed = [block.record(place, ()) for block, place in records]
        return [(record.key, record.meta["caption"]) for record in parsed]

    return Batch(
        n=n,
        numbers=torch.from_numpy(numbers.copy()),
        tensors={name: gather(name, n, records, length if name == "text" else 0, take, each) for name in members},
        shards=torch.tensor([block.shard for block, _ in records], dtype=torch.int64),
        rows=torch.tensor([block.rows[place] for block, place in records], dtype=torch.int64),
        read_captions=read_captions,
    )


def gather(
    name: str, n: int, records: Sequence[tuple[Block, int]], length: int, take: Take, each: Each = map
) -> Tensor:
    """One member of all records, (b, ...). Raises ShardCorrupt for arrays that differ in shape or dtype."""
    if name == "pixels" and any(block.png for block, _ in records):
        return gather_pixels(n, records, take, each)
    first = records[0][0].columns[name]
    shape = first.shape(records[0][1])
    if length:
        shape = (length, *shape[1:])
    size = math.prod(shape) * first.dtype.itemsize
    out = take(len(records) * size)
    columns = {id(block): block.columns[name] for block, _ in records}
    if all(column.shapes == shape and column.dtype == first.dtype for column in columns.values()):
        starts = [columns[id(block)].starts[place] for block, place in records]
        parts = [block.data[start : start + size] for (block, _), start in zip(records, starts, strict=True)]
        np.concatenate(parts, out=out)  # releases the interpreter's lock while it copies
    else:
        row_bytes = size // max(length, 1)
        for i, (block, place) in enumerate(records):
            column = columns[id(block)]
            record_shape = column.shape(place)
            padded = (length, *record_shape[1:]) if length and record_shape[0] <= length else record_shape
            if padded != shape or column.dtype != first.dtype:
                raise ShardCorrupt(
                    f"{name} differs in shape within the batch at sample {n}: {record_shape} and {shape}"
                )
            count = record_shape[0] * row_bytes if length else size
            start = column.starts[place]
            out[i * size : i * size + count] = block.data[start : start + count]
            out[i * size + count : (i + 1) * size] = 0
    return torch.from_numpy(out.view(first.dtype).reshape(len(records), *shape))


def gather_pixels(n: int, records: Sequence[tuple[Block, int]], take: Take, each: Each) -> Tensor:
    """The pixels of all records, some or all of which hold them as PNGs, (b, 3, H, W) uint8. Raises ShardCorrupt."""
    shapes = [
        (3, block.png[1], block.png[0]) if block.png else block.columns["pixels"].shape(place)
        for block, place in records
    ]
    if other := next((shape for shape in shapes if shape != shapes[0]), None):
        raise ShardCorrupt(f"pixels differ in shape within the batch at sample {n}: {other} and {shapes[0]}")
    size = math.prod(shapes[0])
    out = take(len(records) * size).reshape(len(records), *shapes[0])

    def read(i: int) -> None:
        block, place = records[i]
        column = block.columns["pixels"]
        start = column.starts[place]
        data = block.data[start : start + math.prod(column.shape(place))]
        if not block.png:
            out[i] = data.reshape(shapes[0])
            return
        try:
            read_png(data, block.png, out[i])
        except ShardCorrupt as error:
            raise ShardCorrupt(f"record {block.record(place, ()).key}: {error}") from None

    for _ in each(read, range(len(records))):
        pass
    return torch.from_numpy(out)
