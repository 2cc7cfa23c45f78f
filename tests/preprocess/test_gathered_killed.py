"""Encodes of folders, tables and several captions whose workers are killed: what the killed leave behind is finished
with the bytes that an undisturbed encode makes, and verifies against its source."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made.captioned import words_of, write_captioned
from made.encode import config, files
from made.gathered import picture, rows_of, write_dataset, write_folder, write_parquet
from made.growing import _encoders  # noqa: F401
from pipeline.config import VerifyConfig
from preprocess import encode, verify
from ranks import encode_worker

SEVERAL: dict[str, Any] = {"caption_key": ("txt", "json:long", "json:alternatives"), "captions_most": 5}
WORDS: dict[str, Any] = {"caption_key": ("json:text",), "unit_size": 2}
KILLS = 4
"""Kills of one encode."""


def folder(place: Path) -> str:
    write_folder(place, range(11))
    return str(write_folder(place, range(5), under="more"))


def folder_of_captions(place: Path) -> str:
    place.mkdir()
    for number in range(8):
        words = words_of(number)
        (place / f"{number}.txt").write_text(words.pop("txt"))
        (place / f"{number}.json").write_text(json.dumps(words))
        (place / f"{number}.png").write_bytes(picture(number))
    return str(place)


def tars_of_captions(place: Path) -> str:
    for shard in range(8):
        write_captioned(place / f"{shard:05d}.tar", 2, 2 * shard)
    return f"{place}/*.tar"


def parquet(place: Path) -> str:
    for name, first in (("a", 0), ("b", 7)):
        write_parquet(place / f"{name}.parquet", rows_of(range(first, first + 7)), group=3)
    return f"{place}/*.parquet"


def dataset(place: Path) -> str:
    return str(write_dataset(place, [rows_of(range(7)), rows_of(range(7, 14))]))


SOURCES: dict[str, tuple[Callable[[Path], str], dict[str, Any]]] = {
    "folder": (folder, {"unit_size": 2}),
    "several captions": (tars_of_captions, SEVERAL),
    "several captions in a folder": (folder_of_captions, {**SEVERAL, "unit_size": 1}),
    "parquet": (parquet, WORDS),
    "arrow": (dataset, WORDS),
}


QUICK = ("folder", "parquet")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in SOURCES]
)
def test_four_workers_and_two_of_four_threads_that_are_killed_at_random_make_the_bytes_of_one(
    tmp_path: Path, kind: str
) -> None:
    write, changes = SOURCES[kind]
    source, output, chance = write(tmp_path / "s"), tmp_path / "output", random.Random(0)
    encode.main(config(source, tmp_path / "one", **{**changes, "workers": 1}))
    for world, workers in ((4, 1), (2, 4)):
        killed = rounds = 0
        while killed < KILLS:  # a fast machine has made the dataset before all are killed
            dest, rounds = tmp_path / f"killed-{world}-{rounds}", rounds + 1
            work = config(source, dest, **{**changes, "workers": workers, "claim_seconds": 0.5})
            killed += encode_worker.outlive_kills(work, world, output, chance, KILLS - killed)
            assert files(dest) == files(tmp_path / "one"), dest.name
            assert rounds < 20, "nobody was killed while working"
    assert verify.main(VerifyConfig(dataset=str(dest), source=source, samples=16, min_psnr=0.0)) == 0


@pytest.mark.parametrize(
    "numbers", [(5, 11, 14), pytest.param(range(1, 16), marks=pytest.mark.long)], ids=["some", "all"]
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_whose_encode_is_killed_at_a_write_is_finished_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, numbers: tuple[int, ...] | range
) -> None:
    rows = rows_of(range(3))  # the second unit begins within a row group, and within a batch
    if kind == "parquet":
        source = str(write_parquet(tmp_path / "t.parquet", rows, group=3))
    else:
        source = str(write_dataset(tmp_path / "s", [rows], batch=3))
    encode.main(config(source, tmp_path / "clean", **WORDS))
    monkeypatch.setattr("preprocess.encoding.claims.POLL", 0.01)

    def killed(n: int) -> bool:
        """Whether there is an n-th change of the store, at which the worker has died; the dataset is whole then all the
        same."""
        dest, output = tmp_path / f"killed-{n:02d}", tmp_path / "output"
        work = config(source, dest, claim_seconds=60.0, **WORDS)
        status = encode_worker.wait(encode_worker.start(encode_worker.die_at_change, output, work, n, False))
        assert status in (0, -signal.SIGKILL), output.read_text()
        assert encode.main(config(source, dest, claim_seconds=0.1, **WORDS)) == 0
        assert files(dest) == files(tmp_path / "clean"), dest.name
        return status != 0

    # Plan, empty caption; claim, tar, index, report and the claim's end, twice; two manifests, card.
    assert all(killed(n) for n in numbers) and not killed(16)
