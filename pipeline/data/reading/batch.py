"""A rank's part of a global batch, collated from verified blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.data.format.members import OF_CAPTIONS
from pipeline.data.format.pixels import read_png
from pipeline.data.reading.captions import draw, words_of
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
    this batch. chosen: (b,) int64 on the CPU, number in its record of the caption that each sample sees, 0 where there
    is one; None where no record of the dataset has several, or none is read.
    """

    n: int
    numbers: Tensor
    tensors: dict[str, Tensor]
    shards: Tensor
    rows: Tensor
    read_captions: Callable[[], list[tuple[str, str]]]
    wait_s: float = 0.0
    chosen: Tensor | None = None

    @cached_property
    def _keys_captions(self) -> list[tuple[str, str]]:
        return self.read_captions()

    @property
    def keys(self) -> list[str]:
        """The records' keys."""
        return [key for key, _ in self._keys_captions]

    @property
    def captions(self) -> list[str]:
        """The records' captions, of several the one that is seen; "" where the dataset has none."""
        return [caption for _, caption in self._keys_captions]


def collate(
    n: int,
    numbers: np.ndarray,
    records: Sequence[tuple[Block, int]],
    members: Sequence[str],
    length: int,
    take: Take,
    each: Each = map,
    seed: int | None = None,
) -> Batch:
    """The batch of samples `numbers` (b,), whose records are given as blocks and places in them.

    n: number of the global batch's first sample. length: rows to which `text` is padded with zeros; 0 = no padding.
    each: decodes PNGs. seed: by which each sample's caption is drawn where records hold several; None where no record
    of the dataset does. Raises ShardCorrupt for arrays that differ in shape, and for PNGs that cannot be decoded.
    """
    chosen = None if seed is None else choose(seed, numbers, records)

    def read_captions() -> list[tuple[str, str]]:
        parsed = [block.record(place, ()) for block, place in records]
        if chosen is None:
            return [(record.key, record.meta["caption"]) for record in parsed]
        return [
            (record.key, record.meta["caption"] if block.text is None else words_of(record.meta, row))
            for record, (block, _), row in zip(parsed, records, chosen.tolist(), strict=True)
        ]

    def member(name: str) -> Tensor:
        padded = length if name == "text" else 0
        if chosen is not None and name in OF_CAPTIONS:
            return gather_captions(name, n, records, chosen, padded, take)
        return gather(name, n, records, padded, take, each)

    return Batch(
        n=n,
        numbers=torch.from_numpy(numbers.copy()),
        tensors={name: member(name) for name in members},
        shards=torch.tensor([block.shard for block, _ in records], dtype=torch.int64),
        rows=torch.tensor([block.rows[place] for block, place in records], dtype=torch.int64),
        read_captions=read_captions,
        chosen=None if chosen is None else torch.from_numpy(chosen),
    )


def choose(seed: int, numbers: np.ndarray, records: Sequence[tuple[Block, int]]) -> np.ndarray:
    """The caption that each sample sees, (b,) int64: a function of (seed, sample number) and of the record alone."""
    chosen = np.zeros(len(records), dtype=np.int64)
    for text in {block.text for block, _ in records if block.text is not None}:
        rows = [i for i, (block, _) in enumerate(records) if block.text == text]
        keys = np.stack([records[i][0].array("captions", records[i][1])[:, 0] for i in rows])
        try:
            chosen[rows] = draw(seed, numbers[rows], keys, text)
        except ShardCorrupt as error:
            raise ShardCorrupt(f"a record of the batch at samples {numbers[0]} to {numbers[-1]}: {error}") from None
    return chosen


def gather_captions(
    name: str, n: int, records: Sequence[tuple[Block, int]], chosen: np.ndarray, length: int, take: Take
) -> Tensor:
    """`gather` for text and tokens of the chosen captions. Raises ShardCorrupt."""
    arrays = [block.of_caption(name, place, row) for (block, place), row in zip(records, chosen.tolist(), strict=True)]
    shape, dtype = (length or len(arrays[0]), *arrays[0].shape[1:]), arrays[0].dtype
    out = take(len(records) * math.prod(shape) * dtype.itemsize).view(dtype).reshape(len(records), *shape)
    for one, array in zip(out, arrays, strict=True):
        fits = len(array) <= length if length else len(array) == shape[0]
        if not fits or array.shape[1:] != shape[1:] or array.dtype != dtype:
            raise ShardCorrupt(f"{name} differs in shape within the batch at sample {n}: {array.shape} and {shape}")
        one[: len(array)] = array
        one[len(array) :] = 0
    return torch.from_numpy(out)


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
