"""What one rank does for all of them does not take as many times as long: requests to the store overlap, and are made
once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from benchmarks.scale.bucket import Bucket
from made.cache import make_cache
from made.commits import save
from made.thread_world import on_ranks
from pipeline.data.format.manifest import load_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.errors import DatasetError
from pipeline.runs.directory import committed
from pipeline.runs.names import checkpoint_folder
from pipeline.runs.retention import Retention, retain
from pipeline.storage.local import LocalStorage

RANKS, TOGETHER = 4, 3
"""Ranks, and requests that must be under way at one time, for otherwise none of them ends."""


class Waiting(LocalStorage):
    """The first requests for files of ranks end when TOGETHER of them are under way. deleted: keys in order."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.barrier, self.deleted, self.begun = threading.Barrier(TOGETHER, timeout=20), list[str](), 0
        self.lock = threading.Lock()

    def get(self, key: str) -> bytes:
        if "/rank" in key:
            self.wait()
        return super().get(key)

    def delete(self, key: str) -> None:
        if "/rank" in key:
            self.wait()
        self.deleted.append(key)
        super().delete(key)

    def wait(self) -> None:
        """Raises BrokenBarrierError where the others do not come."""
        with self.lock:
            self.begun += 1
            number = self.begun
        if number <= TOGETHER:
            self.barrier.wait()


def test_hashes_of_ranks_are_asked_for_many_at_a_time(tmp_path: Path) -> None:
    run = Waiting(tmp_path / "r")
    assert on_ranks(RANKS, lambda world: save(run, 10, world)) == [None] * RANKS
    assert committed(run) == [10] and run.begun == RANKS


def test_files_of_a_checkpoint_are_removed_many_at_a_time_after_its_commit(tmp_path: Path) -> None:
    run = LocalStorage(tmp_path / "r")
    for n in (10, 20):
        assert on_ranks(RANKS, lambda world, n=n: save(run, n, world)) == [None] * RANKS  # type: ignore[misc]
    waiting = Waiting(tmp_path / "r")
    retain(waiting, Retention(1))
    assert waiting.begun == 2 * RANKS and committed(run) == [20]
    assert waiting.deleted[0] == f"{checkpoint_folder(10)}commit.json" and len(waiting.deleted) == 1 + 2 * RANKS


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    make_cache(str(tmp_path / "c"), [8, 8])
    bucket = Bucket(0.0)
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file():
            bucket.objects[path.relative_to(tmp_path / "c").as_posix()] = path.read_bytes()
    return bucket


def read(bucket: Bucket, rank: int) -> None:
    """A batch of a rank."""
    dataset = dataset_of(bucket, load_manifest(bucket))
    with Stream(dataset, dataset.order(0, 4), rank=rank, world=2, batch=4) as stream:
        next(stream)


def test_tars_of_a_bucket_are_listed_by_the_first_rank_alone(bucket: Bucket) -> None:
    lists = []
    for rank in range(2):
        with bucket.counting() as asked:
            read(bucket, rank)
        lists.append(asked.by_kind["list"])
    assert lists == [1, 0]
    del bucket.objects["000001.tar"]
    with pytest.raises(DatasetError, match=r"lacks 000001\.tar"):
        read(bucket, 0)
