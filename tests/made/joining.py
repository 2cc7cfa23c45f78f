"""Small caches of pixels, without encoders, and runs of `columns` on them."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.encode import config as encode_config
from made.encode import write_sized, write_tar
from pipeline.config import ColumnsConfig, LaunchConfig
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import Record
from pipeline.data.joined.opening import joined
from pipeline.data.reading.shards import first_records
from pipeline.models.encoders.text import load_text
from pipeline.storage.urls import open_storage
from preprocess import columns, encode
from preprocess.joining import plan

COUNT = 6
text_tower = functools.cache(load_text)


@pytest.fixture(autouse=True)
def _tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text tower that is loaded once for all tests."""
    monkeypatch.setattr(plan, "load_text", lambda encoders, device: text_tower(encoders, str(device)))


def make_cache(folder: Path, shards: int = 2, first: int = 0, **changes: Any) -> Manifest:
    """Writes tars of COUNT pictures to folder/source, and the cache of their pixels to folder/cache. first: number of
    the first tar."""
    (folder / "source").mkdir(exist_ok=True)
    for number in range(first, first + shards):
        write_sized(folder / "source" / f"{number:05d}.tar", [(24, 16)] * COUNT, COUNT * number)
    pattern = f"{folder}/source/*.tar"
    fields = {"stored": "pixels", "resolution": (16,), **changes}
    assert encode.main(encode_config(pattern, folder / "cache", **fields)) == 0
    return load_manifest(open_storage(str(folder / "cache")))


def caption_of(number: int) -> str:
    """The caption that columns give picture number `number`."""
    return f"a picture of {number} small red circles"


def write_lines(path: Path, numbers: list[int], **more: Any) -> Path:
    """JSON lines with a caption and a score of the pictures of these numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"key": f"{n:05d}", "long": caption_of(n), "score": n / 4, **more} for n in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_values(path: Path, numbers: list[int]) -> Path:
    """A tar with a caption, a feature and a score of the pictures of these numbers, and a file of no meaning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for n in numbers:
        members += [
            (f"{n:05d}.txt", caption_of(n).encode()),
            (f"{n:05d}.dino.npy", npy(np.full((2, 3), n, dtype=np.float16))),
            (f"{n:05d}.json", json.dumps({"score": n / 4}).encode()),
            (f"{n:05d}.jpg", b"not looked at"),
        ]
    write_tar(path, members)
    return path


def numbers_of(shard: int) -> list[int]:
    """Numbers of the pictures of a source tar."""
    return list(range(COUNT * shard, COUNT * (shard + 1)))


def run(folder: Path, source: str, dest: str = "columns", **changes: Any) -> int:
    """Runs the verb on folder/cache. source: a pattern below the folder."""
    fields: dict[str, Any] = {"caption_key": "json:long", "launch": LaunchConfig(threads=1), "batch": 4} | changes
    return columns.main(
        ColumnsConfig(
            dataset=str(folder / "cache"), source=f"{folder}/{source}", dest=str(folder / dest), device="cpu", **fields
        )
    )


def records(folder: Path, dest: str = "columns") -> dict[str, Record]:
    """All records of the cache with its columns, by the key of their sample."""
    cache = open_storage(str(folder / "cache"))
    manifest = joined(cache, [str(folder / dest)])
    return {str(one.meta["key"]): one for one in first_records(cache, manifest, 9999)}
