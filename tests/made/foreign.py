"""Makes small tars of latents as another program might write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from made.cache import LENGTH, WIDTH
from made.encode import write_tar
from pipeline.data.format.records import npy_bytes

COUNT = 6
Files = dict[str, bytes]


def numbers(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def record(row: int) -> Files:
    return {
        "moments.npy": npy_bytes(numbers(8, 2, 2, seed=row) / np.float32(0.18215)),
        "text.npy": npy_bytes(numbers(LENGTH, WIDTH, seed=row)),
        "json": json.dumps({"caption": f"picture {row}"}).encode(),
    }


def write(folder: Path, change: Callable[[int, Files], object] = lambda row, one: None, tars: int = 1) -> Path:
    """Tars of COUNT records each and an empty caption."""
    folder.mkdir(exist_ok=True)
    for tar in range(tars):
        members = []
        for row in range(COUNT):
            one = record(row)
            change(row, one)
            members += [(f"{tar}_{row}.{name}", data) for name, data in one.items()]
        write_tar(folder / f"{tar}.tar", members)
    (folder / "uncond.npy").write_bytes(npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16)))
    return folder
