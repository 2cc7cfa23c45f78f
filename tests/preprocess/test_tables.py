"""Parquet files and Hugging Face's datasets on disk: each row is the sample that a tar with its image and a json is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from made.encode import files, write_tar
from made.gathered import identity, image_schema, picture, rows_of, write_dataset, write_parquet
from made.growing import _encoders, keys, run, units  # noqa: F401
from pipeline.config import FiltersConfig, LaunchConfig, LimitsConfig, VerifyConfig
from pipeline.data.format.contract import canonical_json
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import DataError, DestinationExists, ShardCorrupt, SourceError
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.gathering.unit import SourceUnit
from preprocess.units.given import Cut, look

JSON = {"caption_key": ("json:text",)}


def proved(dest: Path, source: object) -> None:
    assert verify.main(VerifyConfig(dataset=str(dest), source=str(source), samples=16, min_psnr=0.0)) == 0


def quick(source: object, dest: object, **changes: Any) -> int:
    """Encodes crops, which takes no encoders."""
    return run(source, dest, **{"stored": "pixels", **changes})


def manifest_of(dest: Path) -> Manifest:
    return load_manifest(open_storage(str(dest)))


def members_of(stem: str, rows: list[dict[str, Any]], first: int = 0) -> list[tuple[str, bytes]]:
    """The files that rows stand for."""
    members = []
    for number, row in enumerate(rows, first):
        others = {"text": row["text"], "score": row["score"]}
        members += [
            (f"{stem}/{number:08d}.png", row["image"]["bytes"]),
            (f"{stem}/{number:08d}.json", canonical_json(others)),
        ]
    return members


def test_a_row_is_the_sample_of_its_image_and_a_json_of_its_other_columns(tmp_path: Path) -> None:
    rows = rows_of(range(6))
    table = write_parquet(tmp_path / "train.parquet", rows)
    write_tar(tmp_path / "0.tar", members_of("train", rows))
    changes = {**JSON, "filters": FiltersConfig(keep=("score<0.6",))}
    run(tmp_path / "0.tar", tmp_path / "of-tar", **changes)
    run(table, tmp_path / "of-table", **changes)
    for name in ("000000.tar", "000000.index.json"):
        assert files(tmp_path / "of-table")[name] == files(tmp_path / "of-tar")[name]
    assert manifest_of(tmp_path / "of-table").rejected == {"filter:score<0.6": 1}
    proved(tmp_path / "of-table", table)


@pytest.mark.parametrize("group", [1, 3, 100])
def test_units_are_rows_in_groups_of_a_stated_size_whatever_the_row_groups_are(tmp_path: Path, group: int) -> None:
    rows = rows_of(range(10))
    table = write_parquet(tmp_path / "train.parquet", rows, group=group)
    quick(table, tmp_path / "c", unit_size=4)
    manifest = manifest_of(tmp_path / "c")
    assert [unit.source for unit in manifest.units] == [f"train.parquet@{i:06d}" for i in range(3)]
    assert [unit.read for unit in manifest.units] == [4, 4, 2]
    assert sum(unit.source_bytes for unit in manifest.units) == table.stat().st_size
    for number, unit in enumerate(manifest.units):
        first = 4 * number
        assert unit.source_sha256 == identity(members_of("train", rows[first : first + 4], first))[0]
    proved(tmp_path / "c", table)


def test_bytes_do_not_depend_on_workers_or_processes(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 5)):
        write_parquet(tmp_path / f"{name}.parquet", rows_of(range(first, first + 5)), group=2)
    source = tmp_path / "*.parquet"
    quick(source, tmp_path / "one", unit_size=3)
    quick(source, tmp_path / "four", unit_size=3, workers=4)
    assert quick(source, tmp_path / "two", unit_size=3, launch=LaunchConfig(processes=2, threads=1)) == 0
    assert files(tmp_path / "one") == files(tmp_path / "four") == files(tmp_path / "two")


def test_further_tables_append_and_changed_ones_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", rows_of(range(5)))
    quick(tmp_path / "*.parquet", tmp_path / "c", unit_size=3)
    write_parquet(tmp_path / "a.parquet", rows_of(range(5, 9)))
    quick(tmp_path / "*.parquet", tmp_path / "c", unit_size=3)
    assert units(tmp_path / "c") == [f"{name}.parquet@{i:06d}" for name in "ba" for i in range(2)]
    proved(tmp_path / "c", tmp_path / "*.parquet")
    write_parquet(tmp_path / "a.parquet", rows_of(range(15, 19)))
    with pytest.raises(DestinationExists, match=r"is another a\.parquet@00000\d than the one"):
        quick(tmp_path / "*.parquet", tmp_path / "c", unit_size=3)
    with pytest.raises(DataError):
        proved(tmp_path / "c", tmp_path / "*.parquet")
    with pytest.raises(DestinationExists, match="was begun with unit_size=3, not unit_size=1000"):
        quick(tmp_path / "*.parquet", tmp_path / "c")


def test_a_dataset_on_disk_gives_the_records_of_its_tables(tmp_path: Path) -> None:
    parts = [rows_of(range(7)), rows_of(range(7, 11))]
    saved = write_dataset(tmp_path / "saved", parts)
    quick(saved, tmp_path / "c", unit_size=5)
    stems = [f"data-{i:05d}-of-00002" for i in range(2)]
    assert units(tmp_path / "c") == [f"{stems[0]}.arrow@000000", f"{stems[0]}.arrow@000001", f"{stems[1]}.arrow@000000"]
    members = members_of(stems[0], parts[0])
    assert manifest_of(tmp_path / "c").units[1].source_sha256 == identity(members[10:])[0]
    write_tar(tmp_path / "0.tar", members_of(stems[0], parts[0])[:10])
    quick(tmp_path / "0.tar", tmp_path / "d")
    assert files(tmp_path / "c")["000000.tar"] == files(tmp_path / "d")["000000.tar"]
    proved(tmp_path / "c", saved)


def test_arrow_files_of_random_access_are_read_as_streams_are(tmp_path: Path) -> None:
    rows = rows_of(range(5))
    table = pa.Table.from_pylist(rows, image_schema(pa))
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    quick(tmp_path / "x.arrow", tmp_path / "c", unit_size=2)
    assert manifest_of(tmp_path / "c").units[1].source_sha256 == identity(members_of("x", rows[2:4], 2))[0]


def test_rows_that_cannot_be_used_are_counted_and_the_others_stay(tmp_path: Path) -> None:
    rows = rows_of(range(8))
    rows[1]["image"] = None
    rows[2]["image"] = {"bytes": None, "path": "/etc/passwd"}
    rows[3]["text"] = None
    rows[4]["image"] = {"bytes": b"no image", "path": None}
    table = pa.Table.from_pylist(rows, image_schema(pa))
    words = [row["text"].encode() if row["text"] else None for row in rows]
    words[5] = b"\xff\xfe"
    spoilt = pa.array(words, pa.binary()).view(pa.string())
    table = table.set_column(1, "text", spoilt)
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    run(tmp_path / "t.parquet", tmp_path / "c", max_rejects=0.9, **JSON)
    assert manifest_of(tmp_path / "c").rejected == {
        "image_missing": 1,
        "image_elsewhere": 1,
        "caption_missing": 1,
        "image_unreadable": 1,
        "row_unreadable": 1,
    }
    assert keys(tmp_path / "c") == [f"t/{i:08d}" for i in (0, 6, 7)]
    listed = (tmp_path / "c/units/000000.rejected.jsonl").read_text()
    assert {json.loads(line)["key"] for line in listed.splitlines()} == {f"t/{i:08d}" for i in range(1, 6)}
    proved(tmp_path / "c", tmp_path / "t.parquet")


def test_values_of_every_kind_become_json_and_maps_become_files(tmp_path: Path) -> None:
    import datetime
    import decimal

    columns = {
        "jpg": pa.array([picture(0)], pa.large_binary()),
        "mask": pa.array([{"bytes": picture(1), "path": None}]),
        "words": pa.array([["a", "b"]]),
        "nan": pa.array([float("nan")]),
        "day": pa.array([datetime.date(2026, 11, 30)]),
        "price": pa.array([decimal.Decimal("1.50")]),
        "label": pa.array(["x"]).dictionary_encode(),
        "blob": pa.array([b"\0"], pa.binary(1)),
        "yes": pa.array([True]),
        "text": pa.array(["a red circle"], pa.large_string()),
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    quick(tmp_path / "t.parquet", tmp_path / "c")
    others: dict[str, Any] = {
        "words": ["a", "b"],
        "nan": None,
        "day": "2026-11-30",
        "price": "1.50",
        "label": "x",
        "blob": None,
    }
    others |= {"yes": True, "text": "a red circle"}
    members = [
        ("t/00000000.png", picture(0)),
        ("t/00000000.mask.png", picture(1)),
        ("t/00000000.json", canonical_json(others)),
    ]
    assert manifest_of(tmp_path / "c").units[0].source_sha256 == identity(members)[0]


def test_the_column_of_images_is_found_or_asked_for(tmp_path: Path) -> None:
    both = pa.table({"left": [picture(0)], "right": [picture(1)], "text": ["a red circle"]})
    pa.parquet.write_table(both, tmp_path / "t.parquet")
    with pytest.raises(SourceError, match=r"several columns of encoded images .* left, right: give image_column=NAME"):
        quick(tmp_path / "t.parquet", tmp_path / "c")
    with pytest.raises(SourceError, match="no column text of encoded images"):
        quick(tmp_path / "t.parquet", tmp_path / "c", image_column="text")
    quick(tmp_path / "t.parquet", tmp_path / "c", image_column="right")
    proved(tmp_path / "c", tmp_path / "t.parquet")
    with pytest.raises(DestinationExists, match="image_column=right, not unit_size=1000 image_column=left"):
        quick(tmp_path / "t.parquet", tmp_path / "c", image_column="left")
    pa.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "u.parquet")
    with pytest.raises(SourceError, match=r"u\.parquet: no column of encoded images .* its columns are text"):
        quick(tmp_path / "u.parquet", tmp_path / "d")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_tables_are_refused_or_leave_their_units_undone(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        path = write_parquet(tmp_path / "t.parquet", rows_of(range(8)), sums=True)
    else:
        path = write_dataset(tmp_path / "s", [rows_of(range(8))]) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for damage in (b"", b"x", whole[:100], whole[: len(whole) // 2], b"\0" * len(whole), whole[:-1]):
        path.write_bytes(damage)
        with pytest.raises((SourceError, ShardCorrupt), match=rf"{path.name}"):
            quick(path, tmp_path / "c")
        assert not (tmp_path / "c/manifest.json").exists()
    messages = []
    for at in range(40, len(whole), len(whole) // 16):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            with open_table(path) as unit:
                assert len(list(unit.samples())) <= 8
        except (SourceError, ShardCorrupt) as error:
            messages.append(str(error))
    assert all("\n" not in message and path.name in message for message in messages)
    assert len(messages) > 12 or kind == "arrow"  # which has no checksums


def open_table(path: Path) -> SourceUnit:
    given = look(str(path), Cut()).units()
    return given[0].open(LimitsConfig())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"state.json": "{"}, r"state\.json cannot be read"),
        ({"state.json": '{"_data_files": [{"filename": "../x.arrow"}]}'}, r"names '\.\./x\.arrow', which is no Arrow"),
        ({"state.json": '{"_data_files": [{"filename": "gone.arrow"}]}'}, r"gone\.arrow is not there"),
        ({"state.json": '{"_data_files": []}'}, "is a dataset without rows"),
        ({"state.json": '{"_data_files": [], "_indices_files": [{"filename": "i"}]}'}, "flatten_indices"),
        ({"dataset_dict.json": '{"splits": ["train", "test"]}'}, r"splits \(train, test\): give one of them"),
    ],
)
def test_datasets_that_cannot_be_read_are_refused(tmp_path: Path, change: dict[str, str], what: str) -> None:
    saved = write_dataset(tmp_path / "saved", [rows_of(range(2))])
    for name, text in change.items():
        (saved / name).write_text(text)
    with pytest.raises(SourceError, match=what):
        quick(saved, tmp_path / "c")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"not installed: pip install 'latentmill\[tables\]'"):
        quick(tmp_path / "t.parquet", tmp_path / "c")


def test_a_table_in_a_bucket_gives_what_it_gives_on_a_disk(tmp_path: Path, s3: str) -> None:
    table = write_parquet(tmp_path / "t.parquet", rows_of(range(9)))
    open_storage(s3).put("in/t.parquet", table.read_bytes())
    quick(table, tmp_path / "c", unit_size=5)
    quick(f"{s3}/in/*.parquet", tmp_path / "d", unit_size=5)
    assert manifest_of(tmp_path / "c").shards == manifest_of(tmp_path / "d").shards
    assert manifest_of(tmp_path / "c").units == manifest_of(tmp_path / "d").units
    proved(tmp_path / "d", f"{s3}/in/t.parquet")
    open_storage(s3).put("in/x.arrow", b"ARROW1")
    with pytest.raises(SourceError, match="Arrow files are read from a disk"):
        quick(f"{s3}/in/x.arrow", tmp_path / "e")


def test_captions_of_a_table_are_those_of_its_rows(tmp_path: Path) -> None:
    rows = rows_of(range(3))
    run(write_parquet(tmp_path / "t.parquet", rows), tmp_path / "c", **JSON)
    storage = open_storage(str(tmp_path / "c"))
    found = [record.meta["caption"] for record in first_records(storage, load_manifest(storage), 9)]
    assert found == [row["text"] for row in rows]
