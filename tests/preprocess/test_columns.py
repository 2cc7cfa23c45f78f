"""preprocess/columns.py: values reach the records that have their samples' keys, whatever their order; the bytes depend
on nothing else; what is missing or wrong is counted or refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.encode import config as encode_config
from made.encode import files, write_sized, write_tar
from made.joining import (
    COUNT,
    _tower,  # noqa: F401
    caption_of,
    make_cache,
    npy,
    numbers_of,
    records,
    run,
    text_tower,
    write_lines,
    write_values,
)
from pipeline.config import EncodersConfig, IndexConfig, LaunchConfig
from pipeline.data.format.manifest import find_version
from pipeline.data.joined.columns import load_columns
from pipeline.data.joined.opening import joined
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.reader import Reader
from pipeline.data.reading.shards import first_records
from pipeline.errors import ContractMismatch, DestinationExists, LatentmillError, ShardCorrupt, SourceError
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import encode, index
from preprocess.encoding.claims import Claims
from preprocess.joining import source as reading
from preprocess.joining import unit


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two tars of COUNT pictures."""
    folder = tmp_path_factory.mktemp("cached")
    make_cache(folder)
    return folder


@pytest.fixture
def folder(cached: Path, tmp_path: Path) -> Path:
    shutil.copytree(cached / "cache", tmp_path / "cache")
    return tmp_path


def lines(folder: Path, name: str = "lines", reverse: bool = False) -> str:
    for shard in range(2):
        numbers = numbers_of(shard)
        write_lines(folder / name / f"{shard:05d}.jsonl", numbers[::-1] if reverse else numbers)
    return f"{name}/*.jsonl"


def values(folder: Path) -> str:
    for shard in range(2):
        write_values(folder / "values" / f"{shard:05d}.tar", [*numbers_of(shard), 900])
    return "values/*.tar"


def test_captions_features_and_scores_reach_the_records_of_their_keys(folder: Path) -> None:
    assert run(folder, values(folder), caption_key="txt", features=("dino",), scores=("score",)) == 0
    found, tower = records(folder), text_tower(EncodersConfig(seed=1, vae="pixels"), "cpu")
    assert sorted(found) == [f"{n:05d}" for n in range(2 * COUNT)]
    for key, record in found.items():
        number = int(key)
        assert record.meta["caption"] == caption_of(number)
        assert record.members["tokens"].tolist() == tower.ids(caption_of(number))[0]
        assert (record.members["column.dino"] == np.full((2, 3), number)).all()
        assert record.members["column.dino"].dtype == np.float16
        assert record.members["column.score"] == np.float32(number / 4)
        assert record.members["pixels"].shape == (3, 16, 16)
    columns = load_columns(open_storage(str(folder / "columns")))
    assert [(unit.read, unit.unused, unit.joined) for unit in columns.units] == [(COUNT + 1, 1, COUNT)] * 2


@pytest.mark.parametrize("storage", ["tokens", "trimmed", "full"])
def test_the_bytes_are_the_same_in_whatever_order_the_values_come(folder: Path, storage: str) -> None:
    changes: dict[str, Any] = {"text_storage": storage, "scores": ("score",)}
    run(folder, lines(folder), "one", **changes)
    run(folder, lines(folder, "reversed", reverse=True), "two", **changes)
    one, two = files(folder / "one"), files(folder / "two")
    tars = [key for key in one if key.endswith((".tar", ".index.json", ".npy"))]
    assert len(tars) == 5 and {key: one[key] for key in tars} == {key: two[key] for key in tars}
    states = [record.members for record in records(folder, "one").values()]
    assert all(("tokens" in one) == (storage == "tokens") for one in states)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(folder)
    run(folder, source, "whole")
    put, writes, fatal = LocalStorage.put, list[str](), [0]

    def dying(self: LocalStorage, key: str, data: bytes) -> None:
        if not key.startswith("claims/"):
            writes.append(key)
            if len(writes) == fatal[0]:
                raise KeyboardInterrupt
        put(self, key, data)

    for number in (1, 2, 3, 1, 2):  # at an index or at a report of the first unit, then of the second
        writes.clear()
        fatal[:] = [number]
        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, "put", dying)
            patched.setattr(Claims, "release", lambda *_: None)
            with pytest.raises(KeyboardInterrupt):
                run(folder, source, "killed", claim_seconds=0.01)
        assert not (folder / "killed/columns.json").exists()
    assert run(folder, source, "killed", claim_seconds=0.01) == 0
    assert files(folder / "killed") == files(folder / "whole")
    assert run(folder, source, "killed") == 0  # nothing is left to do


@pytest.mark.long
def test_two_processes_make_the_bytes_of_one(folder: Path) -> None:
    source = lines(folder)
    run(folder, source, "one", text_storage="full")
    assert run(folder, source, "two", text_storage="full", launch=LaunchConfig(processes=2, threads=1)) == 0
    assert files(folder / "two") == files(folder / "one")


def test_a_unit_whose_tar_is_gone_is_made_again(folder: Path) -> None:
    source = lines(folder)
    run(folder, source)
    made = files(folder / "columns")
    (folder / "columns/000001.tar").unlink()
    run(folder, source)
    assert files(folder / "columns") == made


def test_records_without_a_value_are_counted_and_left_out(folder: Path) -> None:
    write_lines(folder / "lines/00000.jsonl", numbers_of(0)[1:])
    write_lines(folder / "lines/00001.jsonl", numbers_of(1)[:-1])
    path = folder / "lines/00001.jsonl"
    path.write_text(
        path.read_text() + '{"key": "00011", "long": "   "}\n{"key": "00011", "long": "too late"}\nnothing\n'
    )
    with pytest.raises(SourceError, match=r"2 of the cache's 12 records have no value .*max_rejects=0"):
        run(folder, "lines/*.jsonl")
    assert not (folder / "columns/columns.json").exists()
    assert run(folder, "lines/*.jsonl", max_rejects=0.2) == 0
    columns = load_columns(open_storage(str(folder / "columns")))
    assert columns.rejected == {"key_missing": 1, "caption_empty": 1} and columns.excluded == 2
    assert sorted(records(folder)) == [f"{n:05d}" for n in range(1, 11)]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("00003.dino.npy", npy(np.zeros((3, 3), dtype=np.float16))), "feature_shape:dino"),
        (("00003.dino.npy", npy(np.zeros((2, 3), dtype=np.float64))), "feature_unreadable:dino"),
        (("00003.dino.npy", npy(np.full((2, 3), np.nan, dtype=np.float16))), "feature_not_finite:dino"),
        (("00003.dino.npy", b"\x80\x04pickle"), "feature_unreadable:dino"),
        (("00003.other", b""), "feature_missing:dino"),
        (("00003.json", b'{"score": "high"}'), "score_not_number:score"),
        (("00003.json", b'{"score": true}'), "score_not_number:score"),
        (("00003.json", b'{"score": 1e300}'), "score_not_number:score"),
        (("00003.json", b"{}"), "score_missing:score"),
        (("00003.json", b"{"), "json_unreadable"),
    ],
)
def test_a_value_that_cannot_be_used_is_counted_by_its_reason(
    folder: Path, member: tuple[str, bytes], reason: str
) -> None:
    members = []
    for n in range(COUNT):
        own = {
            f"{n:05d}.dino.npy": npy(np.full((2, 3), n, dtype=np.float16)),
            f"{n:05d}.json": b'{"score": 1}',
        }
        if n == 3:
            if reason.startswith("feature_missing"):
                del own["00003.dino.npy"]
            own |= dict([member])
        members += sorted(own.items())
    (folder / "values").mkdir()
    write_tar(folder / "values/00000.tar", members)
    write_values(folder / "values/00001.tar", numbers_of(1))
    run(folder, "values/*.tar", caption_key="", features=("dino",), scores=("score",), max_rejects=0.1)
    assert load_columns(open_storage(str(folder / "columns"))).rejected == {reason: 1}
    assert "00003" not in records(folder) and len(records(folder)) == 2 * COUNT - 1


def test_columns_grow_with_their_cache_and_say_when_they_are_of_a_former_version(tmp_path: Path) -> None:
    make_cache(tmp_path)
    run(tmp_path, lines(tmp_path))
    before = files(tmp_path / "columns")
    manifest = make_cache(tmp_path, 1, first=2)
    assert manifest.version == 2
    with pytest.raises(ContractMismatch, match=r"are of version 1 of .*, and version 2 of it is read"):
        records(tmp_path)
    with pytest.raises(SourceError, match=r"has nothing for 1 of the 1 units that are to be made, the first is 00002"):
        run(tmp_path, "lines/*.jsonl")
    write_lines(tmp_path / "more/00002.jsonl", numbers_of(2))
    run(tmp_path, "more/*.jsonl")
    assert len(records(tmp_path)) == 3 * COUNT
    after = files(tmp_path / "columns")
    assert {key: after[key] for key in before if key != "columns.json"} == {
        key: data for key, data in before.items() if key != "columns.json"
    }
    cache = open_storage(str(tmp_path / "cache"))
    former = find_version(cache, load_columns(open_storage(str(tmp_path / "columns")), "").dataset)
    assert former is not None and former.version == 2
    first = next(key for key in before if key.startswith("bound/"))
    old = find_version(cache, Path(first).stem)
    assert old is not None and joined(cache, [str(tmp_path / "columns")], old).samples == 2 * COUNT


def test_a_cache_that_index_made_is_joined_by_the_keys_of_its_tars(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_sized(tmp_path / "source/00000.tar", [(16, 16)] * 3)
    encode.main(encode_config(f"{tmp_path}/source/*.tar", tmp_path / "own", resolution=(16,), text_storage="none"))
    (tmp_path / "cache").mkdir()
    shutil.copy(tmp_path / "own/000000.tar", tmp_path / "cache/photos.tar")
    index.main(IndexConfig(dataset=str(tmp_path / "cache"), source=f"{tmp_path}/cache/*.tar", text_member=""))
    write_lines(tmp_path / "lines/photos.jsonl", [0, 1, 2])
    run(tmp_path, "lines/*.jsonl", caption_key="", scores=("score",))
    cache = open_storage(str(tmp_path / "cache"))
    manifest = joined(cache, [str(tmp_path / "columns")])
    assert manifest.columns[0].numbered
    block = Reader(dataset_of(cache, manifest), members=("moments", "column.score")).read(0)
    assert [float(block.record(i).members["column.score"]) for i in range(3)] == [0, 0.25, 0.5]


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("changes", "source", "line"),
    [
        ({"features": ("dino",)}, "lines/*.jsonl", "holds JSON lines, and KEY.dino.npy is asked for"),
        ({"caption_key": "txt"}, "lines/*.jsonl", "holds JSON lines, and KEY.txt is asked for"),
        ({}, "other/*.jsonl", "is named like no input shard of the cache"),
        ({}, "lines/00000.jsonl", "has nothing for 1 of the 2 units"),
        ({}, "{lines,again}/*.jsonl", "are both for 00000.tar"),
        ({"features": ("none",), "caption_key": ""}, "values/*.tar", r"no sample has features=\[none\]"),
        ({"encoders": EncodersConfig(seed=2)}, "lines/*.jsonl", "one seed is for both networks"),
        ({"caption_key": "json:none"}, "lines/*.jsonl", "none of the cache's 12 records has a value"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_in_one_line(
    folder: Path, changes: dict[str, Any], source: str, line: str
) -> None:
    lines(folder)
    lines(folder, "again")
    write_lines(folder / "other/photos.jsonl", [0])
    values(folder)
    with pytest.raises(LatentmillError, match=line) as caught:
        run(folder, source, **changes)
    assert "\n" not in str(caught.value)
    assert not (folder / "columns/columns.json").exists()


def test_a_line_that_never_ends_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(folder)
    monkeypatch.setattr(reading, "MOST_BYTES", 1000)
    monkeypatch.setattr(reading, "CHUNK", 512)
    (folder / "lines/00000.jsonl").write_text('{"key": "' + "x" * 5000)
    with pytest.raises(ShardCorrupt, match="a line has more than 1000 bytes"):
        run(folder, "lines/*.jsonl")


def test_values_that_wait_for_their_turn_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "MOST_WAITING", 1500)
    run(folder, lines(folder), "in_order")
    with pytest.raises(SourceError, match="its samples stand in another order than the cache's"):
        run(folder, lines(folder, "reversed", reverse=True), "reversed_columns")


def test_a_destination_that_holds_something_else_is_left_alone(folder: Path) -> None:
    source = lines(folder)
    with pytest.raises(DestinationExists, match="would be written over"):
        run(folder, source, "cache")
    run(folder, source)
    made = files(folder / "columns")
    with pytest.raises(DestinationExists, match=r"was begun with other settings \(caption_key"):
        run(folder, source, caption_key="json:other")
    with pytest.raises(DestinationExists, match="would be written over"):
        encode.main(encode_config(f"{folder}/cache/*.tar", folder / "columns"))
    assert files(folder / "columns") == made


def test_columns_of_another_cache_at_the_destination_are_left_alone(folder: Path, tmp_path: Path) -> None:
    run(folder, lines(folder))
    made = files(folder / "columns")
    shutil.rmtree(folder / "cache")
    make_cache(folder, crop="random", seed=7)
    with pytest.raises(DestinationExists, match=r"was made of other tars than the cache holds of 00000\.tar"):
        run(folder, "lines/*.jsonl")
    assert files(folder / "columns") == made


def test_a_unit_is_published_after_its_tars(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a report finds what it names."""
    seen = list[str]()
    put, put_file = LocalStorage.put, LocalStorage.put_file

    def noted(self: LocalStorage, key: str, data: bytes) -> None:
        seen.append(key)
        put(self, key, data)

    def noted_file(self: LocalStorage, key: str, path: Path) -> None:
        seen.append(key)
        put_file(self, key, path)

    monkeypatch.setattr(LocalStorage, "put", noted)
    monkeypatch.setattr(LocalStorage, "put_file", noted_file)
    run(folder, lines(folder))
    written = [key for key in seen if not key.startswith("claims/")]
    assert written.index("000000.tar") < written.index("000000.index.json") < written.index("units/000000.json")


def test_tars_of_several_crop_sizes_and_flipped_records_have_the_values_of_their_samples(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_sized(tmp_path / "source/00000.tar", [(64, 16), (16, 64)] * 3)
    fields = {"stored": "pixels", "resolution": (32,), "buckets": 16, "bucket_aspect": 4.0, "flip": True}
    encode.main(encode_config(f"{tmp_path}/source/*.tar", tmp_path / "cache", **fields))
    write_lines(tmp_path / "lines/00000.jsonl", [3, 1, 5, 0, 4])  # without number 2, whose records are both left out
    run(tmp_path, "lines/*.jsonl", max_rejects=0.2)
    columns = load_columns(open_storage(str(tmp_path / "columns")))
    assert len(columns.shards) == 2 and columns.rejected == {"key_missing": 2}
    cache = open_storage(str(tmp_path / "cache"))
    manifest = joined(cache, [str(tmp_path / "columns")])
    found = [(one.meta["key"], one.meta["caption"]) for one in first_records(cache, manifest, 99)]
    assert sorted(found) == sorted((f"{n:05d}", caption_of(n)) for n in (0, 1, 3, 4, 5) for _ in range(2))
