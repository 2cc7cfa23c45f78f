"""Several captions of a record: which one a sample sees, and its arrays.

A record of such a cache holds `captions` (K, 1 + L) int32: in a row the number of the key that a caption was read from,
among the contract's `text.keys`, then the caption's L token ids. Captions stand in the order of their keys; rows
without one follow, and are -1 throughout. `text`, where states are stored, is (K, L, D), or, trimmed, one caption's
states after the other's. The record's json holds the captions themselves, in the same order.

Readers see one caption: `tokens` (L,) and `text` (L, D), as of a cache with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.data.format.contract import TextFacts
from pipeline.data.format.members import NO_CAPTION, OF_CAPTIONS
from pipeline.data.format.records import Record
from pipeline.data.order.mixture import whole_weights
from pipeline.errors import ShardCorrupt
from pipeline.philox import Stream, words_numpy

# --------------------------------------------------------------------------------------------------------------------
# Which one


def draw(seed: int, numbers: np.ndarray, keys_NK: np.ndarray, text: TextFacts) -> np.ndarray:
    """The caption that each sample sees: its number (N,) int64 in the record, from 0.

    numbers: (N,) samples. keys_NK: the first column of the records' `captions`. A key is drawn by its weight, then one
    of the key's captions, each by a word of Philox of (seed, CAPTION, number): a list of captions shares the weight of
    its key evenly. A key of which a record has no caption is not drawn. Raises ShardCorrupt, as `require_keys`.
    """
    require_keys(keys_NK, text)
    words = words_numpy(seed, Stream.CAPTION, numbers, 2).astype(np.uint64)
    counts = (keys_NK[:, :, None] == np.arange(len(text.keys))).sum(axis=1).astype(np.uint64)
    shares = np.cumsum(np.where(counts > 0, _chances(text.weights, len(text.keys)), 0), axis=1, dtype=np.uint64)
    place = words[:, 0] * shares[:, -1] >> np.uint64(32)
    key = (shares <= place[:, None]).sum(axis=1)
    among = words[:, 1] * counts[np.arange(len(key)), key] >> np.uint64(32)
    before = ((keys_NK >= 0) & (keys_NK < key[:, None])).sum(axis=1)
    return before + among.astype(np.int64)


def require_keys(keys_NK: np.ndarray, text: TextFacts) -> None:
    """Raise ShardCorrupt unless each record has a caption that may be drawn, keys that the contract names, in order,
    and no caption after a row without one."""
    there, chances = keys_NK >= 0, _chances(text.weights, len(text.keys))
    right = there[:, 0] & ((keys_NK >= NO_CAPTION) & (keys_NK < len(text.keys))).all(axis=1)
    right &= (there[:, :-1] | ~there[:, 1:]).all(axis=1)
    right &= ((np.diff(keys_NK, axis=1) >= 0) | ~there[:, 1:]).all(axis=1)
    if right.all():
        right &= ((chances > 0)[keys_NK] & there).any(axis=1)
    if not right.all():
        raise ShardCorrupt(
            f"captions holds keys that are no captions of text.keys in their order ({keys_NK[~right][0][:8].tolist()})"
        )


def row_of(which: str, seed: int, number: int, captions: np.ndarray, text: TextFacts) -> int:
    """The caption of record `number` that an evaluation takes. which: its number from 1, of a record that has fewer the
    last one; or "drawn", as for a sample of that number. captions: (K, 1 + L). Raises ShardCorrupt."""
    keys_NK = captions[None, :, 0]
    if which == "drawn":
        return int(draw(seed, np.array([number]), keys_NK, text)[0])
    require_keys(keys_NK, text)
    return min(int(which), int((keys_NK >= 0).sum())) - 1


@lru_cache(maxsize=64)
def _chances(weights: Sequence[float], count: int) -> np.ndarray:
    """(keys,) uint64 in the proportions of the weights; their sum is below 2**32."""
    if not weights:
        return np.ones(count, dtype=np.uint64)
    chances = np.zeros(count, dtype=np.uint64)
    chances[np.array(weights) > 0] = whole_weights([weight for weight in weights if weight > 0])
    return chances


# --------------------------------------------------------------------------------------------------------------------
# Its arrays


def array_of(name: str, arrays: Mapping[str, np.ndarray], row: int, text: TextFacts) -> np.ndarray:
    """One caption's `tokens` (L,) int32 or `text` (L, D), trimmed (l, D), as a view. arrays: of a record with several.
    Raises ShardCorrupt for trimmed states that do not end where the ids do."""
    captions = arrays["captions"]
    if name == "tokens":
        return captions[row, 1:]
    if text.storage == "full":
        return arrays["text"][row]
    lengths = lengths_of(captions, text)
    if sum(lengths) != len(arrays["text"]):
        raise ShardCorrupt(f"text holds states of {len(arrays['text'])} tokens, and its captions have {sum(lengths)}")
    start = sum(lengths[:row])
    return arrays["text"][start : start + lengths[row]]


def lengths_of(captions: np.ndarray, text: TextFacts) -> list[int]:
    """Tokens of each caption with start and end, from `captions` (K, 1 + L). Raises ShardCorrupt."""
    ends = captions[captions[:, 0] >= 0, 1:] == text.eot
    if not ends.any(axis=1).all():
        raise ShardCorrupt("captions holds one without an end token")
    return (ends.argmax(axis=1) + 1).tolist()


def words_of(meta: Mapping[str, Any], row: int) -> str:
    """Caption number `row` of a record, from its json. Raises ShardCorrupt."""
    captions = meta.get("captions")
    if type(captions) is not list or row >= len(captions) or type(captions[row]) is not str:
        raise ShardCorrupt(f"a record's json has no caption number {row + 1}, whose ids it holds")
    return captions[row]


def of_one_caption(
    records: Iterable[Record], text: TextFacts | None, which: str = "1", seed: int = 0
) -> Iterator[Record]:
    """Records, read with the arrays `held`, as readers see them: with one caption and its arrays. which, seed: as
    row_of has them. Records without captions pass as they are. Raises ShardCorrupt."""
    for number, record in enumerate(records):
        if text is None or text.captions == 1 or "captions" not in record.members:
            yield record
            continue
        row = row_of(which, seed, number, record.members["captions"], text)
        members = {name: array for name, array in record.members.items() if name not in ("captions", "text")}
        members |= {
            name: array_of(name, record.members, row, text)
            for name in OF_CAPTIONS
            if name == "tokens" or name in record.members
        }
        yield replace(record, members=members, meta={**record.meta, "caption": words_of(record.meta, row)})
