"""`latentmill verify` of columns: good ones pass; each way of being wrong fails and is named."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.columns import write_columns
from made.joining import (
    _tower,  # noqa: F401
    make_cache,
    numbers_of,
    run,
    text_tower,
    write_lines,
    write_values,
)
from pipeline.config import VerifyConfig
from pipeline.data.format.contract import canonical_json
from pipeline.data.format.records import Record, npy_bytes
from pipeline.data.joined.columns import load_columns
from pipeline.errors import ConfigError, ContractMismatch, DataError, LatentmillError, SourceError
from pipeline.storage.urls import open_storage
from preprocess.encoding.writer import ShardWriter
from preprocess.proving import columns as proving
from preprocess.verify import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two tars, and columns that lack one record."""
    folder = tmp_path_factory.mktemp("made")
    make_cache(folder)
    with pytest.MonkeyPatch.context() as patched:
        from preprocess.joining import plan

        patched.setattr(plan, "load_text", lambda encoders, device: text_tower(encoders, str(device)))
        write_values(folder / "values/00000.tar", numbers_of(0))
        write_values(folder / "values/00001.tar", numbers_of(1)[:-1])
        wanted: dict[str, Any] = {
            "caption_key": "txt",
            "text_storage": "trimmed",
            "features": ("dino",),
            "scores": ("score",),
        }
        run(folder, "values/*.tar", max_rejects=0.1, **wanted)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(proving, "load_text", lambda encoders, device: text_tower(encoders, str(device)))
    return tmp_path


def verify(folder: Path, source: str = "values/*.tar", **changes: object) -> int:
    fields = {"of": str(folder / "cache"), "source": source and f"{folder}/{source}", "samples": 12, **changes}
    return main(VerifyConfig(dataset=str(folder / "columns"), **fields))  # type: ignore[arg-type]


def test_good_columns_pass_with_and_without_their_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder) == 0
    said = capsys.readouterr().out
    assert "every hash and key right" in said and "11 of 12 records" in said and "11 records: every value right" in said
    assert verify(folder, "") == 0
    assert "not compared: give source=" in capsys.readouterr().out


def rewrite(folder: Path, change: Callable[[list[Record]], list[Record]]) -> None:
    """Writes the first tar anew with other records, and every hash and count of it."""
    storage = open_storage(str(folder / "columns"))
    columns = load_columns(storage)
    entry = columns.shards[0]
    from pipeline.data.reading.shards import fetch_shard

    shard = fetch_shard(storage, entry, columns.contract)
    tar = io.BytesIO()
    writer = ShardWriter(tar)
    for record in change([shard.record(row) for row in range(entry.samples)]):
        writer.add(record)
    facts = writer.finish()
    index = canonical_json(facts)
    storage.put(entry.name, tar.getvalue())
    storage.put(entry.index_name, index)
    new = dataclasses.replace(
        entry, bytes=facts["bytes"], sha256=facts["sha256"], index_sha256=hashlib.sha256(index).hexdigest()
    )
    write_columns(str(folder / "columns"), dataclasses.replace(columns, shards=(new, *columns.shards[1:])))


def of_each(change: Callable[[Record], Record]) -> Callable[[list[Record]], list[Record]]:
    return lambda records: [change(records[0]), *records[1:]]


def with_members(**members: np.ndarray) -> Callable[[Record], Record]:
    named = {name.replace("_", ".", 1): array for name, array in members.items()}
    return lambda record: Record(record.key, {**record.members, **named}, record.meta)


def exchanged(records: list[Record]) -> list[Record]:
    """The values of the first two records exchanged, with their json; the keys of the tar are right."""
    one, two, *rest = records
    return [Record(one.key, two.members, two.meta), Record(two.key, one.members, one.meta), *rest]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (exchanged, "row 0 is of sample '00001', and the cache's of '00000'"),
        (lambda records: records[::-1], "row 0 is of sample '00005'"),
        (of_each(with_members(column_dino=np.zeros((3, 2), dtype=np.float16))), "column.dino is not float16"),
        (of_each(with_members(column_dino=np.full((2, 3), np.inf, dtype=np.float16))), "column.dino holds NaN"),
        (of_each(with_members(column_score=np.array(7, dtype=np.float32))), "column.score of 000000_000000 is not"),
        (of_each(with_members(column_more=np.array(7, dtype=np.float32))), "holds column.dino, column.more"),
        (of_each(with_members(text=np.zeros((4, 128), dtype=np.float16))), "text differs by up to"),
        (
            of_each(lambda one: Record(one.key, one.members, {**one.meta, "caption": "other"})),
            "the caption of 000000_0",
        ),
        (of_each(lambda one: Record(one.key, one.members, {**one.meta, "caption": ""})), "has no caption"),
        (of_each(lambda one: Record(one.key, {}, {**one.meta, "rejected": "gone"})), "does not name those that have"),
        (of_each(lambda one: Record(one.key, one.members, {**one.meta, "rejected": "gone"})), "and holds arrays"),
    ],
)
def test_columns_whose_records_are_wrong_fail_though_every_hash_is_right(
    folder: Path, change: Callable[[list[Record]], list[Record]], line: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(DataError) as caught:
        verify(folder)
    assert line in str(caught.value)


def _other_score(folder: Path) -> None:
    path = folder / "lines/00000.jsonl"
    path.write_text(path.read_text().replace('"score": 0.25', '"score": 0.5'))


def test_a_source_that_has_changed_since_is_named(folder: Path) -> None:
    for shard in range(2):
        write_lines(folder / f"lines/{shard:05d}.jsonl", numbers_of(shard))
    shutil.rmtree(folder / "columns")
    run(folder, "lines/*.jsonl", caption_key="", scores=("score",))
    assert verify(folder, "lines/*.jsonl") == 0
    _other_score(folder)
    with pytest.raises(DataError, match=r"00000\.jsonl is not what the columns were made from"):
        verify(folder, "lines/*.jsonl")


def test_a_byte_that_has_changed_is_found(folder: Path) -> None:
    path = folder / "columns/000001.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000001\.tar was read twice and is not what the manifest promises"):
        verify(folder)


def test_an_empty_caption_of_other_bytes_is_found(folder: Path) -> None:
    open_storage(str(folder / "columns")).put("uncond.npy", npy_bytes(np.zeros((32, 128), dtype=np.float16)))
    with pytest.raises(DataError, match=r"uncond\.npy is missing or not what the manifest promises"):
        verify(folder)


def test_columns_are_proved_with_the_cache_that_they_belong_to_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds columns: name the cache that they belong to, of=CACHE"):
        verify(folder, of="")
    (tmp_path / "other").mkdir()
    make_cache(tmp_path / "other", crop="random", seed=3)
    with pytest.raises(ContractMismatch, match="belong to a cache whose digest is"):
        verify(folder, of=str(tmp_path / "other/cache"))
    (folder / "values/00000.tar").rename(folder / "values/photos.tar")
    with pytest.raises(SourceError, match="is named like no input shard"):
        verify(folder)
    with pytest.raises(LatentmillError, match=r"holds no manifest\.json|holds no columns"):
        main(VerifyConfig(dataset=str(folder / "values"), of=str(folder / "cache")))


def test_columns_json_holds_no_place_of_this_machine(folder: Path) -> None:
    text = (folder / "columns/columns.json").read_text()
    assert str(folder) not in text and json.loads(text)["units"][0]["source"] == "00000.tar"
