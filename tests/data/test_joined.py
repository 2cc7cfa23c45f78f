"""data/joined: a cache and its columns are read as one record, and nothing that does not belong together is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.cache import make_cache, record
from made.columns import column_record, make_columns, write_columns
from pipeline.data.format.contract import TextFacts, plain
from pipeline.data.format.contract_json import contract_from_json
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.records import Record
from pipeline.data.format.uncond import read_uncond
from pipeline.data.joined.columns import COLUMNS, Columns, columns_bytes, load_columns, parse_columns
from pipeline.data.joined.opening import joined, require_all_bound
from pipeline.data.order.dataset import Dataset, dataset_of, part_of
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.disk_cache import DiskCache
from pipeline.data.reading.shards import first_records
from pipeline.data.reading.stream import Stream
from pipeline.errors import ContractMismatch, DatasetError, LatentmillError, ParseError, ShardCorrupt
from pipeline.runs.ledger import record_hashes
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

SIZES = [7, 12, 5, 9]
MEMBERS = ("moments", "tokens", "column.extra")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Storage, Manifest, str]:
    """A cache, and where its columns are to lie."""
    return open_storage(str(tmp_path / "cache")), make_cache(str(tmp_path / "cache"), SIZES), str(tmp_path / "columns")


def batches(dataset: Dataset, count: int, **options: object) -> list[Batch]:
    with Stream(dataset, dataset.order(3, 8), batch=8, members=MEMBERS, **options) as stream:  # type: ignore[arg-type]
        return [next(stream) for _ in range(count)]


def opened(made: tuple[Storage, Manifest, str], *urls: str) -> Manifest:
    cache, manifest, url = made
    return joined(cache, urls or (url,), manifest)


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_holds_the_cache_and_its_columns_as_one_record(
    made: tuple[Storage, Manifest, str], world: int, tmp_path: Path
) -> None:
    make_columns(made[2], made[1])
    dataset = dataset_of(made[0], opened(made))
    kept = DiskCache(tmp_path / "kept", 1 << 30)
    for rank in range(world):
        for batch in batches(dataset, 9, rank=rank, world=world, cache=kept):
            for i, (shard, row) in enumerate(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True)):
                own, beside = record(shard, row), column_record(shard, row)
                assert batch.keys[i] == own.key
                assert batch.captions[i] == f"long {shard} {row}"
                assert (batch.tensors["moments"][i].numpy() == own.members["moments"]).all()
                for name in ("tokens", "column.extra"):
                    assert (batch.tensors[name][i].numpy() == beside.members[name]).all()


def test_the_order_is_that_of_the_cache_alone(made: tuple[Storage, Manifest, str]) -> None:
    make_columns(made[2], made[1])
    numbers = np.arange(400)
    alone, both = (dataset_of(made[0], manifest).order(3, 8).locate(numbers) for manifest in (made[1], opened(made)))
    assert (alone.block == both.block).all() and (alone.place == both.place).all()


def test_the_facts_of_the_columns_text_stand_in_place_of_the_caches(made: tuple[Storage, Manifest, str]) -> None:
    columns = make_columns(made[2], made[1])
    manifest = opened(made)
    contract = manifest.contract
    assert contract.text == columns.contract.text and contract.text_sha256 == "e" * 64
    assert contract.caption_key == "json:long" and contract.encoders["text"] == "other"
    assert [member.name for member in contract.members] == ["moments", "cond.labels", "tokens", "column.extra"]
    assert contract_from_json(plain(contract)) == contract  # a run keeps it
    assert (read_uncond(made[0], manifest) == 0.5).all()
    assert manifest.digest != made[1].digest and manifest.own.digest == made[1].digest
    assert [one.meta["caption"] for one in first_records(made[0], manifest, 2)] == ["long 0 0", "long 0 1"]
    [first] = first_records(made[0], manifest, 1, ("moments", "column.extra"))
    assert set(first.members) == {"moments", "column.extra"}


def test_columns_without_a_text_leave_the_caches_captions(made: tuple[Storage, Manifest, str]) -> None:
    make_columns(made[2], made[1], text=False)
    manifest = opened(made)
    assert manifest.contract.text == made[1].contract.text
    [first] = first_records(made[0], manifest, 1)
    assert first.meta["caption"] == "picture 0 of shard 0" and set(first.members) >= {"text", "column.extra"}


def test_records_without_a_value_are_never_read(made: tuple[Storage, Manifest, str]) -> None:
    without = [(0, 0), (1, 4), (3, 8)]
    make_columns(made[2], made[1], without=without)
    manifest = opened(made)
    assert manifest.samples == sum(SIZES) - 3
    assert load_excluded(made[0], manifest).tolist() == [list(pair) for pair in without]
    found = set()
    for batch in batches(dataset_of(made[0], manifest), 12):
        found |= set(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True))
    assert not found & set(without)
    assert next(iter(first_records(made[0], manifest, 1))).meta["caption"] == "long 0 1"


def test_two_columns_are_joined_in_any_order_and_not_with_arrays_of_one_name(
    made: tuple[Storage, Manifest, str], tmp_path: Path
) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    make_columns(one, made[1])
    make_columns(two, made[1], text=False, name="more")
    manifest = opened(made, one, two)
    assert manifest.digest == opened(made, two, one).digest
    assert {"column.extra", "column.more", "tokens"} <= {member.name for member in manifest.contract.members}
    make_columns(two, made[1], text=False)
    with pytest.raises(ContractMismatch, match=r"both hold column\.extra"):
        opened(made, one, two)


def changed(columns: Columns, number: int, **changes: object) -> Columns:
    shards = list(columns.shards)
    shards[number] = dataclasses.replace(shards[number], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(columns, shards=tuple(shards))


def _resized(columns: Columns) -> Columns:
    units = list(columns.units)
    units[1] = dataclasses.replace(units[1], joined=units[1].joined - 1)
    shards = changed(columns, 1, samples=columns.shards[1].samples - 1).shards
    return dataclasses.replace(columns, units=tuple(units), shards=shards)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("another length", _resized),
        ("another order", lambda c: dataclasses.replace(c, shards=(c.shards[1], c.shards[0], *c.shards[2:]))),
        ("of another tar than the cache's", lambda c: changed(c, 2, of="f" * 64)),
        ("have 3 tars", lambda c: dataclasses.replace(c, shards=c.shards[:3], units=c.units[:3])),
    ],
)
def test_columns_that_do_not_fit_are_refused_when_they_are_opened(
    made: tuple[Storage, Manifest, str], what: str, change: object
) -> None:
    write_columns(made[2], change(make_columns(made[2], made[1])))  # type: ignore[operator]
    with pytest.raises(ContractMismatch, match=what):
        opened(made)


def test_columns_of_another_cache_are_refused(made: tuple[Storage, Manifest, str], tmp_path: Path) -> None:
    other = make_cache(str(tmp_path / "other"), [3, 4])
    make_columns(made[2], other)
    manifest = opened(made)
    assert manifest is made[1]
    with pytest.raises(ContractMismatch, match=f"belong to a cache whose digest is {other.digest[:12]}"):
        require_all_bound([made[2]], [manifest], "data.train")


@pytest.mark.parametrize("shift", [1, 4])
def test_records_of_other_keys_are_never_joined(made: tuple[Storage, Manifest, str], shift: int) -> None:
    """Every hash and count is right, and the rows stand in another order than the cache's."""

    def rotated(unit: int, row: int, **options: object) -> Record:
        return column_record(unit, (row + shift) % SIZES[unit], **options)  # type: ignore[arg-type]

    make_columns(made[2], made[1], record_of=rotated)
    manifest = opened(made)
    with pytest.raises(ShardCorrupt, match=r"columns/00000\d\.tar: row \d+ is 00000\d_\d+.json, and the cache's is"):
        batches(dataset_of(made[0], manifest), 4)
    with pytest.raises(ShardCorrupt, match="row 0 is 000000_00000"):
        list(first_records(made[0], manifest, 3))


def test_a_file_of_columns_that_is_missing_or_cut_is_said_when_they_are_opened(
    made: tuple[Storage, Manifest, str],
) -> None:
    make_columns(made[2], made[1], without=[(0, 1)])
    storage = open_storage(made[2])
    for key in ("000002.tar", "000001.index.json", load_columns(storage).excluded_name):
        data = storage.get(key)
        storage.delete(key)
        with pytest.raises(DatasetError, match=key.rpartition("/")[2]):
            opened(made)
        storage.put(key, data)
    storage.put("000002.tar", storage.get("000002.tar")[:-512])
    with pytest.raises(DatasetError, match=r"000002\.tar has"):
        opened(made)


def test_bytes_that_are_not_what_columns_json_says_are_never_given(made: tuple[Storage, Manifest, str]) -> None:
    make_columns(made[2], made[1])
    path = Path(made[2]) / "000001.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardCorrupt, match="latentmill columns"):
        batches(dataset_of(made[0], opened(made)), 8)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"format":1', b'"format":2'),
        (b'"version":1', b'"version":0'),
        (b'"excluded":1', b'"excluded":2'),
        (b'"joined":6', b'"joined":7'),
        (b'"name":"000001.tar"', b'"name":"000000.tar"'),
        (b'"name":"column.extra"', b'"name":"moments"'),
        (b'"name":"tokens"', b'"name":"text"'),
        (b'"caption_key":"json:long"', b'"caption_key":""'),
        (b'"unit":3', b'"unit":9'),
        (b'"shape":[2]', b'"shape":[-1]'),
        (b'"units":', b'"other":'),
        (b'{"contract"', b'{ "contract"'),
        (b'"scores":[]', b'"scores":["extra"]'),
    ],
)
def test_a_columns_json_that_contradicts_itself_is_refused(
    made: tuple[Storage, Manifest, str], old: bytes, new: bytes
) -> None:
    data = columns_bytes(make_columns(made[2], made[1], without=[(0, 1)]))
    assert parse_columns(data).digest
    assert old in data
    with pytest.raises(ParseError):
        parse_columns(data.replace(old, new, 1))
    open_storage(made[2]).put(COLUMNS, data.replace(old, new, 1))
    with pytest.raises(LatentmillError, match=r"columns\.json cannot be read"):
        opened(made)


def test_a_place_without_columns_is_said(made: tuple[Storage, Manifest, str]) -> None:
    with pytest.raises(DatasetError, match=r"holds no columns\.json"):
        opened(made)
    assert joined(made[0], [made[2]], made[1], lenient=True) is made[1]


def test_records_with_other_columns_are_others_to_the_ledger(made: tuple[Storage, Manifest, str]) -> None:
    make_columns(made[2], made[1])
    dataset = Dataset([part_of(made[0], opened(made))])
    assert dataset.columns and not Dataset([part_of(made[0], made[1])]).columns
    places = np.arange(5), np.zeros(5, dtype=np.int64), np.arange(5)
    alone, both = record_hashes(*places), record_hashes(*places, dataset.columns)
    assert (alone == record_hashes(*places, "")).all() and not (alone == both).any()


def test_a_mixture_reads_the_columns_of_each_of_its_caches(made: tuple[Storage, Manifest, str], tmp_path: Path) -> None:
    other, beside = str(tmp_path / "other"), str(tmp_path / "other_columns")
    make_columns(made[2], made[1])
    make_columns(beside, make_cache(other, [6, 11]), without=[(0, 2)])
    urls, caches = [beside, made[2]], [made[0], open_storage(other)]
    manifests = [joined(cache, urls) for cache in caches]
    require_all_bound(urls, manifests, "data.train and data.mix")
    dataset = Dataset([part_of(cache, manifest) for cache, manifest in zip(caches, manifests, strict=True)])
    for batch in batches(dataset, 12):
        for i, (shard, row) in enumerate(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True)):
            number = shard - (len(SIZES) if shard >= len(SIZES) else 0)
            assert (shard, row) != (len(SIZES), 2)
            assert batch.tensors["column.extra"][i].tolist() == [number, row]


def test_facts_of_a_text_that_come_later_leave_the_bytes_of_columns_as_they_are(
    made: tuple[Storage, Manifest, str],
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(TextFacts):
        places: tuple[str, ...] = ()

    columns = make_columns(made[2], made[1])
    text = columns.contract.text
    assert text is not None
    no_more_and_more: tuple[dict[str, Any], ...] = ({}, {"places": ("here",)})
    same, other = (
        dataclasses.replace(columns, contract=dataclasses.replace(columns.contract, text=Later(**vars(text), **more)))
        for more in no_more_and_more
    )
    assert columns_bytes(same) == columns_bytes(columns) != columns_bytes(other)
    assert same.contract.digest == columns.contract.digest != other.contract.digest
