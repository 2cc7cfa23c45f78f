"""Whatever the bytes of a run's files are, who reads them ends with a value or an error of ours, soon and in little
memory. `make test-long` tries many more."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made import cache as small_cache
from made.commits import SHAPES, save
from made.lease import elsewhere
from made.mutations import changed_bytes, changed_json, changed_trees
from pipeline import status as verb
from pipeline.config import DataConfig, TrainConfig
from pipeline.config.loading.merge import to_dict
from pipeline.data.format.contract import plain
from pipeline.data.format.manifest import load_manifest
from pipeline.data.order.dataset import Dataset, dataset_of
from pipeline.errors import LatentmillError
from pipeline.parsing.text import printable
from pipeline.runs.checkpoint import load_weights, newest_good
from pipeline.runs.directory import RunInfo, require_resumable
from pipeline.runs.lease import Lease, claim_of, in_words, newest, this_process
from pipeline.runs.ledger import Stretch, read_ledger, truncate_ledgers
from pipeline.runs.names import checkpoint_folder
from pipeline.runs.proof import prove
from pipeline.runs.retention import Retention, retain
from pipeline.runs.stored import read_config, read_facts, read_rows
from pipeline.storage.base import ObjectInfo
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage

N, BATCH = 64, 8
FEW = settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2000, derandomize=False)
SECONDS, MEGABYTES = 1.0, 200
CONFIG = to_dict(TrainConfig(run="r", data=DataConfig(train="cache")))
FACTS = {"manifests": {"train": "a" * 64}, "contract": plain(small_cache.contract()), "order": 3, "mixture": [1, 2]}
FACTS["changes"] = [{"n": 1, "key": "samples", "old": 1, "new": 2, "at": 1, "lr_old": 0.1, "lr_new": 0.2}]
LEDGER = [asdict(Stretch(first, first + 32, 0, 1, 32, 2**64 - 1, 5)) for first in (0, 32)]
ROWS = [
    {"n": 8, "time": 1.5, "kind": "train", "loss": 0.1, "images_per_s": 3.0},
    {"n": 8, "kind": "start", "time": 2.0},
]


class Memory(LocalStorage):
    """Objects in memory: fuzzing a disk would take its time."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__("/nowhere/run")
        self.objects = objects

    def get(self, key: str) -> bytes:
        return self.objects[key] if key in self.objects else super().get(key)

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        view[:] = self.get(key)[offset : offset + len(view)]

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self.objects.setdefault(key, data) is data

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def stat(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self.get(key)), "")

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return [self.stat(key) for key in sorted(self.objects) if key.startswith(prefix)]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole run."""
    run = open_storage(str(tmp_path_factory.mktemp("fuzz")))
    save(run, N)
    objects = {info.key: run.get(info.key) for info in run.list()}
    objects["config.yaml"] = yaml.safe_dump(CONFIG).encode()
    objects["run.json"] = json.dumps(FACTS).encode()
    objects["lease/000001.json"] = json.dumps(asdict(elsewhere(state="failed", message="m"))).encode()
    objects["ledger/rank00000.jsonl"] = lines_of(LEDGER)
    objects["metrics.jsonl"] = lines_of(ROWS)
    return objects


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    cache = open_storage(str(tmp_path_factory.mktemp("data") / "cache"))
    small_cache.make_cache(cache.url, [20, 17, 9])
    return dataset_of(cache, load_manifest(cache))


def lines_of(trees: Any) -> bytes:
    """JSON lines of a list; of anything else, one line."""
    return b"".join(json.dumps(tree).encode() + b"\n" for tree in (trees if isinstance(trees, list) else [trees]))


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, only errors of ours may be raised, in SECONDS of this process and MEGABYTES more than it had."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    with suppress(LatentmillError):
        yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < SECONDS
    assert (after.ru_maxrss - before.ru_maxrss) / 1024 < MEGABYTES


def sealed(commit: Any) -> bytes:
    """commit.json of a commit, with a hash that is right."""
    body = json.dumps(commit, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "commit": commit}).encode()


def checks(
    objects: dict[str, bytes], dataset: Dataset
) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]]:
    """File -> (damaged contents, what reads them)."""
    folder = checkpoint_folder(N)
    commit = json.loads(objects[folder + "commit.json"])["commit"]
    (entry,) = commit["files"]
    file = objects[folder + entry["name"]]
    length = struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8 : 8 + length])

    def run_with(key: str, data: bytes) -> Memory:
        return Memory({**objects, key: data})

    def config(data: bytes) -> None:
        run = run_with("config.yaml", data)
        for action in (
            lambda: read_config(run),
            lambda: read_config(run, forward=True),
            lambda: require_resumable(TrainConfig(run="r"), run),
        ):
            with bounded():
                action()

    def facts(data: bytes) -> None:
        run = run_with("run.json", data)
        with bounded():
            assert RunInfo(run, TrainConfig(run="r"), read_facts(run)).contract

    def commits(data: bytes) -> None:
        run = run_with(folder + "commit.json", data)
        with bounded():
            load_weights(run)
        with bounded():
            retain(run, Retention(1))
        with bounded():
            newest_good(run)

    def files(data: bytes) -> None:
        facts = {"name": entry["name"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        lie = int.from_bytes(data[:8], "little")
        split = min(8 + lie, len(data))
        sections = [
            {"kind": kind, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}
            for kind, part in (("", data[:split]), ("ema", data[split:]))
        ]
        for named in (facts, {**facts, "sections": sections}):
            key = folder + "commit.json"
            run = Memory({**objects, folder + entry["name"]: data, key: sealed({**commit, "files": [named]})})
            with bounded():
                _, weights = load_weights(run)
                assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == SHAPES

    def lease(data: bytes) -> None:
        run = run_with("lease/000001.json", data)
        with bounded():
            _, holder = newest(run)
            assert verb.state_of(holder)
            assert holder is None or in_words(holder)
            assert holder is None or claim_of(holder, this_process({})) is not None
        with bounded():
            Lease.take(run, this_process({})).release("finished")

    def ledger(data: bytes) -> None:
        run = run_with("ledger/rank00000.jsonl", data)
        with bounded():
            prove(read_ledger(run), N, dataset.order(0, BATCH), dataset)
        with bounded():
            truncate_ledgers(run, N)

    def rows(data: bytes) -> None:
        with bounded():
            read_rows(run_with("metrics.jsonl", data), 1 << 20)

    def header_file(header: Any) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + file[8 + length :]

    as_yaml = changed_trees(CONFIG).map(lambda tree: yaml.safe_dump(tree).encode())
    return {
        "config.yaml": (as_yaml | changed_bytes(objects["config.yaml"]), config),
        "run.json": (changed_json(FACTS), facts),
        "commit.json": (changed_trees(commit).map(sealed) | changed_bytes(objects[folder + "commit.json"]), commits),
        "checkpoint file": (changed_trees(header).map(header_file) | changed_bytes(file), files),
        "lease": (changed_json(asdict(elsewhere(state="held"))), lease),
        "ledger": (changed_trees(LEDGER).map(lines_of) | changed_bytes(objects["ledger/rank00000.jsonl"]), ledger),
        "metrics.jsonl": (changed_trees(ROWS).map(lines_of) | changed_bytes(objects["metrics.jsonl"]), rows),
    }


FILES = ("config.yaml", "run.json", "commit.json", "checkpoint file", "lease", "ledger", "metrics.jsonl")


def fuzz(name: str, objects: dict[str, bytes], dataset: Dataset, how: settings) -> None:
    strategy, read = checks(objects, dataset)[name]
    how(given(strategy)(read))()


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_of_a_run_holds_its_reader_ends_in_a_value_or_an_error_of_ours(
    name: str, objects: dict[str, bytes], dataset: Dataset
) -> None:
    fuzz(name, objects, dataset, FEW)


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_of_a_run_holds_at_length(name: str, objects: dict[str, bytes], dataset: Dataset) -> None:
    fuzz(name, objects, dataset, MANY)


def look(objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, how: settings) -> None:
    @how
    @given(st.data())
    def check(data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(objects)))
        damaged = Memory({**objects, key: data.draw(changed_bytes(objects[key]))})
        monkeypatch.setattr(
            verb, "open_storage", lambda url: damaged if Path(url).name == "bad" else Memory(dict(objects))
        )
        bad, good = verb.status("bad"), verb.status("good")
        text = verb.table([bad, good])
        assert text == printable(text)
        assert len(text.splitlines()) == 3
        assert not good.problem

    check()


def test_whatever_is_damaged_in_a_run_its_state_is_a_line_that_hides_no_other(
    objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    look(objects, monkeypatch, FEW)


@pytest.mark.long
def test_whatever_is_damaged_in_a_run_its_state_is_a_line_at_length(
    objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    look(objects, monkeypatch, MANY)
