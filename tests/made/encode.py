"""Makes small sources and their `encode` configurations, with encoders of the shipped architecture and random
weights."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import EncodeConfig, EncodersConfig, LaunchConfig

ENCODERS = EncodersConfig(seed=1)


def config(source: str, dest: Path | str, **changes: Any) -> EncodeConfig:
    fields: dict[str, Any] = {"encoders": ENCODERS, "batch": 4, "workers": 2, "decode_in": "threads"}
    fields["launch"] = LaunchConfig(threads=1)
    return EncodeConfig(source=source, dest=str(dest), **{**fields, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder by relative path, except temporary files that a killed process left."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".tmp")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def png(size: tuple[int, int] = (64, 64), seed: int = 0) -> bytes:
    """A PNG of noise, (width, height)."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def write_sized(path: Path, sizes: list[tuple[int, int]], first: int = 0) -> None:
    """Writes a shard of captioned noise images of these sizes (width, height). first: number of the first image."""
    members = []
    for i, size in enumerate(sizes, first):
        members += [(f"{i:05d}.png", png(size, i)), (f"{i:05d}.txt", f"picture number {i}".encode())]
    write_tar(path, members)
