"""Makes small caches of latents as other software writes them: MDS shards, .npz and .safetensors, tars of parts."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from made.encode import write_tar
from pipeline.config import IndexConfig
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import first_records
from pipeline.storage.urls import open_storage

CAPTIONS = ("a red circle", "a blue square", "a large green triangle", "two circles", "a dot")


def latent(row: int, height: int = 8, width: int = 8, channels: int = 4, seed: int = 0) -> np.ndarray:
    """Unscaled latents (C, h, w) float32 that look like Stable Diffusion's: deviation about 5.5."""
    values = np.random.default_rng([seed, row]).standard_normal((channels, height, width)) / 0.18215
    return values.astype(np.float32)


def logvar(row: int, height: int = 8, width: int = 8) -> np.ndarray:
    """Log-variances (4, h, w) float32, about -12."""
    return (np.random.default_rng([9, row]).standard_normal((4, height, width)) - 12).astype(np.float32)


def bits(array: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 as uint16: the upper half of float32, rounded down."""
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def tensors(**arrays: np.ndarray) -> bytes:
    return save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"format": "pt"})


def write_records(folder: Path, records: Sequence[Mapping[str, bytes]], tars: int = 1) -> Path:
    """Tars whose records have these files; record `row` of tar `t` has the key t_row."""
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-len(records) // tars)
    for tar in range(tars):
        members = []
        for row, files in enumerate(records[tar * each : (tar + 1) * each]):
            members += [(f"{tar}_{row}.{name}", data) for name, data in files.items()]
        write_tar(folder / f"{tar}.tar", members)
    return folder


# --------------------------------------------------------------------------------------------------------------------
# MDS

Columns = Mapping[str, str]
FIXED = {"int": 8, "int32": 4, "int64": 8, "float32": 4}


def size_of(encoding: str) -> int | None:
    """Bytes of a column that all samples share; None where they differ."""
    kind, _, rest = encoding.partition(":")
    dtype, _, sides = rest.partition(":")
    if kind == "ndarray" and sides:
        return int(np.prod([int(side) for side in sides.split(",")])) * np.dtype(dtype).itemsize
    return FIXED.get(kind)


def mds_bytes(columns: Columns, samples: Sequence[Mapping[str, bytes]]) -> bytes:
    """A shard: number of samples, offsets, the columns as JSON, then each sample's varying sizes and its columns."""
    names = sorted(columns)
    packed = []
    for sample in samples:
        varying = [len(sample[name]) for name in names if size_of(columns[name]) is None]
        packed.append(struct.pack(f"<{len(varying)}I", *varying) + b"".join(sample[name] for name in names))
    facts = json.dumps({"version": 2, "format": "mds", **described(columns)}, sort_keys=True).encode()
    start = 4 + 4 * (len(samples) + 1) + len(facts)
    offsets = np.cumsum([start, *map(len, packed)]).astype("<u4").tobytes()
    return struct.pack("<I", len(samples)) + offsets + facts + b"".join(packed)


def described(columns: Columns) -> dict[str, Any]:
    names = sorted(columns)
    return {
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [size_of(columns[name]) for name in names],
        "compression": None,
        "hashes": [],
        "size_limit": 1 << 26,
    }


def write_mds(
    folder: Path, columns: Columns, shards: Sequence[Sequence[Mapping[str, bytes]]], hashes: Sequence[str] = ()
) -> Path:
    """An MDS dataset of these shards, with its index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, samples in enumerate(shards):
        name, data = f"shard.{number:05d}.mds", mds_bytes(columns, samples)
        (folder / name).write_bytes(data)
        digests = {kind: hashlib.new(kind, data).hexdigest() for kind in hashes}
        raw = {"basename": name, "bytes": len(data), "hashes": digests}
        facts = {"version": 2, "format": "mds", "samples": len(samples), "raw_data": raw, "zip_data": None}
        listed.append({**facts, **described(columns), "hashes": list(hashes)})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": listed}, sort_keys=True))
    return folder


def ndarray(array: np.ndarray) -> bytes:
    """The encoding `ndarray`, which says dtype and shape itself."""
    numbers = {"uint8": 8, "uint16": 16, "float16": 18, "int32": 33, "float32": 34, "float64": 66}
    return bytes([numbers[array.dtype.name], array.ndim << 2]) + bytes(array.shape) + array.tobytes()


# --------------------------------------------------------------------------------------------------------------------
# What is made of them


def conversion(source: Path | str, dest: Path | str, **changes: Any) -> IndexConfig:
    """Settings of `index dest=` for records without captions."""
    return IndexConfig(**{"source": str(source), "dest": str(dest), "text_member": "", **changes})


def made(dest: Path | str) -> tuple[Manifest, list[Record]]:
    """The manifest of a cache, and all its records in order."""
    storage = open_storage(str(dest))
    manifest = load_manifest(storage)
    return manifest, list(first_records(storage, manifest, 10**6))


def half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16)
