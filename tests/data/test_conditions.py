"""Caches with conditions, without captions, and of latents or pixels: streamed, read in place, and refused where an
array is not what the facts call for."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from made.conditioned import is_png, make_conditioned, record
from made.conditions import CONTRACTS, WITHOUT_TEXT, with_arrays
from made.forged_cache import forge_index, forge_records, joined
from pipeline.conditions.facts import ClassFacts, Conditions
from pipeline.data.format.contract import Contract
from pipeline.data.format.index import parse_index
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.pixels import read_png
from pipeline.data.format.records import npy_bytes, pack, tar_member, unpack
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading import columns as module
from pipeline.data.reading.columns import find_columns
from pipeline.data.reading.shards import first_records
from pipeline.data.reading.stream import Stream
from pipeline.errors import ParseError, ShardCorrupt
from pipeline.storage.urls import open_storage

SIZES = [9, 8, 10]
CLASSES = CONTRACTS["classes alone"]


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def names_of(one: Contract) -> tuple[str, ...]:
    return tuple(member.name for member in one.members)


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_cache_of_every_kind_streams_what_its_records_hold(tmp_path: Path, name: str) -> None:
    one = CONTRACTS[name]
    make_conditioned(str(tmp_path), one, SIZES)
    storage = open_storage(str(tmp_path))
    dataset = dataset_of(storage, load_manifest(storage))
    seen = set()
    with Stream(dataset, dataset.order(3, 4), batch=4, members=names_of(one)) as stream:
        for _ in range(8):
            batch = next(stream)
            places = list(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True))
            expected = [record(one, s, row, one.buckets[s % len(one.buckets)]) for s, row in places]
            seen |= set(places)
            assert batch.keys == [each.key for each in expected]
            assert batch.captions == [f"{row} of {s}" if one.text else "" for s, row in places]
            for member in one.members:
                array = batch.tensors[member.name].numpy()
                wanted = [each.members[member.name] for each in expected]
                if is_png(one, member.name):
                    sizes = [one.buckets[s % len(one.buckets)] for s, _ in places]
                    wanted = [read_png(png, size) for png, size in zip(wanted, sizes, strict=True)]
                assert array.dtype.name == member.dtype
                if member.name == "text" and one.trimmed:
                    assert array.shape[1] == 3  # padded, with zeros
                    wanted = [np.pad(states, ((0, 3 - len(states)), (0, 0))) for states in wanted]
                assert array.shape == (4, *wanted[0].shape) and (array == np.stack(wanted)).all()
    assert len(seen) > 8


def test_classes_are_one_number_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array without axes is located for all records at once, as any other is."""
    monkeypatch.setattr(module, "_one_by_one", None)
    make_conditioned(str(tmp_path), CLASSES, SIZES)
    storage = open_storage(str(tmp_path))
    dataset = dataset_of(storage, load_manifest(storage))
    with Stream(dataset, dataset.order(0, 4), batch=4, members=("cond.class",)) as stream:
        classes = next(stream).tensors["cond.class"]
    assert classes.dtype == torch.int32 and classes.shape == (4,)


def test_a_class_is_read_from_records_that_differ_in_length(tmp_path: Path) -> None:
    parts = [joined(pack(record(CLASSES, 0, row, (16, 16)))) for row in range(3)]
    parts[1] = joined([*pack(record(CLASSES, 0, 1, (16, 16))), ("000000_000001.note.txt", b"more")])
    sizes = np.array([len(part) for part in parts])
    data = np.frombuffer(b"".join(parts), dtype=np.uint8)
    (column,) = find_columns(data, np.cumsum(sizes) - sizes, sizes, ("cond.class",)).values()
    for row, start in enumerate(column.starts):
        assert column.shape(row) == ()
        value = data[start : start + 4].view(np.int32)[0]
        assert value == record(CLASSES, 0, row, (16, 16)).members["cond.class"]


@pytest.mark.parametrize(
    "array",
    [np.zeros(1, np.int32), np.zeros((), np.uint8), np.zeros((), np.float32), np.zeros((1, 1), np.int32)],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
@pytest.mark.parametrize("which", ["one", "all"])
def test_a_class_that_is_no_single_number_is_refused(tmp_path: Path, array: np.ndarray, which: str) -> None:
    make_conditioned(str(tmp_path), CLASSES, [5])
    records = []
    for row in range(5):
        changed = which == "all" or row == 2
        files = pack(record(CLASSES, 0, row, (16, 16)))
        new = npy_bytes(array)
        records.append(joined([(n, new if changed and n.endswith("class.npy") else data) for n, data in files]))
    forge_records(tmp_path, records)
    storage = open_storage(str(tmp_path))
    dataset = dataset_of(storage, load_manifest(storage))
    with (
        Stream(dataset, dataset.order(0, 4), batch=4, members=("cond.class",)) as stream,
        pytest.raises(ShardCorrupt, match=r"cond\.class"),
    ):
        next(stream)
    with pytest.raises(ShardCorrupt, match=r"000000\.tar: cond\.class is .* not int32 \(\)"):
        list(first_records(storage, load_manifest(storage), 8, ("cond.class",)))


@pytest.mark.parametrize("name", ["cond.lowres", "cond.mask", "cond.masked", "cond.labels", "pixels"])
def test_an_array_of_another_size_than_its_crops_is_refused(tmp_path: Path, name: str) -> None:
    one = CONTRACTS["every condition in buckets"]
    make_conditioned(str(tmp_path), one, [5, 5, 5])
    other = record(one, 0, 0, (24, 8)).members[name]  # the first tar is of squares
    files = pack(record(one, 0, 0, (16, 16)))
    bad = joined([(n, npy_bytes(other) if n.endswith(f"0.{name}.npy") else data) for n, data in files])
    forge_records(tmp_path, [bad, *(joined(pack(record(one, 0, row, (16, 16)))) for row in range(1, 5))])
    storage = open_storage(str(tmp_path))
    with pytest.raises(ShardCorrupt, match=f"{name} is "):
        list(first_records(storage, load_manifest(storage), 8, names_of(one)))


# --------------------------------------------------------------------------------------------------------------------
# Captions


def test_a_record_without_a_caption_is_read_where_the_dataset_has_none(tmp_path: Path) -> None:
    data = joined(pack(record(CLASSES, 0, 0, (16, 16))))
    assert unpack(data, captions=False).meta == {"key": "source/0.0", "caption": ""}
    with pytest.raises(ShardCorrupt, match="caption"):
        unpack(data)
    alone = tar_member("a.moments.npy", npy_bytes(np.zeros((8, 2, 2), np.float16)))
    assert unpack(alone, captions=False).meta == {"caption": ""}
    assert unpack(alone, captions=False, layout={"moments": "moments.npy"}).meta == {"caption": ""}
    with pytest.raises(ShardCorrupt, match="has no json"):
        unpack(alone)
    wrong = tar_member("a.json", b'{"caption": 5}') + alone
    with pytest.raises(ShardCorrupt, match="caption"):
        unpack(wrong, captions=False)


def test_a_record_without_a_caption_is_refused_where_the_dataset_has_captions(tmp_path: Path) -> None:
    one = with_arrays()
    make_conditioned(str(tmp_path), one, [5])
    silent = dataclasses.replace(with_arrays(**WITHOUT_TEXT), members=one.members)
    forge_records(tmp_path, [joined(pack(record(silent, 0, row, (16, 16)))) for row in range(5)])
    storage = open_storage(str(tmp_path))
    with pytest.raises(ShardCorrupt, match="caption"):
        list(first_records(storage, load_manifest(storage), 8))
    dataset = dataset_of(storage, load_manifest(storage))
    with Stream(dataset, dataset.order(0, 4), batch=4) as stream, pytest.raises(ShardCorrupt, match="caption"):
        _ = next(stream).captions


# --------------------------------------------------------------------------------------------------------------------
# Layouts of other writers


@pytest.mark.parametrize(
    ("layout", "is_read"),
    [
        ({"moments": "z.npy", "text": "t.npy", "caption": "txt"}, True),
        ({"moments": "z.npy"}, True),
        ({"latents": "z.npy"}, True),
        ({"moments": "z.npy", "latents": "y.npy"}, False),
        ({"moments": "z.npy", "cond.class": "label.npy", "cond.boxes": "b.npy"}, True),
        ({"moments": "z.npy", "text": "t.npy"}, False),
        ({"moments": "z.npy", "caption": "txt"}, False),
        ({"text": "t.npy", "caption": "txt"}, False),
        ({"moments": "z.npy", "cond.class": "label.cls"}, False),
        ({"moments": "z.npy", "cond.depth": "d.npy"}, False),
        ({}, False),
    ],
)
def test_a_layout_names_the_image_and_captions_with_their_states_or_neither(
    tmp_path: Path, layout: dict[str, str], is_read: bool
) -> None:
    manifest = make_conditioned(str(tmp_path), with_arrays(conditions=Conditions(classes=ClassFacts(count=3))), [2])
    data = (tmp_path / "000000.index.json").read_bytes().replace(b'{"bytes"', b'{"layout":%s,"bytes"' % _json(layout))
    if is_read:
        assert parse_index(data, manifest.shards[0]).layout == layout
    else:
        with pytest.raises(ParseError, match="layout"):
            parse_index(data, manifest.shards[0])


def _json(value: object) -> bytes:
    return str(value).replace("'", '"').encode()


def test_the_hash_of_a_dataset_without_captions_is_of_its_manifest(tmp_path: Path) -> None:
    manifest = make_conditioned(str(tmp_path), CLASSES, [2])
    assert not (tmp_path / "uncond.npy").exists()
    assert hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest() == manifest.digest


def test_a_layout_without_text_is_refused_where_the_dataset_has_captions(tmp_path: Path) -> None:
    make_conditioned(str(tmp_path), with_arrays(), [5])
    forge_index(tmp_path, lambda index: index.update(layout={"moments": "moments.npy"}))
    storage = open_storage(str(tmp_path))
    dataset = dataset_of(storage, load_manifest(storage))
    with (
        Stream(dataset, dataset.order(0, 4), batch=4) as stream,
        pytest.raises(ShardCorrupt, match=r"000000\.tar: record 000000_000000 has no text"),
    ):
        next(stream)
    with pytest.raises(ShardCorrupt, match=r"000000\.tar: record 000000_000000 has no text"):
        list(first_records(storage, load_manifest(storage), 8, ("moments", "text")))
