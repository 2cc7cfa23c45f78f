"""Finds hashes that differ from an earlier one in few bits, among millions.

Hashes are taken in order. One that is near to an earlier hash that was kept is left out; all others are kept. So a
chain of small changes does not leave out what is far from all that is kept, and later hashes change nothing about
earlier ones.

Of 64 bits in `most` + 2 bands, two hashes that differ in at most `most` bits have two bands in common (the pigeonhole
principle; Norouzi et al. 2012, "Fast Search in Hamming Space with Multi-Index Hashing", section 2). There is a table
for each pair of bands, in which the hashes that have both in common stand side by side; only those are compared. Random
hashes share 21 bits of a table with one in two million, so nearly nothing is compared in vain.

Memory: 24 bytes a hash for each of the tables (15 of them for 4 bits), and about 150 MB for what is compared at a time,
however many hashes are alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

BITS, MOST = 64, 4
TOGETHER = 1 << 16  # hashes that are taken at a time
PAIRS = 1 << 22  # pairs that are compared at a time
CROWDED = 1 << 16  # pairs within a table beyond which fewer hashes are taken at a time
FEW = 256  # hashes that are always taken together
FAR = np.iinfo(np.int64).max
SHIFT, LOW = 32, (1 << 32) - 1  # two numbers of hashes in one of 64 bits


def near_duplicates(hashes: np.ndarray, most: int) -> np.ndarray:
    """(N,) int64: for each hash of (N,) uint64 the index of the first kept one that is near to it, -1 where it is kept.
    most: bits, 1 to MOST, in which near ones differ at most; equal ones are always near."""
    assert 1 <= most <= MOST, "more bits need other tables"
    unique, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # different hashes by their first place
    search = _Search(unique[order], most)
    for start in range(0, len(order), TOGETHER):
        search.take(np.arange(start, min(start + TOGETHER, len(order))))
    found = np.empty(len(order), dtype=np.int64)  # by number of the sorted hash: place of the kept one
    found[order] = np.where(search.near < 0, first[order], first[order][search.near])
    found = found[which.reshape(-1)]
    return np.where(found == np.arange(len(hashes)), -1, found)


class _Search:
    """Different hashes (N,) uint64 in order; `take` all of them in order. near: as `near_duplicates` gives it."""

    def __init__(self, hashes: np.ndarray, most: int) -> None:
        self.hashes, self.most = hashes, most
        self.near = np.full(len(hashes), -1, dtype=np.int64)
        self._masks = masks(most)
        self._tables = [_Table() for _ in self._masks]

    def take(self, numbers: np.ndarray) -> None:
        """Decides on the next hashes. numbers: of consecutive ones, int64."""
        best = np.full(len(numbers), FAR)
        for table, mask in zip(self._tables, self._masks, strict=True):
            for mine, kept in table.candidates(self.hashes[numbers] & mask):
                hit = self._are_near(numbers[mine], kept)
                np.minimum.at(best, mine[hit], kept[hit])
        self.near[numbers] = np.where(best == FAR, -1, best)
        rest = numbers[best == FAR]
        if len(rest) > FEW and any(_pairs(self.hashes[rest] & mask) > CROWDED for mask in self._masks):
            half = len(rest) // 2
            self.take(rest[:half])
            self.take(rest[half:])
            return
        self._decide(rest)
        kept = rest[self.near[rest] < 0]
        for table, mask in zip(self._tables, self._masks, strict=True):
            table.add(self.hashes[kept] & mask, kept)

    def _decide(self, numbers: np.ndarray) -> None:
        """Keeps or leaves out hashes that are near to nothing kept so far, but maybe to each other."""
        pairs = [np.empty(0, dtype=np.int64)]
        for mask in self._masks:
            table = _Table()
            keys = self.hashes[numbers] & mask
            table.add(keys, numbers)
            for mine, others in table.candidates(keys):
                later, earlier = numbers[mine], others
                ordered = earlier < later
                later, earlier = later[ordered], earlier[ordered]
                hit = self._are_near(later, earlier)
                pairs.append(later[hit] << SHIFT | earlier[hit])
        for pair in np.unique(np.concatenate(pairs)).tolist():  # in the order of the later ones
            later, earlier = pair >> SHIFT, pair & LOW
            if self.near[later] < 0 and self.near[earlier] < 0:
                self.near[later] = earlier

    def _are_near(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.bitwise_count(self.hashes[one] ^ self.hashes[other]) <= self.most


class _Table:
    """Numbers of hashes, sorted by the key that they have under one mask."""

    def __init__(self) -> None:
        self._keys, self._numbers = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        places = np.searchsorted(self._keys, keys[order], "right")
        self._keys = np.insert(self._keys, places, keys[order])
        self._numbers = np.insert(self._numbers, places, numbers[order])

    def candidates(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (index of a key, number of a hash in the table that has this key) for all such pairs, about PAIRS at
        a time."""
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(self._keys, keys[order], "left")
        counts = np.searchsorted(self._keys, keys[order], "right") - starts
        ends = np.cumsum(counts)
        begin = 0
        while begin < len(keys):
            done = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + PAIRS, "right")))
            some = counts[begin:end]
            if some.any():
                within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
                yield np.repeat(order[begin:end], some), self._numbers[np.repeat(starts[begin:end], some) + within]
            begin = end


def masks(most: int) -> list[np.uint64]:
    """A mask for each pair of `most` + 2 bands of the 64 bits."""
    count = most + 2
    edges = [BITS * i // count for i in range(count + 1)]
    bands = [sum(1 << bit for bit in range(edges[i], edges[i + 1])) for i in range(count)]
    return [np.uint64(one | other) for one, other in itertools.combinations(bands, 2)]


def _pairs(keys: np.ndarray) -> int:
    """Number of pairs of equal keys."""
    counts = np.unique(keys, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())
