"""A rank's part of a global batch, put together from verified blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.data.reading.reader import Block
from pipeline.errors import ShardCorrupt

Take = Callable[[int], np.ndarray]
"""Memory for a number of bytes: (count,) uint8."""


@dataclass
class Batch:
    """One rank's part of one global batch.

    n: number of the global batch's first sample. numbers: (b,) int64, this rank's sample numbers. tensors: (b, ...) in
    the cache's own dtypes, by member name ("moments" float16 (b, 2C, h, w), "text" float16 (b, L, D), "cond.NAME"), on
    the stream's device. shards, rows: (b,) int64, number of each record's shard and row in its tar. about: (key,
    caption) of each record, read when asked for. wait_s: seconds that the loop waited for this batch.
    """

    n: int
    numbers: Tensor
    tensors: dict[str, Tensor]
    shards: Tensor
    rows: Tensor
    about: Callable[[], list[tuple[str, str]]]
    wait_s: float = 0.0

    @cached_property
    def _about(self) -> list[tuple[str, str]]:
        return self.about()

    @property
    def keys(self) -> list[str]:
        """Record keys."""
        return [key for key, _ in self._about]

    @property
    def captions(self) -> list[str]:
        return [caption for _, caption in self._about]


def collate(
    n: int, numbers: np.ndarray, found: Sequence[tuple[Block, int]], members: Sequence[str], length: int, take: Take
) -> Batch:
    """The records `found`, blocks and places in them, as sample numbers `numbers`. length: rows that `text` is padded
    to with zeros; 0 for none. Raises ShardCorrupt for arrays that differ in shape."""

    def about() -> list[tuple[str, str]]:
        records = [block.record(place, ()) for block, place in found]
        return [(record.key, record.meta["caption"]) for record in records]

    return Batch(
        n=n,
        numbers=torch.from_numpy(numbers.copy()),
        tensors={name: gather(name, n, found, length if name == "text" else 0, take) for name in members},
        shards=torch.tensor([block.shard for block, _ in found], dtype=torch.int64),
        rows=torch.tensor([block.rows[place] for block, place in found], dtype=torch.int64),
        about=about,
    )


def gather(name: str, n: int, found: Sequence[tuple[Block, int]], length: int, take: Take) -> Tensor:
    """One array of each record, (b, ...)."""
    first = found[0][0].columns[name]
    shape = first.shape(found[0][1])
    if length:
        shape = (length, *shape[1:])
    size = math.prod(shape) * first.dtype.itemsize
    out = take(len(found) * size)
    columns = {id(block): block.columns[name] for block, _ in found}
    if all(column.shapes == shape and column.dtype == first.dtype for column in columns.values()):
        starts = [columns[id(block)].starts[place] for block, place in found]
        parts = [block.data[start : start + size] for (block, _), start in zip(found, starts, strict=True)]
        np.concatenate(parts, out=out)  # copies without the interpreter's lock
    else:
        row_bytes = size // max(length, 1)
        for i, (block, place) in enumerate(found):
            column = columns[id(block)]
            own = column.shape(place)
            padded = (length, *own[1:]) if length and own[0] <= length else own
            if padded != shape or column.dtype != first.dtype:
                raise ShardCorrupt(f"{name} differs in shape within the batch at sample {n}: {own} and {shape}")
            count = own[0] * row_bytes if length else size
            start = column.starts[place]
            out[i * size : i * size + count] = block.data[start : start + count]
            out[i * size + count : (i + 1) * size] = 0
    return torch.from_numpy(out.view(first.dtype).reshape(len(found), *shape))
