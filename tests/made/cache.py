"""Makes small caches without encoders, for tests of code that reads them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.conditions.facts import Conditions, LabelFacts
from pipeline.config import FiltersConfig, LimitsConfig
from pipeline.data.format.contract import Contract, Member, TextFacts, canonical_json, stored_filters, stored_limits
from pipeline.data.format.manifest import UNCOND, Manifest, ShardEntry, Statistics, UnitEntry, commit_manifest
from pipeline.data.format.records import Record, npy_bytes, record_key
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from preprocess.encoding.writer import Moments, ShardWriter

LATENT = (4, 2, 2)
LENGTH, WIDTH = 3, 8


def contract(**changes: object) -> Contract:
    fields: dict[str, object] = {
        "encoders": {"name": "none"},
        "vae_sha256": "a" * 64,
        "text_sha256": "b" * 64,
        "resolution": 16,
        "buckets": ((16, 16),),
        "crop": "centre",
        "seed": 0,
        "flip": False,
        "filters": stored_filters(FiltersConfig()),
        "limits": stored_limits(LimitsConfig()),
        "resize": "lanczos",
        "latent_shape": LATENT,
        "downsampling": 8,
        "scale": 0.5,
        "shift": 0.25,
        "caption_key": "txt",
        "text": TextFacts(layer="last", length=LENGTH, width=WIDTH, pad=0, eot=5),
        "members": (
            Member(name="moments", shape=(8, 2, 2), dtype="float16"),
            Member(name="text", shape=(LENGTH, WIDTH), dtype="float16"),
            Member(name="cond.labels", shape=(16, 16), dtype="uint8"),
        ),
        "batch": 4,
        "device": "cpu",
        "threads": 1,
        "conditions": Conditions(labels=LabelFacts(count=256, grid=8)),
        "versions": {},
    }
    return Contract(**{**fields, **changes})  # type: ignore[arg-type]


def sized(side: int) -> dict[str, object]:
    """What a contract says of latents of another side."""
    members = contract().members
    return {
        "resolution": 8 * side,
        "buckets": ((8 * side, 8 * side),),
        "latent_shape": (4, side, side),
        "members": (
            dataclasses.replace(members[0], shape=(8, side, side)),
            members[1],
            dataclasses.replace(members[2], shape=(8 * side, 8 * side)),
        ),
    }


def record(unit: int, row: int, side: int = 2) -> Record:
    """A record whose values identify its unit and row. side: of its latent."""
    rng = np.random.default_rng([unit, row])
    return Record(
        record_key(unit, row),
        {
            "moments": rng.standard_normal((8, side, side)).astype(np.float16),
            "text": np.full((LENGTH, WIDTH), unit + row / 1024, dtype=np.float16),
            "cond.labels": np.full((8 * side, 8 * side), row % 256, dtype=np.uint8),
        },
        {"key": f"source/{unit}.{row}", "caption": f"picture {row} of shard {unit}"},
    )


def write_unit(
    storage: Storage, unit: int, size: tuple[int, int], records: Sequence[Record], rejected: Mapping[str, int]
) -> tuple[ShardEntry, UnitEntry]:
    """Writes the records' tar and its index. size: (width, height) of their crops. Returns what a manifest says."""
    tar = io.BytesIO()
    writer = ShardWriter(tar)
    for one in records:
        writer.add(one)
    facts = writer.finish()
    index = canonical_json(facts)
    storage.put(f"{unit:06d}.tar", tar.getvalue())
    storage.put(f"{unit:06d}.index.json", index)
    shard = ShardEntry(
        name=f"{unit:06d}.tar",
        unit=unit,
        size=size,
        samples=len(records),
        bytes=facts["bytes"],
        sha256=facts["sha256"],
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    entry = UnitEntry(
        source=f"{unit:05d}.tar",
        source_sha256="c" * 64,
        source_bytes=1,
        read=len(records) + sum(rejected.values()),
        accepted=len(records),
        rejected=dict(rejected),
    )
    return shard, entry


def make_cache(url: str, sizes: list[int], side: int = 2) -> Manifest:
    """Writes a cache whose shards hold `sizes` records each. side: of its latents. Returns its manifest."""
    storage = open_storage(url)
    moments, written = Moments(), []
    for unit, size in enumerate(sizes):
        records = [record(unit, row, side) for row in range(size)]
        for one in records:
            moments.add((one.members["moments"][:4].astype(np.float64) - 0.25) * 0.5)
        written.append(write_unit(storage, unit, (8 * side, 8 * side), records, {"image_missing": 1}))
    shards, units = zip(*written, strict=True)
    uncond = npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16))
    storage.put(UNCOND, uncond)
    manifest = Manifest(
        contract=contract(**({} if side == 2 else sized(side))),
        units=units,
        shards=shards,
        uncond_sha256=hashlib.sha256(uncond).hexdigest(),
        statistics=Statistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist())),
        sources=("{00000..00009}.tar",),
    )
    commit_manifest(storage, manifest)
    return manifest
