"""Holes are drawn beside the decoding of samples, and are those of caches whose holes the reading thread drew."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.encode import config, files, png, write_tar
from pipeline.conditions.mask import masks
from pipeline.config import FiltersConfig
from pipeline.config.conditions import LabelsConfig, MaskConfig
from preprocess.encode import main

SAMPLES = 21  # more than a task of a decoding worker takes
GOLDEN = {
    "32": "d6ef0f34c3bf1aa1ca523c8fc456d08183c3811f1e62b8d959ffe645d280b984",
    "16": "5346c0d5377c39376220afc3c8804df4364f3214a79f5e368fef0f2cf663e271",
}
"""Digest of the cache of each resolution."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shard with masks and label maps of its own, in which samples that cannot be used and duplicates move the
    records behind them."""
    members: list[tuple[str, bytes]] = []
    for number in range(SAMPLES):
        size, map_of = ((64, 64), (80, 64), (64, 90))[number % 3], np.random.default_rng(number)
        image = png(size, 3 if number == 12 else number)
        members += [
            (f"{number:02d}.png", b"no picture" if number in (2, 17) else image),
            (f"{number:02d}.mask.png", grey(map_of.integers(0, 2, size[::-1], np.uint8) * 255)),
            (f"{number:02d}.labels.png", grey(map_of.integers(0, 4, size[::-1], np.uint8))),
        ]
    path = tmp_path_factory.mktemp("holes") / "0.tar"
    write_tar(path, members)
    return str(path)


def grey(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def digest(cache: Path) -> str:
    """Of the names of all arrays in the order in which they are stored, and of the holes and label maps."""
    found = hashlib.sha256()
    for path in sorted(cache.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found.update(member.name.encode())
                file = tar.extractfile(member)
                if file is not None and ("cond.mask." in member.name or "cond.labels." in member.name):
                    found.update(file.read())
    return found.hexdigest()


SETTINGS: dict[str, Any] = {
    "resolution": (32, 16),
    "buckets": 16,
    "crop": "random",
    "flip": True,
    "text_storage": "none",
    "max_rejects": 0.5,
    "filters": FiltersConfig(duplicates="image"),
    "conditions": ("labels", "mask", "pixels"),
    "labels": LabelsConfig(count=4),
    "mask": MaskConfig(kinds=("thin", "file", "medium", "rectangles"), variants=3),
}


def test_holes_are_those_of_caches_before_and_decoding_workers_draw_them(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests were computed by the version before, whose reading thread drew them."""
    threads = []

    def noted(*asked: Any) -> np.ndarray:
        threads.append(threading.current_thread().name)
        return masks(*asked)

    monkeypatch.setattr("preprocess.source.conditions.masks", noted)
    assert main(config(source, tmp_path / "c", **SETTINGS)) == 0
    assert {side: digest(tmp_path / "c" / side) for side in GOLDEN} == GOLDEN
    assert len(threads) == 2 * 2 * (SAMPLES - 3)  # resolutions, flips
    assert all(name.startswith("latentmill-decode") for name in threads)


def test_processes_draw_the_same_holes(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.source.conditions.masks", None)  # in this process
    assert main(config(source, tmp_path / "c", decode_in="processes", **SETTINGS)) == 0
    assert {side: digest(tmp_path / "c" / side) for side in GOLDEN} == GOLDEN


def test_an_error_in_drawing_ends_encode_and_publishes_nothing_of_the_unit(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*asked: Any) -> np.ndarray:
        raise ZeroDivisionError("drawing")

    monkeypatch.setattr("preprocess.source.conditions.masks", broken)
    with pytest.raises(ZeroDivisionError, match="drawing"):
        main(config(source, tmp_path / "c", **SETTINGS))
    assert not [name for name in files(tmp_path / "c") if name.endswith(".tar")]
