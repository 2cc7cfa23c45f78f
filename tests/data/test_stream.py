"""stream.py: the right records in the right order, verified and within the memory bound; failures are reported."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from made.cache import make_cache, record
from pipeline.data.format.manifest import Manifest
from pipeline.data.order.blocks import BLOCK_BYTES
from pipeline.data.order.dataset import dataset_of
from pipeline.data.order.shuffle import Order
from pipeline.data.reading.disk_cache import DiskCache
from pipeline.data.reading.memory import SMALLEST
from pipeline.data.reading.shards import first_records, read
from pipeline.data.reading.stream import Stream
from pipeline.errors import ConfigError, DatasetError, ShardCorrupt, StorageError
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage

SIZES = [7, 12, 5, 9, 11]
MEMBERS = ("moments", "text", "cond.labels")


@pytest.fixture
def cache(tmp_path: Path) -> tuple[Storage, Manifest]:
    manifest = make_cache(str(tmp_path), SIZES)
    return open_storage(str(tmp_path)), manifest


def stream_of(
    dataset: tuple[Storage, Manifest],
    batch: int = 8,
    window: int = 8,
    block_bytes: int = BLOCK_BYTES,
    lanes: int = 0,
    **options: object,
) -> Stream:
    blocks = dataset_of(*dataset, block_bytes)
    order = Order(blocks.counts, 5, batch, block_shards=blocks.shards, window=window, lanes=lanes)
    return Stream(blocks, order, batch=batch, members=MEMBERS, **options)  # type: ignore[arg-type]


def test_batches_hold_the_records_that_the_order_names(cache: tuple[Storage, Manifest]) -> None:
    order = Order(SIZES, 5, 8)
    with stream_of(cache) as stream:
        for step in range(2 * order.epoch_samples // 8 + 1):
            batch = next(stream)
            places = order.locate(np.arange(step * 8, step * 8 + 8))
            expected = [record(s, r) for s, r in zip(places.block.tolist(), places.place.tolist(), strict=True)]
            assert batch.n == step * 8
            assert batch.numbers.tolist() == list(range(step * 8, step * 8 + 8))
            assert batch.keys == [one.key for one in expected]
            assert batch.captions == [one.meta["caption"] for one in expected]
            for name in MEMBERS:
                assert (batch.tensors[name].numpy() == np.stack([one.members[name] for one in expected])).all()
                assert batch.tensors[name].numpy().dtype == expected[0].members[name].dtype
            assert batch.wait_s >= 0


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch_in_order(cache: tuple[Storage, Manifest], world: int) -> None:
    with stream_of(cache) as alone:
        whole = [next(alone).keys for _ in range(12)]
    parts = []
    for rank in range(world):
        with stream_of(cache, rank=rank, world=world, workers=3) as stream:
            parts.append([next(stream).keys for _ in range(12)])
    assert [[key for part in parts for key in part[step]] for step in range(12)] == whole


def test_a_start_in_the_middle_goes_on_with_the_same_samples(cache: tuple[Storage, Manifest]) -> None:
    with stream_of(cache) as stream:
        whole = [next(stream) for _ in range(14)]
    with stream_of(cache, start_n=9 * 8, workers=2, prefetch=1) as stream:
        for expected in whole[9:]:
            batch = next(stream)
            assert batch.keys == expected.keys
            assert batch.n == expected.n
            assert (batch.tensors["moments"] == expected.tensors["moments"]).all()


def test_no_record_repeats_within_an_epoch_and_the_dropped_tail_is_counted(cache: tuple[Storage, Manifest]) -> None:
    order = Order(SIZES, 5, 8)
    assert order.dropped == sum(SIZES) % 8 == 4
    with stream_of(cache) as stream:
        keys = [key for _ in range(order.epoch_samples // 8) for key in next(stream).keys]
    assert len(set(keys)) == len(keys) == sum(SIZES) - 4


def drain(stream: Stream, steps: int = 20) -> list[str]:
    return [key for _ in range(steps) for key in next(stream).keys]


class Watched(LocalStorage):
    """A storage that counts reads of tars and can make them fail."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.fail = ""

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        self.reads.append(key)
        if self.fail and key == self.fail:
            raise StorageError(f"{key} cannot be read")
        super().read_into(key, offset, view)


def test_memory_holds_and_every_shard_is_read_once_an_epoch(tmp_path: Path) -> None:
    sizes = [16] * 12
    manifest = make_cache(str(tmp_path), sizes)
    storage = Watched(str(tmp_path))
    memory = 5 * manifest.shards[0].bytes
    with stream_of((storage, manifest), window=3, lanes=1, memory_bytes=memory, workers=2) as stream:
        for _ in range(3 * 24):  # three epochs
            next(stream)
            assert stream._block_bytes <= memory
        assert len(storage.reads) <= 3 * 12 + 5  # and what was fetched ahead
        assert len(set(storage.reads)) == 12


def test_a_dataset_that_fits_is_read_once_for_all_epochs(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), SIZES)
    storage = Watched(str(tmp_path))
    with stream_of((storage, manifest)) as stream:
        for _ in range(30):
            next(stream)
    assert len(storage.reads) == len(SIZES)


def test_a_window_that_does_not_fit_is_refused_at_once(cache: tuple[Storage, Manifest]) -> None:
    with pytest.raises(ConfigError, match=r"data\.memory_gb"):
        stream_of(cache, memory_bytes=10_000)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flip":
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    else:
        data = path.with_name("000001.tar").read_bytes()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "swap"])
def test_a_damaged_shard_is_read_once_more_and_then_stops_the_stream(tmp_path: Path, how: str) -> None:
    manifest = make_cache(str(tmp_path), [9] * 5)
    damage(tmp_path / "000003.tar", how)
    storage = Watched(str(tmp_path))
    with stream_of((storage, manifest)) as stream, pytest.raises(ShardCorrupt, match=r"000003\.tar was read twice"):
        drain(stream)
    assert storage.reads.count("000003.tar") == 2


def test_a_shard_that_was_damaged_on_its_way_only_is_read_again_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_cache(str(tmp_path), SIZES)
    storage = open_storage(str(tmp_path))
    with stream_of((storage, manifest)) as stream:
        expected = [next(stream).keys for _ in range(6)]
    whole, part, seen = LocalStorage.get, LocalStorage.read_into, set()

    def once_wrong(key: str, data: bytes) -> bytes:
        if key in seen:
            return data
        seen.add(key)
        return data[:-1] + b"?"

    def part_once_wrong(self: LocalStorage, key: str, offset: int, view: memoryview) -> None:
        part(self, key, offset, view)
        view[:] = once_wrong(key, bytes(view))

    monkeypatch.setattr(LocalStorage, "get", lambda self, key: once_wrong(key, whole(self, key)))
    monkeypatch.setattr(LocalStorage, "read_into", part_once_wrong)
    with stream_of((storage, manifest)) as stream:
        assert [next(stream).keys for _ in range(6)] == expected


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), SIZES)
    (tmp_path / "000000.index.json").write_bytes(b"{}")
    with stream_of((open_storage(str(tmp_path)), manifest)) as stream, pytest.raises(ShardCorrupt, match="index"):
        drain(stream)


@pytest.mark.parametrize("name", ["000002.tar", "000004.index.json"])
def test_a_missing_shard_is_refused_at_the_start_by_name(tmp_path: Path, name: str) -> None:
    manifest = make_cache(str(tmp_path), SIZES)
    (tmp_path / name).unlink()
    with pytest.raises(DatasetError, match=name):
        stream_of((open_storage(str(tmp_path)), manifest))


def test_a_failing_store_is_heard_of_in_the_loop(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), SIZES)
    storage = Watched(str(tmp_path))
    storage.fail = "000001.tar"
    with stream_of((storage, manifest)) as stream, pytest.raises(StorageError, match=r"000001\.tar cannot be read"):
        drain(stream)


def test_conditions_that_were_not_cached_are_refused(cache: tuple[Storage, Manifest]) -> None:
    storage, manifest = cache
    dataset = dataset_of(storage, manifest)
    with pytest.raises(DatasetError, match=r"holds no cond\.boxes"):
        Stream(dataset, dataset.order(0, 8), batch=8, members=("moments", "cond.boxes"))


def test_closing_ends_every_thread_even_in_the_middle(cache: tuple[Storage, Manifest]) -> None:
    before = set(threading.enumerate())  # others' may end meanwhile, such as those of a server's client
    stream = stream_of(cache, prefetch=1)
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(StopIteration):
        next(stream)


def test_random_access_reads_rows_and_the_first_records(cache: tuple[Storage, Manifest]) -> None:
    storage, manifest = cache
    rows = read(storage, manifest, 3, [8, 0], ("text",))
    assert [one.key for one in rows] == ["000003_000008", "000003_000000"]
    assert list(rows[0].members) == ["text"]
    keys = [one.key for one in first_records(storage, manifest, 10)]
    assert keys == [record(0, row).key for row in range(7)] + [record(1, row).key for row in range(3)]
    assert len(list(first_records(storage, manifest, 1000))) == sum(SIZES)


def test_uneven_ranks_are_refused(cache: tuple[Storage, Manifest]) -> None:
    with pytest.raises(ConfigError):
        stream_of(cache, world=3)
    with pytest.raises(ConfigError):
        stream_of(cache, start_n=4)


def test_a_cache_on_s3_streams_alike(s3: str, cache: tuple[Storage, Manifest]) -> None:
    manifest = make_cache(f"{s3}/some/cache", SIZES)
    assert manifest == cache[1]
    with stream_of(cache) as local, stream_of((open_storage(f"{s3}/some/cache"), manifest), workers=3) as remote:
        for _ in range(10):
            expected, batch = next(local), next(remote)
            assert batch.keys == expected.keys
            assert (batch.tensors["moments"] == expected.tensors["moments"]).all()


def test_blocks_cut_shards_into_even_pieces_that_hold_every_kept_record(cache: tuple[Storage, Manifest]) -> None:
    storage, manifest = cache
    each = manifest.shards[1].bytes // 12
    blocks = dataset_of(storage, manifest, 3 * each)
    assert blocks.counts.max() <= 4
    rows = [(blocks[k].shard, row) for k in range(len(blocks)) for row in blocks.rows(k).tolist()]
    assert rows == [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
    whole = dataset_of(storage, manifest)
    assert whole.counts.tolist() == SIZES


def test_small_blocks_give_the_records_that_their_order_names(cache: tuple[Storage, Manifest]) -> None:
    storage, manifest = cache
    size = manifest.shards[0].bytes // 3
    blocks = dataset_of(storage, manifest, size)
    order = Order(blocks.counts, 5, 8, block_shards=blocks.shards, window=2)
    assert order.lanes > 1
    with stream_of(cache, window=2, block_bytes=size, workers=3) as stream:
        for step in range(2 * order.epoch_samples // 8):
            places = order.locate(np.arange(step * 8, step * 8 + 8))
            keys = [
                record(blocks[k].shard, int(blocks.rows(k)[p])).key
                for k, p in zip(places.block.tolist(), places.place.tolist(), strict=True)
            ]
            assert next(stream).keys == keys


def test_an_index_is_read_once_while_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_cache(str(tmp_path), [40, 40])
    reads: list[str] = []
    real = LocalStorage.get

    def counting(self: LocalStorage, key: str) -> bytes:
        reads.append(key)
        return real(self, key)

    monkeypatch.setattr(LocalStorage, "get", counting)
    storage = open_storage(str(tmp_path))
    with stream_of((storage, manifest), block_bytes=manifest.shards[0].bytes // 8, workers=4) as stream:
        drain(stream, 30)
    assert sorted(reads) == ["000000.index.json", "000001.index.json"]


def test_a_shard_that_is_cut_is_refused_at_the_start_by_name(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), SIZES)
    path = tmp_path / "000003.tar"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(DatasetError, match=r"000003\.tar has \d+ bytes, its manifest says"):
        stream_of((open_storage(str(tmp_path)), manifest))


def test_a_disk_cache_saves_reads_for_later_epochs_other_ranks_and_other_runs(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path / "c"), SIZES)
    storage = Watched(str(tmp_path / "c"))
    small = manifest.shards[1].bytes * 2
    with stream_of(
        (storage, manifest), lanes=1, window=1, memory_bytes=small, cache=DiskCache(tmp_path / "d", 10**9)
    ) as s:
        first = drain(s, 15)
    assert len(storage.reads) == len(SIZES)
    with stream_of((storage, manifest), lanes=1, window=1, cache=DiskCache(tmp_path / "d", 10**9)) as s:
        assert drain(s, 15) == first
    assert len(storage.reads) == len(SIZES)


def test_what_a_crash_or_a_bad_disk_left_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path / "c"), SIZES)
    storage = Watched(str(tmp_path / "c"))
    with stream_of((storage, manifest), cache=DiskCache(tmp_path / "d", 10**9)) as s:
        expected = drain(s, 10)
    files = sorted((tmp_path / "d").iterdir())
    assert len(files) == len(SIZES)
    files[0].write_bytes(files[0].read_bytes()[:-700])
    data = bytearray(files[1].read_bytes())
    data[5000] ^= 1
    files[1].write_bytes(bytes(data))
    (tmp_path / "d/.half.0badcafe").write_bytes(b"half")
    storage.reads.clear()
    with stream_of((storage, manifest), cache=DiskCache(tmp_path / "d", 10**9)) as s:
        assert drain(s, 10) == expected
    assert len(storage.reads) == 2
    assert files[1].read_bytes() != bytes(data)


def name_of(number: int) -> str:
    """The name of a block in a disk cache."""
    return f"{'a' * 24}-{number}-1"


def test_a_disk_cache_keeps_to_its_bound_and_drops_what_was_used_least_recently(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    for i in range(9):
        cache.put(name_of(i), bytes(100))
        os.utime(tmp_path / name_of(i), (i, i))
    assert cache.read_into(name_of(0), memoryview(bytearray(100)))  # now the one used last
    cache.put(name_of(9), bytes(100))
    cache.put(name_of(10), bytes(100))
    there = {path.name for path in tmp_path.iterdir()}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    assert name_of(0) in there
    assert name_of(1) not in there
    assert name_of(10) in there


def test_a_disk_cache_leaves_every_file_alone_that_is_no_block(tmp_path: Path) -> None:
    theirs = ["thesis.tex", "0", ".bashrc", "a" * 24, f"{name_of(0)}.bak", f"x{name_of(0)}", f".{name_of(0)}.tmp"]
    for name in theirs:
        (tmp_path / name).write_bytes(bytes(5000))
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / name_of(77)).mkdir()
    os.mkfifo(tmp_path / name_of(78))
    killed = tmp_path / f".{name_of(5)}.{'b' * 8}"  # what a writer that was killed leaves
    killed.write_bytes(bytes(900))
    os.utime(killed, (1, 1))
    cache = DiskCache(tmp_path, 1000)
    for i in range(20):
        cache.put(name_of(i), bytes(100))
    assert all((tmp_path / name).read_bytes() == bytes(5000) for name in theirs)
    assert not killed.exists()
    assert sum((tmp_path / name_of(i)).exists() for i in range(20)) <= 10
    assert not cache.read_into(name_of(77), memoryview(bytearray(100)))
    assert not cache.read_into(name_of(78), memoryview(bytearray(100)))  # a pipe, without waiting for it


def test_memory_does_not_grow_over_epochs(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), [16] * 12)
    storage = open_storage(str(tmp_path))
    with stream_of((storage, manifest), window=3, lanes=1, memory_bytes=5 * manifest.shards[0].bytes) as stream:
        for _ in range(8 * 24):  # epochs
            next(stream)
        # Blocks that fit and one that comes; of batches, those ready, one in the making and two with the loop.
        pieces = 5 + 1 + (4 + 1 + 2) * len(MEMBERS)
        assert stream._pool.allocated_bytes <= pieces * SMALLEST


def test_a_read_ahead_drops_what_is_needed_last(tmp_path: Path) -> None:
    """With memory for little more than a window, no block is fetched twice within an epoch."""
    manifest = make_cache(str(tmp_path), [16] * 24)
    storage = Watched(str(tmp_path))
    memory = 5 * manifest.shards[0].bytes
    with stream_of((storage, manifest), window=3, lanes=1, memory_bytes=memory, workers=2) as stream:
        for _ in range(48 * 4):  # four epochs
            next(stream)
    assert len(storage.reads) <= 1.1 * 4 * 24 + 5
