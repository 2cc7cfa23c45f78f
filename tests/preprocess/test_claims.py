"""preprocess/encoding/claims.py: claims keep workers apart while they live, and nobody waits for the living."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.local import LocalStorage
from preprocess.encoding.claims import Claims, Work, claim_key

SECONDS = 0.4


def nothing() -> tuple[set[int], int]:
    """A listing of no reports."""
    return set(), 0


def drain(work: Work) -> list[int]:
    found = []
    while (number := work.next()) is not None:
        found.append(number)
    return found


def test_a_claimed_unit_is_nobody_elses_until_it_is_released(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with Claims(storage, 60) as mine, Claims(storage, 60) as other:
        assert mine.take(3)
        assert not other.take(3)
        mine.release(3)
        assert other.take(3)
        assert other.take(4)
    assert storage.list("claims/") == []  # a worker that ends gives up what it holds


def test_a_claim_that_is_renewed_lives_and_one_that_is_not_dies(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(claim_key(1), b"of a worker that was killed")
    with Claims(storage, SECONDS) as living, Claims(storage, SECONDS) as watcher:
        assert living.take(0)
        assert watcher.judge(0) is None
        assert watcher.judge(1) is None
        assert watcher.judge(2) is True  # there is none
        time.sleep(SECONDS * 1.5)
        assert watcher.judge(0) is False
        assert watcher.judge(1) is True


def test_a_worker_takes_its_share_first_then_the_others_and_never_what_is_done(tmp_path: Path) -> None:
    with Claims(LocalStorage(tmp_path), SECONDS) as claims:
        work = Work([0, 1, 2, 3, 4, 5, 6], 1, 3, claims, lambda number: number == 4, lambda: ({4}, 1))
        assert drain(work) == [1, 2, 5, 0, 3, 6]


def test_the_units_of_the_dead_are_taken_over_and_those_of_the_living_are_left_without_waiting(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(claim_key(1), b"of a worker that was killed")
    with Claims(storage, SECONDS) as living:
        assert living.take(0)
        with Claims(storage, SECONDS) as claims:
            started = time.monotonic()
            assert drain(Work([0, 1, 2], 0, 1, claims, lambda number: False, nothing)) == [2, 1]
            # Long enough for the dead claim to expire; the living one showed itself well before.
            assert SECONDS <= time.monotonic() - started < 60


def test_a_few_units_that_others_may_have_are_looked_at_one_by_one_where_that_takes_fewer_requests(
    tmp_path: Path,
) -> None:
    """To list 4,000 reports takes four requests."""
    listings: list[int] = []

    def list_done() -> tuple[set[int], int]:
        listings.append(1)
        return set(), 4000

    storage = LocalStorage(tmp_path)
    storage.put(claim_key(7), b"of a worker that was killed")
    with Claims(storage, 1.0) as claims:
        assert drain(Work([7], 0, 1, claims, lambda number: False, list_done)) == [7]
    assert len(listings) == 1


def test_a_unit_that_is_finished_between_two_looks_is_not_done_again(tmp_path: Path) -> None:
    looks: list[int] = []

    def is_done(number: int) -> bool:
        looks.append(number)
        return len(looks) > 1  # not at the first look, but once it is claimed

    with Claims(LocalStorage(tmp_path), SECONDS) as claims:
        assert drain(Work([7], 0, 1, claims, is_done, nothing)) == []
        assert LocalStorage(tmp_path).list("claims/") == []


def test_many_workers_at_once_share_units_without_loss_or_repetition(tmp_path: Path) -> None:
    done: list[int] = []

    def worker(rank: int) -> None:
        with Claims(LocalStorage(tmp_path), 60) as claims:
            work = Work(list(range(40)), rank, 4, claims, lambda number: number in done, lambda: (set(done), 1))
            while (number := work.next()) is not None:
                done.append(number)
                claims.release(number)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(40))


def test_stop_ends_a_wait_for_a_doubtful_claim(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put(claim_key(0), b"of somebody")
    with Claims(storage, 60) as claims:
        work = Work([0], 0, 1, claims, lambda number: False, nothing)
        threading.Timer(0.2, work.stop).start()
        started = time.monotonic()
        assert work.next() is None
        assert time.monotonic() - started < 10


def test_a_store_that_fails_when_claims_are_given_up_does_not_hide_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: LocalStorage, key: str) -> None:
        raise StorageError("the store is away")

    monkeypatch.setattr(LocalStorage, "delete", away)

    def work() -> None:
        with Claims(LocalStorage(tmp_path), 60) as claims:
            assert claims.take(0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
