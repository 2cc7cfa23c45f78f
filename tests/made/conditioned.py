"""Makes small caches with conditions, or without captions, for tests of code that reads them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from made.cache import LENGTH, WIDTH, write_unit
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import UNCOND, Manifest, Statistics, commit_manifest
from pipeline.data.format.members import member_shape
from pipeline.data.format.pixels import png_bytes
from pipeline.data.format.records import Record, npy_bytes, record_key
from pipeline.storage.urls import open_storage

MOST = {"cond.class": 3, "cond.labels": 7}


def record(one: Contract, unit: int, row: int, size: tuple[int, int]) -> Record:
    """A record whose values identify its unit and row. size: (width, height) of its crop."""
    rng = np.random.default_rng([unit, row])
    arrays: dict[str, np.ndarray] = {}
    for member in one.members:
        found = (2 + row % 2, *member.shape[1:]) if member.name == "text" else None  # trimmed texts differ in length
        shape = member_shape(member, one, size, found)
        if is_png(one, member.name):
            pixels = rng.integers(0, 256, (3, size[1], size[0])).astype(np.uint8)  # as of the cache of arrays
            arrays[member.name] = png_bytes(pixels.transpose(1, 2, 0))
        elif member.dtype in ("uint8", "int32"):
            arrays[member.name] = rng.integers(0, MOST.get(member.name, 256), shape).astype(member.dtype)
        else:
            arrays[member.name] = rng.standard_normal(shape).astype(member.dtype)
    meta: dict[str, Any] = {"key": f"source/{unit}.{row}"}
    return Record(record_key(unit, row), arrays, meta | ({"caption": f"{row} of {unit}"} if one.text else {}))


def is_png(one: Contract, name: str) -> bool:
    """Whether records hold this array as a PNG."""
    return name == "pixels" and one.pixels == "png"


def make_conditioned(url: str, one: Contract, sizes: list[int]) -> Manifest:
    """Writes a cache of this contract whose shards hold `sizes` records each, of its crop sizes in turn."""
    storage = open_storage(url)
    written = []
    for unit, count in enumerate(sizes):
        size = one.buckets[unit % len(one.buckets)]
        written.append(write_unit(storage, unit, size, [record(one, unit, row, size) for row in range(count)], {}))
    shards, units = zip(*written, strict=True)
    uncond = npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16))
    if one.text:
        storage.put(UNCOND, uncond)
    manifest = Manifest(
        contract=one,
        units=units,
        shards=shards,
        uncond_sha256=hashlib.sha256(uncond).hexdigest() if one.text else "",
        statistics=Statistics(mean=(0.0,) * one.latent_shape[0], std=(1.0,) * one.latent_shape[0]),
        sources=("{00000..00009}.tar",),
    )
    commit_manifest(storage, manifest)
    return manifest
