"""Finds the records of a finished cache that are never read, since they repeat an earlier one: duplicates of samples in
other shards, and near-duplicates of any sample before them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import FiltersConfig
from pipeline.data.format.records import npy_bytes, parse_npy
from pipeline.errors import DataError, NotFound, ShardCorrupt
from pipeline.storage.base import Storage
from preprocess.encoding.plan import Plan, hashes_key
from preprocess.filters import phash
from preprocess.filters.near import MOST, near_duplicates
from preprocess.source.recipe import Recipe, recipe_of_contract
from preprocess.source.sample import DIGEST_BYTES
from preprocess.units.naming import option
from preprocess.units.reports import Report

BUCKET_BYTES = 2


@dataclass(frozen=True)
class Excluded:
    """Records that are never read. pairs: their shard numbers and rows, (N, 2) int32, sorted. repeated, near: how many
    of them repeat one of another shard, and look like an earlier one."""

    pairs: np.ndarray
    repeated: int = 0
    near: int = 0


@dataclass(frozen=True)
class Hashes:
    """What is kept of each accepted sample of one unit, in order. digests: (N, 16) uint8, equal for duplicates, or
    (N, 0) where they are kept. looks: (N, 8) uint8, perceptual hashes, or (N, 0). buckets: (N,) uint16."""

    digests: np.ndarray
    looks: np.ndarray
    buckets: np.ndarray

    def to_npy(self) -> bytes:
        """Bytes of an .npy (N, D) uint8: digest, perceptual hash and bucket (little-endian) of each sample."""
        buckets = self.buckets.astype("<u2").view(np.uint8).reshape(-1, BUCKET_BYTES)
        return npy_bytes(np.concatenate([self.digests, self.looks, buckets], axis=1))


def hashes_of(data: bytes, filters: FiltersConfig) -> Hashes:
    """What `to_npy` gave under these filters. Raises ShardCorrupt."""
    table = parse_npy(memoryview(data))
    digests, looks = widths(filters)
    if table.dtype != np.uint8 or table.ndim != 2 or table.shape[1] != digests + looks + BUCKET_BYTES:
        raise ShardCorrupt(f"it is {table.dtype} {table.shape}")
    buckets = np.ascontiguousarray(table[:, digests + looks :]).view("<u2").reshape(-1)
    return Hashes(table[:, :digests], table[:, digests : digests + looks], buckets)


def widths(filters: FiltersConfig) -> tuple[int, int]:
    """Bytes of a digest and of a perceptual hash under these filters; 0 where there are none."""
    return DIGEST_BYTES * (filters.duplicates != "keep"), phash.BYTES * (filters.near_duplicates > 0)


def find_excluded(storage: Storage, plan: Plan, reports: Sequence[Report]) -> Excluded:
    """The records of samples that repeat an earlier one. Raises DataError for hashes that are damaged.

    Of equal samples, and of samples that look alike, the one in the unit with the lowest number stays, in whatever
    order the units were encoded. Takes about 50 bytes of memory per sample, and some 400 where looks are compared.
    """
    recipe = recipe_of_contract(plan.contract)
    bits = recipe.filters.near_duplicates
    if not 0 <= bits <= MOST:
        raise DataError(
            f"{storage.url}: its contract says filters.near_duplicates={bits}, and 0 to {MOST} are known: use a newer "
            "latentmill"
        )
    found, places, shard = list[Hashes](), list[np.ndarray](), 0
    for report in reports:
        facts = report.facts
        if facts["hashes_sha256"]:
            found.append(_read(storage, plan, facts, recipe))
            places.append(_places(found[-1].buckets, facts["shards"], plan, shard))
        shard += len(facts["shards"])
    if not found:
        return Excluded(np.empty((0, 2), dtype=np.int32))
    count = sum(len(one.buckets) for one in found)
    is_repeated = np.zeros(count, dtype=bool)
    if recipe.filters.duplicates != "keep":
        is_repeated = _repeated(np.concatenate([one.digests for one in found]))
    is_near = np.zeros(count, dtype=bool)
    if bits:
        looks = phash.as_numbers(np.concatenate([one.looks for one in found]))
        others = np.flatnonzero(~is_repeated)
        is_near[others] = near_duplicates(looks[others], bits) >= 0
    pairs = _rows(np.concatenate(places)[is_repeated | is_near], recipe.variants)
    return Excluded(pairs, int(is_repeated.sum()) * recipe.variants, int(is_near.sum()) * recipe.variants)


def forget_it(name: str) -> str:
    """What to do about a unit whose files are damaged."""
    return f"run this once with {option('forget', [name])}, which takes the shard back, then again without"


def _read(storage: Storage, plan: Plan, facts: dict[str, Any], recipe: Recipe) -> Hashes:
    """The hashes of a unit. Raises DataError."""
    key = hashes_key(facts["unit"])
    try:
        data = storage.get(key)
    except NotFound:
        data = b""
    is_right = hashlib.sha256(data).hexdigest() == facts["hashes_sha256"]
    try:
        hashes = hashes_of(data, recipe.filters) if is_right else None
    except ShardCorrupt:
        hashes = None
    if hashes is None or len(hashes.buckets) != facts["accepted"]:
        raise DataError(f"{storage.locate(key)} is damaged: {forget_it(plan.names[facts['unit']])}")
    return hashes


def _repeated(digests: np.ndarray) -> np.ndarray:
    """(N,) bool: whether a digest of (N, D) uint8 occurs before."""
    keys = np.ascontiguousarray(digests).view(f"V{DIGEST_BYTES}").reshape(-1)
    _, first_indices = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first_indices] = False
    return repeated


def _rows(places: np.ndarray, variants: int) -> np.ndarray:
    """(N, 2) int32, sorted: shard number and row of every record of these samples."""
    rows = places[:, None, 1] * variants + np.arange(variants)
    pairs = np.stack([np.broadcast_to(places[:, :1], rows.shape), rows], axis=-1).reshape(-1, 2)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].astype(np.int32)


def _places(buckets: np.ndarray, shards: list[dict[str, Any]], plan: Plan, first_shard: int) -> np.ndarray:
    """(N, 2) int64: shard number of each sample of a unit, and the number of samples before it in that shard."""
    numbers = {plan.contract.buckets.index(tuple(shard["size"])): i for i, shard in enumerate(shards)}
    places = np.empty((len(buckets), 2), dtype=np.int64)
    for bucket, i in numbers.items():
        in_bucket = buckets == bucket
        places[in_bucket, 0], places[in_bucket, 1] = first_shard + i, np.arange(in_bucket.sum())
    return places
