"""What goes wrong on the way to S3 is survived or ends in one clear error: a real server behind a proxy of faults.

Damage that no layer of S3 notices (a flipped byte in an answer) is passed on: hashes of records, tars and checkpoints
catch it above the storage.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, NotFound, StorageError
from pipeline.storage import patience
from pipeline.storage import s3 as module
from pipeline.storage.base import Storage
from pipeline.storage.patience import Patience
from pipeline.storage.urls import open_storage
from servers.fault_proxy import Fault, FaultProxy

DATA = random.Random(0).randbytes(300_000)
SILENCE = 0.4
"""Seconds after which a hasty client calls the server silent."""


@pytest.fixture
def store(s3: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A bucket with one object, "old", that is reached through the proxy."""
    monkeypatch.setattr("pipeline.storage.patience.PAUSES", (0.02, 0.5))
    store = open_storage(f"{s3}/prefix")
    store.put("old", DATA)
    faults.clear()
    return store


@pytest.fixture(scope="module")
def hasty_client(new_fault_client: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_SECONDS", SILENCE)
        return new_fault_client()


@pytest.fixture
def hasty(store: Storage, hasty_client: Any) -> None:
    """The test's client waits no longer than SILENCE."""
    module._clients[os.getpid(), "s3"] = hasty_client


def staged(store: Storage, data: bytes) -> Path:
    path = store.staging_path()
    path.write_bytes(data)
    return path


# --------------------------------------------------------------------------------------------------------------------
# Every operation survives every fault


def get(store: Storage) -> None:
    assert store.get("old") == DATA


def get_range(store: Storage) -> None:
    assert store.get_range("old", 1000, 200_000) == DATA[1000:201_000]


def put(store: Storage) -> None:
    store.put("new", DATA)
    assert store.get("new") == DATA


def put_file(store: Storage) -> None:
    path = staged(store, DATA)
    store.put_file("new", path)
    assert store.get("new") == DATA
    assert not path.exists()


def put_if_absent(store: Storage) -> None:
    store.put_if_absent("new", DATA)
    assert store.get("new") == DATA
    assert store.put_if_absent("new", b"other") is False


def stat(store: Storage) -> None:
    assert store.stat("old").size == len(DATA)


def list_(store: Storage) -> None:
    assert [(info.key, info.size) for info in store.list()] == [("old", len(DATA))]


def delete(store: Storage) -> None:
    store.delete("old")
    assert not store.exists("old")


OPERATIONS: dict[Callable[[Storage], None], tuple[str, str]] = {
    get: ("GET", "/old"),
    get_range: ("GET", "/old"),
    put: ("PUT", "/new"),
    put_file: ("PUT", "/new"),
    put_if_absent: ("PUT", "/new"),
    stat: ("HEAD", "/old"),
    list_: ("GET", "list-type=2"),
    delete: ("DELETE", "/old"),
}
"""What is done -> method and part of the path of its request."""

FAULTS = {
    "503": Fault(kind="slow_down", times=3),
    "reset": Fault(kind="reset", times=3),
    "lost answer": Fault(kind="lose", times=2),
}
BODY_FAULTS = {
    "cut": Fault(kind="cut", times=3, at=100),
    "cut at once": Fault(kind="cut", times=3, at=0),
    "reset": Fault(kind="reset", times=3, at=100),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_survives(
    store: Storage, faults: FaultProxy, operation: Callable[[Storage], None], fault: str
) -> None:
    method, key = OPERATIONS[operation]
    rule = faults.add(replace(FAULTS[fault], method=method, key=key))
    operation(store)
    assert rule.injected == rule.times


@pytest.mark.parametrize("fault", BODY_FAULTS)
@pytest.mark.parametrize("operation", [get, get_range, list_])
def test_an_answer_that_breaks_off_is_had_whole(
    store: Storage, faults: FaultProxy, operation: Callable[[Storage], None], fault: str
) -> None:
    method, key = OPERATIONS[operation]
    rule = faults.add(replace(BODY_FAULTS[fault], method=method, key=key))
    operation(store)
    assert rule.injected == rule.times


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_server_that_falls_silent_is_asked_again(
    store: Storage, faults: FaultProxy, operation: Callable[[Storage], None]
) -> None:
    method, key = OPERATIONS[operation]
    rule = faults.add(Fault(kind="stall", method=method, key=key, seconds=10, times=1))
    operation(store)
    assert rule.injected == 1


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("operation", [get, get_range, list_])
def test_an_answer_in_which_the_server_falls_silent_is_had_whole(
    store: Storage, faults: FaultProxy, operation: Callable[[Storage], None]
) -> None:
    method, key = OPERATIONS[operation]
    rule = faults.add(Fault(kind="stall", method=method, key=key, at=100, seconds=10, times=1))
    operation(store)
    assert rule.injected == 1


def test_a_listing_cut_to_nothing_is_no_empty_folder(store: Storage, faults: FaultProxy) -> None:
    rule = faults.add(Fault(kind="cut", key="list-type=2", at=0, times=1))
    assert [info.key for info in store.list()] == ["old"]
    assert rule.injected == 1


def test_an_error_cut_short_is_still_that_error(store: Storage, faults: FaultProxy) -> None:
    rule = faults.add(Fault(kind="cut", key="/absent", at=30, times=2))
    with pytest.raises(NotFound, match="absent does not exist"):
        store.get("absent")
    assert rule.injected == 2


def test_a_conditional_put_whose_answer_is_lost_finds_its_own_bytes(store: Storage, faults: FaultProxy) -> None:
    rule = faults.add(Fault(kind="lose", method="PUT", key="/new", times=1))
    assert store.put_if_absent("new", DATA) is False
    assert store.get("new") == DATA
    assert rule.injected == 1


@pytest.mark.usefixtures("hasty")
def test_an_object_that_changes_in_the_middle_of_a_read_is_refused(store: Storage, faults: FaultProxy) -> None:
    rule = faults.add(Fault(kind="stall", method="GET", at=1000, seconds=10, times=1))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.get, "old")
        while not rule.injected:
            time.sleep(0.01)
        waits = faults.add(Fault(kind="slow_down", method="GET"))  # so that no retry is faster than the change
        store.put("old", DATA[::-1])
        waits.times = 0
        with pytest.raises(StorageError, match="old changed while it was being read"):
            reading.result()


# --------------------------------------------------------------------------------------------------------------------
# Uploads in parts


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An object of two parts."""
    monkeypatch.setattr(module, "MULTIPART_BYTES", 5 * 1024 * 1024)
    monkeypatch.setattr(module, "PART_BYTES", 5 * 1024 * 1024)
    return random.Random(1).randbytes(7_000_000)


@dataclass(frozen=True)
class Step:
    """A request of an upload in parts: its method, and what its query has."""

    method: str
    key: str


CREATE, PART, COMPLETE = Step("POST", "?uploads"), Step("PUT", "partNumber=2"), Step("POST", "uploadId=")


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        (CREATE, Fault(kind="slow_down", times=2)),
        (CREATE, Fault(kind="cut", at=100, times=1)),
        (CREATE, Fault(kind="lose", times=1)),
        (PART, Fault(kind="slow_down", times=2)),
        (PART, Fault(kind="reset", times=2)),
        (PART, Fault(kind="lose", times=1)),
        (PART, Fault(kind="flip", at=1_000_000, times=1)),
        (COMPLETE, Fault(kind="slow_down", times=2)),
        (COMPLETE, Fault(kind="lose", times=1)),
        (COMPLETE, Fault(kind="cut", at=100, times=1)),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else value.key,
)
def test_an_upload_in_parts_survives_and_repeats_only_what_failed(
    store: Storage, faults: FaultProxy, large: bytes, step: Step, fault: Fault
) -> None:
    rule = faults.add(replace(fault, method=step.method, key=step.key))
    path = staged(store, large)
    store.put_file("new", path)
    assert not path.exists()
    assert store.get("new") == large
    assert rule.injected == rule.times
    sent = [request for request in faults.requests if "partNumber=" in request]
    assert len(sent) == 2 + (rule.injected if step is PART else 0)


@pytest.mark.parametrize("step", [CREATE, PART, COMPLETE], ids=lambda step: step.key)
def test_an_upload_in_parts_that_fails_leaves_nothing_and_keeps_the_file(
    store: Storage, faults: FaultProxy, large: bytes, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 0.3)
    faults.add(Fault(kind="slow_down", method=step.method, key=step.key))
    path = staged(store, large)
    with pytest.raises(StorageError, match=r"s3://.*/prefix/new, tried \d+ times in \d+ s: SlowDown: Please reduce"):
        store.put_file("new", path)
    assert path.stat().st_size == len(large)
    path.unlink()
    assert not store.exists("new")
    bucket = store.url.split("/")[2]
    assert "Uploads" not in module.s3_client().list_multipart_uploads(Bucket=bucket)


# --------------------------------------------------------------------------------------------------------------------
# Outages


def test_many_threads_outlive_an_outage(store: Storage, faults: FaultProxy) -> None:
    """boto3's own retries share one budget among the threads of a client, which an outage uses up."""
    rule = faults.add(Fault(kind="reset", method="GET", times=150))  # boto3's budget holds 100 retries
    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(store.get, ["old"] * 32)) == {DATA}
    assert rule.injected == 150


@pytest.mark.usefixtures("hasty")
def test_a_storm_of_faults_changes_no_byte(store: Storage, faults: FaultProxy) -> None:
    kinds = [
        Fault(kind="slow_down", probability=0.1, seed=1),
        Fault(kind="reset", probability=0.1, seed=2),
        Fault(kind="lose", probability=0.1, seed=3),
        Fault(kind="cut", method="GET", probability=0.2, seed=4, at=20_000),
        Fault(kind="reset", method="GET", every=5, at=50_000),
        Fault(kind="stall", every=40, seconds=10),
    ]
    rules = [faults.add(kind) for kind in kinds]
    bodies = {f"{i:02d}": random.Random(i).randbytes(100_000 + i) for i in range(24)}

    def round_trip(key: str) -> bytes:
        store.put(key, bodies[key])
        return store.get(key)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(round_trip, bodies)) == list(bodies.values())
    assert [info.key for info in store.list()] == [*bodies, "old"]
    assert all(rule.injected for rule in rules)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(kind="slow_down"), "SlowDown: Please reduce your request rate"),
        (Fault(kind="reset"), "onnection"),
        (Fault(kind="stall", seconds=10), "Read timeout"),
        (Fault(kind="cut", at=0), "broke off"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
@pytest.mark.alone
def test_an_outage_without_end_is_one_clear_error_in_bounded_time(
    store: Storage, faults: FaultProxy, fault: Fault, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 0.5)
    rule = faults.add(replace(fault))
    begun = time.monotonic()
    with pytest.raises(StorageError, match=message) as caught:
        store.get("old")
    assert time.monotonic() - begun < 0.5 + 2 * SILENCE + 3.0
    assert rule.injected > 1
    line = str(caught.value)
    assert line.startswith(store.locate("old")) and f"tried {rule.injected} times" in line
    assert "\n" not in line and "max retries" not in line


@pytest.mark.alone
def test_an_endpoint_that_never_answered_is_given_up_sooner(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("pipeline.storage.patience.STRANGER_SECONDS", 0.3)
    monkeypatch.setattr(patience, "answered", set())
    module._clients.clear()
    begun = time.monotonic()
    with pytest.raises(StorageError, match=rf"key, tried \d+ times in \d+ s: Could not connect .*127\.0\.0\.1:{port}"):
        open_storage(s3).get("key")
    assert time.monotonic() - begun < 5.0


def test_an_endpoint_that_is_no_url_is_one_clear_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    module._clients.clear()
    with pytest.raises(ConfigError, match=r"nonsense.*AWS_ENDPOINT_URL_S3"):
        open_storage(s3).get("key")


def test_what_no_repetition_mends_is_asked_once(store: Storage, faults: FaultProxy) -> None:
    with pytest.raises(NotFound):
        store.get("absent")
    with pytest.raises(StorageError):
        store.get_range("old", len(DATA), 1)
    assert len(faults.requests) == 2


def test_pauses_grow_and_differ_between_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    def pauses() -> list[float]:
        random.seed(0)
        slept: list[float] = []
        monkeypatch.setattr(patience.time, "sleep", slept.append)
        patience_of_100_s = Patience(seconds=100.0)
        for _ in range(9):
            assert patience_of_100_s.wait()
        return slept

    runs = [pauses() for _ in range(50)]
    assert len({tuple(run) for run in runs}) == 50
    for number, limit in enumerate([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]):
        longest = max(run[number] for run in runs)
        assert 0.5 * limit < longest <= limit


# --------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_flipped_byte_in_an_answer_is_passed_on_for_hashes_to_catch(store: Storage, faults: FaultProxy) -> None:
    rule = faults.add(Fault(kind="flip", method="GET", at=77, times=1))
    read = store.get("old")
    assert rule.injected == 1
    assert [i for i in range(len(DATA)) if read[i] != DATA[i]] == [77]
    assert store.get("old") == DATA


def test_a_flipped_byte_in_an_upload_is_refused_by_the_store_and_sent_again(store: Storage, faults: FaultProxy) -> None:
    rule = faults.add(Fault(kind="flip", method="PUT", at=77, times=1))
    store.put("new", DATA)
    assert rule.injected == 1
    assert store.get("new") == DATA
