"""Small sources that change, and runs of `encode` on them, for tests of what is which shard and what may be written."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from made.encode import config, files, png, write_tar
from pipeline import cli
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import load_text
from pipeline.storage.urls import open_storage
from preprocess import encode

WORDS = ["encoders.seed=1", "batch=4", "workers=1", "decode_in=threads", "launch.threads=1"]
"""What `config` sets, as words of the command line."""


@pytest.fixture(autouse=True)
def _encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders that are loaded once for all tests."""
    monkeypatch.setattr(encode, "load_autoencoder", lambda encoders, _: _first_stage(encoders))
    monkeypatch.setattr(encode, "load_text", lambda encoders, _: _text_tower(encoders))


_first_stage, _text_tower = functools.cache(load_autoencoder), functools.cache(load_text)


def shard(path: Path, first: int, count: int = 2, caption: str = "a large red circle {}") -> Path:
    """A tar of captioned pictures; their keys and contents follow from their numbers, which begin at `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for number in range(first, first + count):
        members += [
            (f"{number:09d}.png", png((64, 64), number)),
            (f"{number:09d}.txt", caption.format(number).encode()),
        ]
    write_tar(path, members)
    return path


def two_folders(root: Path) -> tuple[str, str, str]:
    """Two folders whose shards have equal names and, as img2dataset's, equal sizes. Returns the patterns of the first,
    the second, and both."""
    for k, folder in enumerate("ab"):
        for j in range(2):
            shard(root / folder / f"{j:05d}.tar", 100 * k + 10 * j)
    return str(root / "a/*.tar"), str(root / "b/*.tar"), str(root / "{a,b}/*.tar")


def run(source: object, dest: object, **changes: Any) -> int:
    return encode.main(config(str(source), str(dest), **changes))


def keys(dest: object) -> list[str]:
    """Keys of all records of a dataset in the source, sorted."""
    storage = open_storage(str(dest))
    return sorted(record.meta["key"] for record in first_records(storage, load_manifest(storage), 9999))


def units(dest: object) -> list[str]:
    return [unit.source for unit in load_manifest(open_storage(str(dest))).units]


def type_in(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Runs a command line of `latentmill`. Returns its status, and the line of stderr with which it failed."""
    capsys.readouterr()
    status = cli.main(list(words))
    lines = capsys.readouterr().err.strip().splitlines()
    return status, lines[-1] if status and lines else ""


def advised(line: str, key: str) -> list[str]:
    """The words KEY=... that a message advises, as a shell would pass them on; of several
    advices the last."""
    matches = re.findall(rf"(?:{key}=(?:\[[^\]]*\]|(?:'[^']*'|\"'\")+) ?)+", line)
    assert matches, line
    return shlex.split(matches[-1])


__all__ = ["WORDS", "_encoders", "advised", "files", "keys", "run", "shard", "two_folders", "type_in", "units"]
