"""At a resume the ranks share the headers of a commit's files, instead of each reading all of them."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from made.commits import KINDS, save, values
from made.thread_world import on_ranks
from pipeline.distributed.world import World
from pipeline.errors import CheckpointCorrupt
from pipeline.runs.checkpoint import Reader, read_commit, shared_headers
from pipeline.runs.directory import checkpoint_folder
from pipeline.storage.local import LocalStorage

RANKS = 4


class Counting(LocalStorage):
    """Counts reads of ranges of each object."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.lock = threading.Lock()

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        super().read_into(key, offset, view)
        with self.lock:
            self.reads[key] += 1


@pytest.fixture
def run(tmp_path: Path) -> Counting:
    storage = Counting(tmp_path / "r")
    assert on_ranks(RANKS, lambda world: save(storage, 10, world)) == [None] * RANKS
    storage.reads.clear()
    return storage


def read_all(run: LocalStorage, world: World) -> list[torch.Tensor]:
    """Every value that a rank can read of the commit."""
    commit = read_commit(run, 10)
    read = Reader(run, commit, headers=shared_headers(run, commit, world))
    return [torch.cat([read(kind, "conv", 0, 12), read(kind, "bias", 0, 5)]) for kind in KINDS]


@pytest.mark.parametrize("ranks", [1, RANKS, 7])
def test_every_rank_reads_the_values_of_all_whatever_their_number(ranks: int, run: Counting) -> None:
    for found in on_ranks(ranks, lambda world: read_all(run, world)):
        assert all(torch.equal(one, values(10, kind)) for one, kind in zip(found, KINDS, strict=True))


def test_each_header_is_read_by_one_rank(run: Counting) -> None:
    commit = read_commit(run, 10)

    def headers(world: World) -> dict[str, Any]:
        return shared_headers(run, commit, world)

    found = on_ranks(RANKS, headers)
    files = [checkpoint_folder(10) + entry["name"] for entry in commit.files]
    assert all(sorted(one) == sorted(files) for one in found)
    assert {key: run.reads[key] for key in files} == dict.fromkeys(files, 2)  # its length, and itself


def test_a_header_that_cannot_be_read_is_refused_on_every_rank(run: Counting) -> None:
    commit = read_commit(run, 10)
    key = checkpoint_folder(10) + commit.files[2]["name"]
    run.put(key, b"\xff" * commit.files[2]["bytes"])
    for error in on_ranks(RANKS, lambda world: shared_headers(run, commit, world)):
        assert isinstance(error, CheckpointCorrupt) and "header" in str(error)
