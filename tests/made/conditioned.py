"""Makes small caches with conditions, or without captions, for tests of code that reads them."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np

from made.cache import LENGTH, WIDTH
from pipeline.data.format.contract import Contract, canonical_json
from pipeline.data.format.manifest import UNCOND, Manifest, ShardEntry, Statistics, UnitEntry, commit_manifest
from pipeline.data.format.members import member_shape
from pipeline.data.format.pixels import png_bytes
from pipeline.data.format.records import Record, npy_bytes, record_key
from pipeline.storage.urls import open_storage
from preprocess.encoding.writer import ShardWriter

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
    units, entries = [], []
    for unit, count in enumerate(sizes):
        tar = io.BytesIO()
        writer = ShardWriter(tar)
        size = one.buckets[unit % len(one.buckets)]
        for row in range(count):
            writer.add(record(one, unit, row, size))
        facts = writer.finish()
        index = canonical_json(facts)
        storage.put(f"{unit:06d}.tar", tar.getvalue())
        storage.put(f"{unit:06d}.index.json", index)
        entries.append(
            ShardEntry(
                name=f"{unit:06d}.tar",
                unit=unit,
                size=size,
                samples=count,
                bytes=facts["bytes"],
                sha256=facts["sha256"],
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )
        units.append(
            UnitEntry(
                source=f"{unit:05d}.tar",
                source_sha256="c" * 64,
                source_bytes=1,
                read=count,
                accepted=count,
                rejected={},
            )
        )
    uncond = npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16))
    if one.text:
        storage.put(UNCOND, uncond)
    manifest = Manifest(
        contract=one,
        units=tuple(units),
        shards=tuple(entries),
        uncond_sha256=hashlib.sha256(uncond).hexdigest() if one.text else "",
        statistics=Statistics(mean=(0.0,) * one.latent_shape[0], std=(1.0,) * one.latent_shape[0]),
        sources=("{00000..00009}.tar",),
    )
    commit_manifest(storage, manifest)
    return manifest
