"""Caches of random latents, without encoders: what the benchmarks of the stream read.

Values are random bits of finite floats, so that nothing compresses and every record differs; captions are words.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from pipeline.config import FiltersConfig, LimitsConfig
from pipeline.data.format.contract import Contract, Member, TextFacts, canonical_json, stored_filters, stored_limits
from pipeline.data.format.manifest import UNCOND, Manifest, ShardEntry, Statistics, UnitEntry, commit_manifest
from pipeline.data.format.records import Record, npy_bytes, record_key
from pipeline.storage.base import Storage
from preprocess.encoding.writer import ShardWriter

WORDS = ("small", "large", "red", "green", "house", "river", "under", "beside", "the", "a", "bright", "old")


@dataclass(frozen=True, kw_only=True)
class Latents:
    """A cache to be made. side: of a latent; text: full states or tokens, of so many tokens (length) and so wide;
    captions: of each image, of which several are stored as tokens;
    shard_bytes: about, of a tar: as large as mosaicml-streaming's files in its documentation, and put into a bucket in
    one part."""

    name: str
    side: int
    text: Literal["full", "tokens"]
    samples: int
    shard_bytes: int = 60_000_000
    length: int = 77
    width: int = 768
    captions: int = 1

    @property
    def members(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype by name, in the order in which they stand in a record."""
        text = {"full": ("text", (self.length, self.width), "float16"), "tokens": ("tokens", (self.length,), "int32")}[
            self.text
        ]
        if self.captions > 1:
            text = ("captions", (self.captions, 1 + self.length), "int32")
        return {"moments": ((8, self.side, self.side), "float16"), text[0]: text[1:]}

    @property
    def sample_bytes(self) -> int:
        """Of a sample's arrays."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.members.values())


LATENTS = {
    one.name: one
    for one in (
        Latents(name="sd512", side=64, text="full", samples=40_960),
        Latents(name="small", side=32, text="tokens", samples=196_608),
    )
}


def samples(preset: Latents, shard: int, first: int, last: int) -> Iterator[Record]:
    """Records first to last - 1, which are those of a shard; the same in every process."""
    for number in range(first, last):
        rng = np.random.default_rng([preset.side, number])
        arrays: dict[str, np.ndarray] = {}
        for name, (shape, dtype) in preset.members.items():
            bits = rng.integers(0, 2**63, -(-int(np.prod(shape)) // 4), dtype=np.uint64).view(np.uint16)
            flat = bits[: int(np.prod(shape))]
            # Below 0x7800 all halves are finite and positive.
            arrays[name] = ((flat % 0x7800).view(np.float16) if dtype == "float16" else flat.astype(dtype)).reshape(
                shape
            )
        caption = " ".join(rng.choice(WORDS, size=int(rng.integers(6, 16))))
        if preset.captions > 1:
            arrays["captions"][:, 0] = 0  # all are of one key
        meta: dict[str, Any] = {"caption": caption, "key": f"{number // 10_000:05d}/{number:09d}"}
        meta |= {"width": 512, "height": 512}
        meta |= {"captions": [caption] * preset.captions} if preset.captions > 1 else {}
        yield Record(record_key(shard, number - first), arrays, meta)


def write_cache(preset: Latents, storage: Storage) -> Manifest:
    """A whole dataset, with index and manifest."""
    shards = max(1, round(preset.samples * preset.sample_bytes / preset.shard_bytes))
    borders = [preset.samples * shard // shards for shard in range(shards + 1)]
    entries, units = [], []
    for shard, (first, last) in enumerate(pairwise(borders)):
        tar = io.BytesIO()
        writer = ShardWriter(tar)
        for one in samples(preset, shard, first, last):
            writer.add(one)
        facts = writer.finish()
        index = canonical_json(facts)
        storage.put(f"{shard:06d}.tar", tar.getvalue())
        storage.put(f"{shard:06d}.index.json", index)
        entries.append(
            ShardEntry(
                name=f"{shard:06d}.tar",
                unit=shard,
                size=(8 * preset.side, 8 * preset.side),
                samples=last - first,
                bytes=facts["bytes"],
                sha256=facts["sha256"],
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )
        units.append(
            UnitEntry(
                source=f"{shard:06d}.tar",
                source_sha256="0" * 64,
                source_bytes=1,
                read=last - first,
                accepted=last - first,
                rejected={},
            )
        )
    uncond = npy_bytes(np.zeros((preset.length, preset.width), dtype=np.float16))
    storage.put(UNCOND, uncond)
    manifest = Manifest(
        contract=_contract(preset),
        units=tuple(units),
        shards=tuple(entries),
        uncond_sha256=hashlib.sha256(uncond).hexdigest(),
        statistics=Statistics(mean=(0.0,) * 4, std=(1.0,) * 4),
        sources=("none",),
    )
    commit_manifest(storage, manifest)
    return manifest


def _contract(preset: Latents) -> Contract:
    """Facts that no encoder stands behind."""
    return Contract(
        encoders={"name": "none"},
        vae_sha256="",
        text_sha256="",
        resolution=8 * preset.side,
        buckets=((8 * preset.side, 8 * preset.side),),
        crop="centre",
        seed=0,
        flip=False,
        filters=stored_filters(FiltersConfig()),
        limits=stored_limits(LimitsConfig()),
        resize="lanczos",
        latent_shape=(4, preset.side, preset.side),
        downsampling=8,
        scale=0.18215,
        shift=0.0,
        caption_key="txt",
        text=TextFacts(
            storage=preset.text,
            layer="last",
            length=preset.length,
            width=preset.width,
            pad=49407,
            eot=49407,
            start=49406,
            vocabulary=1 << 16,
            captions=preset.captions,
            keys=("txt",) if preset.captions > 1 else (),
        ),
        members=tuple(Member(name=n, shape=shape, dtype=dtype) for n, (shape, dtype) in preset.members.items()),
        batch=1,
        device="cpu",
        threads=1,
        versions={},
    )
