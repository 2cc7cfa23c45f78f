"""What a worker of encode asks of the store beside its own units: a listing, and not each unit of the others."""

from __future__ import annotations

import collections
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from made.encode import config, files
from pipeline.data.format.contract import canonical_json
from pipeline.data.format.manifest import MANIFEST
from pipeline.errors import SourceError
from pipeline.parsing.values import parse_json
from pipeline.storage.base import ObjectInfo
from pipeline.storage.local import LocalStorage
from preprocess import encode
from preprocess.encode import main
from preprocess.encoding.claims import Claims, Finished, Work, claim_key
from preprocess.encoding.plan import REPORTS, report_key
from preprocess.shapes.shards import write_shards
from preprocess.units.reports import HEAD_BYTES, read_heads, read_reports

UNITS = 120


class Counting(LocalStorage):
    """Counts requests by what is asked, and notes of which objects it is asked whether they are there."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked, self.keys = collections.Counter[str](), list[str]()
        self.lock = threading.Lock()

    def _count(self, what: str) -> None:
        with self.lock:
            self.asked[what] += 1

    def stat(self, key: str) -> ObjectInfo:
        self._count("stat")
        self.keys.append(key)
        return super().stat(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        self._count("list")
        return super().list(prefix)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._count("claim")
        return super().put_if_absent(key, data)


class Worker:
    """One of several workers on UNITS units, whose requests are counted. It saw the store before anybody began."""

    def __init__(self, root: Path, rank: int, world: int, seconds: float = 60.0) -> None:
        self.storage = Counting(root)
        self.claims = Claims(self.storage, seconds)
        self.done = Finished([self.storage], {number: report_key(number) for number in range(UNITS)}, REPORTS)
        self.work = Work(list(range(UNITS)), rank, world, self.claims, self.done.is_done, self.done.listed)

    def one(self) -> int | None:
        """Makes a unit, if there is one."""
        number = self.work.next()
        if number is not None:
            self.storage.put(report_key(number), b"{}")
            self.claims.release(number)
        return number

    def drain(self) -> list[int]:
        return list(iter(self.one, None))


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[Worker]]:
    """Four of them."""
    four = [Worker(tmp_path, rank, 4) for rank in range(4)]
    yield four
    for worker in four:
        worker.claims.__exit__(None, None, None)


def test_a_worker_with_nothing_left_asks_for_two_listings_and_not_for_each_unit(workers: list[Worker]) -> None:
    assert sorted(workers[0].drain()) == list(range(UNITS))
    assert workers[0].storage.asked["stat"] == 2 * UNITS  # before and after each claim
    assert workers[0].storage.asked["list"] == 0
    for late in workers[1:]:
        assert late.drain() == []
        assert late.storage.asked == {"stat": 1, "list": 2}


def test_four_workers_that_take_turns_make_each_unit_once_with_few_requests(workers: list[Worker]) -> None:
    made: list[int] = []
    while found := [number for worker in workers if (number := worker.one()) is not None]:
        made += found
    assert sorted(made) == list(range(UNITS))
    for worker in workers:
        assert worker.storage.asked["stat"] <= 2 * UNITS // 4 + 4
        assert worker.storage.asked["list"] <= 4


def test_a_worker_that_helps_a_slower_one_makes_none_of_its_units_twice(workers: list[Worker]) -> None:
    """Worker 0 ends its share when worker 1 is half-way, and both go on with that; it goes from the same end."""
    quick, slow = workers[:2]
    for other in workers[2:]:
        for _ in range(UNITS // 4):
            other.one()
    for _ in range(UNITS // 4):
        quick.one()
    for _ in range(UNITS // 8):
        slow.one()
    made: list[int] = []
    while found := [number for worker in (quick, slow) if (number := worker.one()) is not None]:
        made += found
    assert len(made) == len(set(made)) == UNITS // 8
    assert sum(worker.storage.asked["stat"] for worker in (quick, slow)) <= 2 * (UNITS // 2) + UNITS // 8 + 8


def test_units_that_the_living_have_claimed_are_found_by_listings_and_left_to_them(tmp_path: Path) -> None:
    living, waiting = Worker(tmp_path, 0, 1, seconds=4.0), Worker(tmp_path, 0, 1, seconds=4.0)
    for number in range(90, UNITS):
        assert living.claims.take(number)
    assert waiting.drain() == list(range(90))
    asked = waiting.storage.asked
    assert asked["stat"] <= 2 * 90 + 4
    assert asked["claim"] <= 92
    assert asked["list"] <= 20
    for worker in (living, waiting):
        worker.claims.__exit__(None, None, None)


def test_units_of_the_dead_are_taken_over_once_their_claims_are_seen_to_be_dead(tmp_path: Path) -> None:
    for number in range(0, UNITS, 2):
        LocalStorage(tmp_path).put(claim_key(number), b"of a worker that was killed")
    for number in range(0, UNITS, 4):
        LocalStorage(tmp_path).put(report_key(number), b"{}")  # which it had done before
    worker = Worker(tmp_path, 0, 1, seconds=0.4)
    made = worker.drain()
    assert sorted(made) == [number for number in range(UNITS) if number % 4]
    assert made[: UNITS // 2] == list(range(1, UNITS, 2))  # what is free comes first
    worker.claims.__exit__(None, None, None)


# --------------------------------------------------------------------------------------------------------------------
# At the start and at the end


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards in s, and what `encode` makes of them in c."""
    folder = tmp_path_factory.mktemp("requests")
    write_shards(str(folder / "s"), 12, 0, "train", shard_size=2)
    main(config(str(folder / "s/*.tar"), folder / "c"))
    return folder


@pytest.fixture
def cache(source: Path, tmp_path: Path) -> Path:
    """A copy of that without its manifest."""
    shutil.copytree(source / "c", tmp_path / "c")
    (tmp_path / "c" / MANIFEST).unlink()
    return tmp_path / "c"


def counted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Counting:
    """What `encode` asks of its destination is counted."""
    storage, opened = Counting(folder), encode.open_storage
    monkeypatch.setattr(encode, "open_storage", lambda url: storage if url == str(folder) else opened(url))
    return storage


def test_a_worker_that_comes_when_others_have_done_all_asks_for_none_of_their_units(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = counted(monkeypatch, cache)
    monkeypatch.setattr(encode, "settle", lambda *_: set())  # it looked before the others began
    main(config(str(source / "s/*.tar"), cache))
    assert files(cache) == files(source / "c")
    assert [key for key in storage.keys if key.startswith(REPORTS)] == [report_key(0)]


def test_who_ends_while_others_are_at_work_asks_for_one_of_the_missing_units(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Claims(LocalStorage(cache), 4.0) as living:
        for number in range(1, 6):
            (cache / report_key(number)).unlink()
            living.take(number)
        storage = counted(monkeypatch, cache)
        main(config(str(source / "s/*.tar"), cache, claim_seconds=4.0))
    assert not (cache / MANIFEST).exists()
    asked = [key for key in storage.keys if key.startswith(REPORTS)]
    assert asked == [report_key(1)] * 2  # the first that is not its own, and whether a manifest can be written


class Late(LocalStorage):
    """Its listings know of no report."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return [info for info in super().list(prefix) if not info.key.startswith(REPORTS)]


def test_a_listing_that_is_out_of_date_names_no_shard_that_is_done(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever follows the advice would leave it out."""
    for number in (1, 4):
        (cache / report_key(number)).unlink()
    opened = encode.destinations_of
    monkeypatch.setattr(encode, "destinations_of", lambda config: (opened(config)[0], [Late(cache)]))
    with pytest.raises(SourceError, match=r"^2 of the 6 input shards .*leave_out=\[00001\.tar,00004\.tar\]"):
        main(config(str(source / "s/*.tar"), cache, finalize=True))


class Reading(LocalStorage):
    """Counts the bytes that are read."""

    bytes_read = 0

    def get(self, key: str) -> bytes:
        data = super().get(key)
        self.bytes_read += len(data)
        return data

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        super().read_into(key, offset, view)
        self.bytes_read += len(view)


def test_thumbnails_are_not_fetched_at_the_start(cache: Path) -> None:
    storage, names = Reading(cache), ["00000.tar", "00001.tar"]
    for number in range(2):  # as large as four photographs make them
        facts = parse_json(storage.get(report_key(number)))
        for thumbnail in facts["thumbnails"]:
            thumbnail["jpeg"] = "A" * 6000
        storage.put(report_key(number), canonical_json(facts))
    sizes = {number: storage.stat(report_key(number)).size for number in range(2)}
    assert min(sizes.values()) > HEAD_BYTES + 4000
    whole = read_reports(storage, range(2), names)
    storage.bytes_read = 0
    heads = read_heads(storage, sizes, names)
    assert storage.bytes_read == 2 * HEAD_BYTES
    for number, head in heads.items():
        left = {"thumbnails", "truncated", "unit"}
        assert head.facts == {key: value for key, value in whole[number].facts.items() if key not in left}
        assert (head.known, head.left_out) == (whole[number].known, False)


def test_a_report_that_is_not_as_it_was_written_is_read_whole(cache: Path) -> None:
    """Small ones; those of other programs, whose keys have another order; those whose thumbnails come late."""
    storage, names = Reading(cache), ["00000.tar"]
    facts = parse_json(storage.get(report_key(0)))
    facts["thumbnails"] = [{"caption": "x", "jpeg": "A" * 20_000}]
    late = {key: facts[key] for key in (*sorted(facts.keys() - {"source"}), "source")}
    for value in (facts | {"thumbnails": []}, late, facts | {"rejected": {"x" * 20_000: 0}}):
        text = json.dumps(value, separators=(",", ":"))
        storage.put(report_key(0), text.encode())
        storage.bytes_read = 0
        head = read_heads(storage, {0: 100_000}, names)[0]
        assert storage.bytes_read >= len(text)
        assert head.facts == {key: fact for key, fact in value.items() if key != "thumbnails"}
