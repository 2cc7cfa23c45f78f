"""The readers of a dataset's files, fed with mutations of whole ones: a value or an error of ours, soon, and without
much memory. The long tests hold the same of many more."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from made.cache import LENGTH, WIDTH
from made.forged_cache import forge_excluded, forge_records, forge_uncond, joined, members, small, train_on
from made.fuzz import LONG, QUICK, bounded, mutated_bytes, mutated_value
from made.places import TESTS
from pipeline.data.format.contract import plain
from pipeline.data.format.contract_json import contract_from_json
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.index import parse_index
from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import load_manifest, manifest_bytes, parse_manifest
from pipeline.data.format.records import find_records, npy_bytes, parse_npy, unpack
from pipeline.data.format.uncond import read_uncond
from pipeline.data.order.blocks import Blocks
from pipeline.data.reading.columns import find_columns
from pipeline.errors import DatasetError
from pipeline.parsing.values import parse_json
from pipeline.storage.urls import open_storage

RECORD = joined(members())
TWO = joined(members(0)) + joined(members(1))
NPY = npy_bytes(np.zeros((8, 2, 2), np.float16))
PAIRS = npy_bytes(np.array([[0, 1], [1, 2]], dtype=np.int32))
UNCOND = npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16))


@cache
def whole() -> Any:
    """Manifest, and the first index with its entry, of a small cache."""
    with tempfile.TemporaryDirectory() as folder:
        small(Path(folder))
        return (
            load_manifest(open_storage(folder)),
            (Path(folder) / "000000.index.json").read_bytes(),
        )


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def read_manifest(data: bytes) -> None:
    """A manifest that is accepted can also be used."""
    with bounded():
        manifest = parse_manifest(data)
        assert parse_manifest(manifest_bytes(manifest)) == manifest
        blocks = Blocks(manifest, KeptRecords(manifest, np.empty((0, 2), dtype=np.int32)))
        assert int(blocks.counts.sum()) == sum(entry.samples for entry in manifest.shards)
        assert all(manifest.units[entry.unit] and entry.index_name for entry in manifest.shards)


def read_contract(value: Any) -> None:
    with bounded():
        contract = contract_from_json(parse_json(as_json(value)))
        assert contract_from_json(plain(contract)) == contract


def read_index(data: bytes) -> None:
    """The records of an index that is accepted lie in the tar."""
    entry = whole()[0].shards[0]
    with bounded():
        index = parse_index(data, entry)
        ends = index.offsets + index.sizes
        assert len(index) == entry.samples and index.digests.shape == (entry.samples, 32)
        assert (index.offsets >= 0).all() and (ends <= entry.bytes).all() and (index.offsets[1:] >= ends[:-1]).all()


def read_record(data: bytes) -> None:
    for wanted in (None, ("moments", "text")):
        with bounded():
            record = unpack(data, wanted)
            assert type(record.meta["caption"]) is str
            assert sum(array.nbytes for array in record.members.values()) <= len(data)
    with bounded():
        list(find_records(data))


def read_columns(data: bytes) -> None:
    size = len(data) // 2
    with bounded():
        columns = find_columns(
            np.frombuffer(data, dtype=np.uint8),
            np.array([0, size]),
            np.array([size, len(data) - size]),
            ["moments", "text"],
        )
        assert columns["moments"].starts[-1] <= len(data)


def read_npy(data: bytes) -> None:
    with bounded():
        assert parse_npy(memoryview(data)).nbytes <= len(data)


FORMAT_2 = (TESTS / "made" / "format_2.json").read_text()
JSON_READERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "manifest of format 2": (
        lambda: json.loads(json.loads(FORMAT_2)["buckets"]["manifest"]),
        lambda value: read_manifest(as_json(value)),
    ),
    "manifest": (lambda: json.loads(manifest_bytes(whole()[0])), lambda value: read_manifest(as_json(value))),
    "contract": (lambda: plain(whole()[0].contract), read_contract),
    "index": (lambda: json.loads(whole()[1]), lambda value: read_index(as_json(value))),
}
BYTE_READERS: dict[str, tuple[Callable[[], bytes], Callable[[bytes], None]]] = {
    "manifest": (lambda: manifest_bytes(whole()[0]), read_manifest),
    "index": (lambda: whole()[1], read_index),
    "record": (lambda: RECORD, read_record),
    "records": (lambda: TWO, read_columns),
    "tar": (lambda: TWO + bytes(1024), read_record),
    "npy": (lambda: NPY, read_npy),
}


def _try_values(name: str, options: dict[str, Any]) -> None:
    source, read = JSON_READERS[name]
    settings(**options)(given(mutated_value(source()))(read))()


def _try_bytes(name: str, options: dict[str, Any]) -> None:
    source, read = BYTE_READERS[name]
    settings(**options)(given(mutated_bytes(source()))(read))()


@pytest.mark.parametrize("name", JSON_READERS)
def test_any_value_in_any_place_is_read_or_refused(name: str) -> None:
    _try_values(name, QUICK)


@pytest.mark.parametrize("name", BYTE_READERS)
def test_any_damaged_bytes_are_read_or_refused(name: str) -> None:
    _try_bytes(name, QUICK)


@pytest.mark.long
@pytest.mark.parametrize("name", JSON_READERS)
def test_any_value_in_any_place_is_read_or_refused_of_thousands(name: str) -> None:
    _try_values(name, LONG)


@pytest.mark.long
@pytest.mark.parametrize("name", BYTE_READERS)
def test_any_damaged_bytes_are_read_or_refused_of_thousands(name: str) -> None:
    _try_bytes(name, LONG)


# --------------------------------------------------------------------------------------------------------------------
# Through the verbs' own readers, with all hashes right


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("PLAN_BATCHES", 2), ("PLAN_SAMPLES", 2), ("HORIZON_BATCHES", 2)):
            patch.setattr(f"pipeline.data.reading.stream.{name}", number)
        yield tmp_path_factory.mktemp("fuzz")


def _through(folder: Path, examples: int) -> None:
    options: dict[str, Any] = {"max_examples": examples, "deadline": None, "derandomize": True}
    options["suppress_health_check"] = list(HealthCheck)

    @settings(**options)
    @given(mutated_bytes(RECORD))
    def records(data: bytes) -> None:
        padded = data + bytes(-len(data) % 512)
        forge_records(small(folder), [padded or bytes(1024), *(joined(members(row)) for row in range(1, 5))])
        with bounded():
            train_on(folder)

    @settings(**options)
    @given(mutated_bytes(PAIRS))
    def excluded(data: bytes) -> None:
        forge_excluded(small(folder), data)
        with bounded():
            storage = open_storage(str(folder))
            pairs = load_excluded(storage, load_manifest(storage))
            assert pairs.shape == (2, 2) and pairs.dtype == np.int32 and pairs.min() >= 0 and pairs.max() < 5

    @settings(**options)
    @given(mutated_bytes(UNCOND))
    def uncond(data: bytes) -> None:
        forge_uncond(small(folder), data)
        with bounded():
            storage = open_storage(str(folder))
            assert np.isfinite(read_uncond(storage, load_manifest(storage))).all()

    for property_ in (records, excluded, uncond):
        property_()


def test_training_reads_or_refuses_mutated_files_whose_hashes_are_right(folder: Path) -> None:
    _through(folder, 15)


@pytest.mark.long
def test_training_reads_or_refuses_mutated_files_whose_hashes_are_right_of_hundreds(folder: Path) -> None:
    _through(folder, 600)


def test_a_whole_manifest_and_index_are_read(folder: Path) -> None:
    """What the mutations begin with is right."""
    manifest, index = whole()
    assert parse_manifest(manifest_bytes(manifest)) == manifest
    assert len(parse_index(index, manifest.shards[0])) == 5
    with pytest.raises(DatasetError):
        parse_manifest(manifest_bytes(dataclasses.replace(manifest, uncond_sha256=hashlib.md5(b"").hexdigest())))
    train_on(small(folder))
