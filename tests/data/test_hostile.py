"""Manifests, contracts, indexes, records, lists and uncond.npy that are damaged or hostile end in one line, before
memory is taken for what they claim."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.cache import LENGTH, WIDTH, contract
from made.forged_cache import (
    ZEROS,
    forge_excluded,
    forge_index,
    forge_manifest,
    forge_records,
    forge_uncond,
    joined,
    members,
    small,
    train_on,
    with_file,
    with_header,
)
from pipeline.data.format.contract_json import require_readable
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.manifest import find_version, load_manifest
from pipeline.data.format.records import npy_bytes
from pipeline.data.format.uncond import read_uncond
from pipeline.data.reading import reader
from pipeline.data.reading.shards import first_records
from pipeline.errors import ConfigError, DatasetError, LatentmillError, ShardCorrupt
from pipeline.storage.urls import open_storage

Change = Callable[[Any], object]
DEEP = b"[" * 200_000 + b"]" * 200_000
MEGABYTES = 60
"""Memory that a damaged small cache may take to be refused."""


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 2), ("PLAN_SAMPLES", 2), ("HORIZON_BATCHES", 2)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def refused(read: Callable[[], object], *words: str) -> str:
    """The one line with which reading ends, which holds `words`; little memory was taken."""
    tracemalloc.start()
    try:
        with pytest.raises(LatentmillError) as caught:
            read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 2000
    assert all(word in line for word in words), line
    assert peak < MEGABYTES * 1e6, f"{peak / 1e6:.0f} MB"
    return line


def put(path: str, value: Any) -> Change:
    """A change of the manifest: put("shards.0.samples", 5)."""

    def change(manifest: Any) -> None:
        *parents, last = path.split(".")
        place = manifest
        for name in parents:
            place = place[int(name) if name.isdigit() else name]
        place[int(last) if isinstance(place, list) else last] = value

    return change


def taken(path: str) -> Change:
    def change(manifest: Any) -> None:
        *parents, last = path.split(".")
        place = manifest
        for name in parents:
            place = place[int(name) if name.isdigit() else name]
        del place[int(last) if isinstance(place, list) else last]

    return change


# --------------------------------------------------------------------------------------------------------------------
# The manifest

WRONG_VALUES: dict[str, list[Any]] = {
    "shards.0.samples": [-5, "5", 5.0, True, None, 10**12, 2**63, [5]],
    "shards.0.bytes": [-1, 10**15, "1", 2**62, 100],
    "shards.0.unit": [-1, 99, "0", 2**70],
    "shards.0.size": [[16], [16, 16, 16], "16", [16.0, 16], [0, 16], [32, 32], [True, 16]],
    "shards.0.name": [7, None, "", ".tar", "/etc/x.tar", "../x.tar", "a/../x.tar", "./x.tar", "a//x.tar", "a\0.tar"],
    "shards.1.name": ["a\n.tar", "\x1b[31m.tar", "a.zip", "x" * 5000 + ".tar", "000000.tar", "\x9b.tar"],
    "shards.0.sha256": ["", "A" * 64, "g" * 64, "a" * 63, "a" * 65, 1, None, " " * 64],
    "shards.0.index_sha256": ["", "0x" + "a" * 62, [], "a" * 62 + "\n\n"],
    "shards.0": [[], "shard", None, 1, {}],
    "shards": [{}, "shards", None, 1, [[]]],
    "units.0.source": ["", 5, None, "\0"],
    "units.0.source_sha256": ["", "z" * 64],
    "units.0.source_bytes": [-1, 1.5, "1"],
    "units.0.read": [-1, "3", 2**40],
    "units.0.accepted": [-1, None],
    "units.0.rejected": [[], {"x": -1}, {"x": "1"}, {"x": None}, 3],
    "units": [None, [], [1], {"0": {}}],
    "statistics": [None, [], {}, "mean", {"mean": [0.0] * 4}],
    "statistics.mean": ["text", None, [], [0.0] * 3, [0.0] * 5, ["0"] * 4, [[0.0]] * 4, [1e300] * 4],
    "statistics.std": [[-1.0] * 4, [None] * 4, 1.0],
    "sources": ["text", [1], None, [""], [["a"]]],
    "uncond_sha256": [None, "", "x" * 64],
    "excluded": [-1, "1", 2**40, 9, 1.0],
    "excluded_sha256": ["x", "a" * 64, None],
    "version": [0, -1, 10**6, "1", 1.0, True],
    "format": [99, -1, "2", None, 2.0, [2], 10**30, {}],
    "contract": [None, [], {}, "contract"],
    "contract.latent_shape": [
        [],
        "text",
        [4],
        [4, 2],
        [4, 10**6, 10**6],
        [4, -2, 2],
        [0, 2, 2],
        [4, 2, 2, 2],
        [5, 2, 2],
        [4, 40000, 40000],
        [4, 4, 4],
        [4, 0, 0],
        [4.0, 2, 2],
    ],
    "contract.buckets": [[], None, [[16]], [[0, 16]], [[16, 16], [16, 16]], [16, 16], [[10**9, 16]], [[8, 8]], {}],
    "contract.scale": ["text", None, 0, -1.0, 1e300, 1e-300, [1], True],
    "contract.shift": ["text", 1e300, None],
    "contract.resolution": [0, -16, "16", 10**9, 10**4],
    "contract.downsampling": [0, -8, 8.5, 10**9, 16],
    "contract.members": [[], None, [{}], ["moments"], [None], {"moments": {}}],
    "contract.members.0.shape": [[8, 2], [8, 10**6, 10**6], "8", [8, 2, -2], [4, 2, 2], [-1, 2, 2], [8.0, 2, 2], [[8]]],
    "contract.members.0.dtype": ["object", "float64", "|O", 5, "uint8", ""],
    "contract.members.0.name": ["", "text", "../x", 5, "a" * 200, "moments\x1b"],
    "contract.text": [None, {}, []],
    "contract.text.length": [0, -1, 10**9, "3", 4],
    "contract.text.width": [0, 10**9, 9],
    "contract.text.storage": ["", "other", None, "tokens"],
    "contract.text.quick_gelu": [1, "yes"],
    "contract.pixel_range": [[1.0, -1.0], [0.0], "01", [0.0, 1e300]],
    "contract.vae_sha256": ["x", 5, None],
    "contract.encoders": [[], None, "sd1"],
    "contract.versions": [{"torch": 2}, []],
    "contract.flip": [0, "no"],
    "contract.seed": [-1, 2**64, "0"],
    "contract.stored": ["latents", None],
    "contract.batch": [-1, "4"],
}


@pytest.fixture(scope="module")
def manifest_bytes_of_before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = small(tmp_path_factory.mktemp("whole"))
    return folder, (folder / "manifest.json").read_bytes()


@pytest.fixture
def whole(manifest_bytes_of_before: tuple[Path, bytes]) -> Path:
    """A cache of which only the manifest may be changed; it is whole again in each test."""
    folder, data = manifest_bytes_of_before
    (folder / "manifest.json").write_bytes(data)
    return folder


@pytest.mark.parametrize("place", WRONG_VALUES)
def test_a_manifest_with_a_wrong_value_is_refused_by_name(whole: Path, place: str) -> None:
    storage = open_storage(str(whole))
    data = (whole / "manifest.json").read_bytes()
    for value in WRONG_VALUES[place]:
        forge_manifest(whole, put(place, value))
        with pytest.raises(DatasetError, match=r"manifest\.json cannot be read: ") as caught:
            load_manifest(storage)
        assert len(str(caught.value)) < 1000, value
        (whole / "manifest.json").write_bytes(data)
    load_manifest(storage)


@pytest.mark.parametrize(
    "place",
    [
        *("shards", "units", "contract", "statistics", "version", "sources", "excluded", "uncond_sha256", "format"),
        *("shards.0.sha256", "units.1.read", "contract.scale", "contract.text.pad", "contract.members.1.dtype"),
        *("contract.stored", "contract.text.storage", "statistics.std"),
    ],
)
def test_a_manifest_that_lacks_a_field_or_has_one_more_is_refused(whole: Path, place: str) -> None:
    for change in (taken(place), put(f"{place}x" if "." in place else f"{place}_2", 1)):
        forge_manifest(whole, change)
        refused(lambda: load_manifest(open_storage(str(whole))), "manifest.json cannot be read")
        forge_manifest(whole, lambda _: (whole / "manifests/000001.json").read_bytes())


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0" * 100, b"null", b"[]", b"1", b'"x"', b"{}", b'{"format": 2}', b"\xff\xfe", b"{" * 5000, DEEP),
        *(b"[" * 900 + b"]" * 900, b'{"format":' + DEEP + b"}", b"1" * 10**6, b'{"format": NaN}', b'{"a":1,"a":2}'),
    ],
    ids=lambda data: repr(data[:12]) + str(len(data)),
)
def test_bytes_that_are_no_manifest_are_refused_at_once(whole: Path, data: bytes) -> None:
    forge_manifest(whole, lambda _: data)
    refused(lambda: load_manifest(open_storage(str(whole))), "manifest.json cannot be read")


def test_numbers_that_json_does_not_have_are_refused_wherever_they_stand(whole: Path) -> None:
    text = (whole / "manifest.json").read_text()
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 4000):
        forge_manifest(whole, lambda _, n=number: text.replace('"scale":0.5', f'"scale":{n}').encode())  # type: ignore[misc]
        refused(lambda: load_manifest(open_storage(str(whole))), "manifest.json cannot be read")
    forge_manifest(whole, lambda _: text.replace('"sources":["', '"sources":["\\ud800').encode())
    refused(lambda: load_manifest(open_storage(str(whole))), "surrogate")


def test_what_is_no_file_in_place_of_a_manifest_is_refused_without_reading(tmp_path: Path) -> None:
    small(tmp_path)
    path = tmp_path / "manifest.json"
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        refused(lambda: load_manifest(open_storage(str(tmp_path))), "manifest.json")


@pytest.mark.parametrize("name", ["000000.index.json", "000000.tar", "uncond.npy"])
def test_what_is_no_file_in_place_of_another_is_refused_without_reading(tmp_path: Path, name: str) -> None:
    small(tmp_path)
    path = tmp_path / name
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        read = (lambda: read_uncond(*_opened(tmp_path))) if name == "uncond.npy" else lambda: train_on(tmp_path)
        refused(read, name)


@pytest.mark.parametrize("data", [b"[[]" + b",[]" * 100_000 + b"]", b"[0" + b",0" * 200_000 + b"]"])
def test_a_long_file_of_tiny_values_is_refused_before_it_is_parsed(whole: Path, data: bytes) -> None:
    forge_manifest(whole, lambda _: b'{"format": 2, "shards": ' + data + b"}")
    assert "too small" in refused(lambda: load_manifest(open_storage(str(whole))), "manifest.json cannot be read")


def test_a_damaged_manifest_is_mended_by_the_copy_that_its_message_names(whole: Path) -> None:
    manifest = load_manifest(open_storage(str(whole)))
    forge_manifest(whole, lambda _: b'{"format": 2, "cut')
    refused(lambda: load_manifest(open_storage(str(whole))), "restore it from manifests/")
    (whole / "manifest.json").write_bytes((whole / "manifests/000001.json").read_bytes())
    assert load_manifest(open_storage(str(whole))) == manifest
    train_on(whole)


def test_a_huge_manifest_is_refused_by_its_size(tmp_path: Path) -> None:
    small(tmp_path)
    os.truncate(tmp_path / "manifest.json", 2**40)
    refused(lambda: load_manifest(open_storage(str(tmp_path))), "manifest.json has 1099511627776 bytes")


def test_other_files_under_manifests_are_left_alone(tmp_path: Path) -> None:
    manifest = load_manifest(open_storage(str(small(tmp_path))))
    for name in ("backup.json", "000002 (copy).json", "9.json", "000009.json~"):
        (tmp_path / "manifests" / name).write_bytes(b"{")
    os.truncate(tmp_path / "manifests/backup.json", 2**40)
    (tmp_path / "manifests/000003.json").write_bytes(DEEP)
    storage = open_storage(str(tmp_path))
    assert find_version(storage, manifest.digest) == manifest
    assert find_version(storage, "0" * 64) is None


def test_a_promise_that_takes_memory_is_compared_with_the_store_first(whole: Path) -> None:
    def huge(value: Any) -> None:
        for shard in value["shards"]:
            shard.update(samples=2**31 - 1, bytes=2**43)

    forge_manifest(whole, huge)
    refused(lambda: train_on(whole), "000000.tar has ", "its manifest says 8796093022208")


def test_settings_that_could_not_be_read_again_are_refused_before_they_are_stored() -> None:
    require_readable(contract())
    for change in ({"scale": 1e-9}, {"latent_shape": (4, 0, 0)}, {"buckets": ()}, {"members": contract().members[:1]}):
        with pytest.raises(ConfigError, match="read again"):
            require_readable(contract(**change))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# Indexes


def row(number: int, place: int, value: Any) -> Change:
    return lambda index: index["records"][number].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (row(0, 1, 2**45), "cannot be right"),
        (row(0, 0, 2**70), "64 bits"),
        (row(0, 0, 2**60), "cannot be right"),
        (row(0, 0, -512), "cannot be right"),
        (row(0, 1, 0), "cannot be right"),
        (row(0, 0, "0"), "cannot be right"),
        (row(0, 0, 0.0), "cannot be right"),
        (row(0, 0, True), "cannot be right"),
        (row(0, 2, "a" * 63), "cannot be right"),
        (row(0, 2, "g" * 64), "cannot be right"),
        (row(0, 2, " " * 64), "cannot be right"),
        (row(0, 2, None), "cannot be right"),
        (lambda i: i["records"].__setitem__(1, i["records"][0]), "overlap"),
        (lambda i: i["records"].reverse(), "overlap"),
        (lambda i: i["records"].pop(), "4 records"),
        (lambda i: i["records"].append(i["records"][4]), "6 records"),
        (lambda i: i["records"].__setitem__(0, "x"), "not lists"),
        (lambda i: i["records"].__setitem__(0, None), "not lists"),
        (lambda i: i["records"].__setitem__(0, [0, 1024]), "not lists"),
        (lambda i: i["records"].__setitem__(0, {"0": 0, "1": 1, "2": 2}), "not lists"),
        (lambda i: i.update(records={}), "no index"),
        (lambda i: i.update(records=None), "no index"),
        (lambda i: i.update(samples=4), "samples"),
        (lambda i: i.update(bytes=0), "bytes"),
        (lambda i: i.update(sha256="a" * 64), "sha256"),
        (lambda i: i.update(format=3), "format"),
        (lambda i: i.update(layout=[]), "layout"),
        (lambda i: i.update(layout={"text": "a.npy", "caption": "txt"}), "layout"),
        (lambda i: i.update(layout={"moments": 5, "text": "npy", "caption": "txt"}), "layout"),
        (lambda i: i.update(layout={"moments": "a.npy", "text": "npy", "caption": "exec:x"}), "layout"),
        (lambda _: DEEP[:100] + b"", "JSON"),
        (lambda _: b"[" * 1000 + b"]" * 1000, "deeper"),
        (lambda _: b"null", "no index"),
        (lambda _: b'{"records": NaN}', "NaN"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused_by_name_before_memory_is_taken(
    tmp_path: Path, change: Change, said: str
) -> None:
    forge_index(small(tmp_path), change)
    refused(lambda: train_on(tmp_path), "000000.index.json", said)
    refused(lambda: list(first_records(*_opened(tmp_path), 8)), "000000.index.json", said)


def _opened(folder: Path) -> tuple[Any, Any]:
    storage = open_storage(str(folder))
    return storage, load_manifest(storage)


def test_an_index_with_a_field_more_is_read(tmp_path: Path) -> None:
    forge_index(small(tmp_path), lambda index: index.update(later="x"))
    train_on(tmp_path)


def test_an_index_larger_than_its_records_can_make_it_is_refused_by_its_size(tmp_path: Path) -> None:
    forge_index(small(tmp_path), lambda _: DEEP)
    refused(lambda: train_on(tmp_path), "000000.index.json has 400000 bytes, too many for 5 records")


def test_records_that_lie_far_apart_are_not_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path)
    monkeypatch.setattr(reader, "LARGEST_SPAN", 4096)
    refused(lambda: train_on(tmp_path), ".tar: records 0 to ", "4096 at most are read at once")


# --------------------------------------------------------------------------------------------------------------------
# Records


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def meta(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


MOMENTS = {
    "minus signs": npy("-" * 60000 + "1"),
    "sums": npy("1+" * 20000 + "1"),
    "hexadecimal": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (0x" + "f" * 20000 + ",), }"),
    "many digits": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",), }"),
    "huge": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"),
    "empty but wide": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (0, 1000000000000), }"),
    "negative": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (-8, 2, 2), }"),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (8, 2, 2), }", bytes(64)),
    "record dtype": npy("{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (8, 2, 2), }", bytes(64)),
    "float64": npy_bytes(np.zeros((8, 2, 2), np.float32)).replace(b"<f4", b"<f8"),
    "another dtype": npy_bytes(np.zeros((8, 2, 2), np.float32)),
    "another shape": npy_bytes(np.zeros((8, 2, 3), np.float16)),
    "more dimensions": npy_bytes(np.zeros((1, 8, 2, 2), np.float16)),
    "none": b"",
    "magic alone": b"\x93NUMPY\x01\x00",
    "header beyond": b"\x93NUMPY\x01\x00\xff\xff{}",
    "pickle": b"\x80\x04cos\nsystem\n.",
    "call": npy("{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': ()}"),
}


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("which", ["one", "all"])
def test_an_array_that_is_not_the_contracts_is_refused_by_the_name_of_its_tar(
    tmp_path: Path, name: str, which: str
) -> None:
    bad = [which == "all" or number == 2 for number in range(5)]
    records = [with_file("moments.npy", MOMENTS[name], n) if b else joined(members(n)) for n, b in enumerate(bad)]
    forge_records(small(tmp_path), records)
    refused(lambda: train_on(tmp_path), "000000.tar")
    refused(lambda: list(first_records(*_opened(tmp_path), 8, ("moments",))), "000000.tar")


@pytest.mark.parametrize(
    "value",
    [
        *([], "x", None, 5, {}, {"key": "a"}, {"caption": 5}, {"caption": None}, {"caption": ["a"]}),
        *(b"{", b"\xff", DEEP, b'{"caption": NaN}', b'{"caption": "\\ud800"}', b'{"caption":"a","caption":"b"}'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_record_whose_json_has_no_caption_is_refused(tmp_path: Path, value: Any) -> None:
    forge_records(small(tmp_path), [with_file(".json", meta(value), n) for n in range(5)])
    refused(lambda: list(first_records(*_opened(tmp_path), 8)), "000000.tar", "json")
    refused(lambda: train_on(tmp_path), "json")


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (b"-0000001000\0", 124),
        (b"-1".rjust(11) + b"\0", 124),
        (b"\xff" * 12, 124),
        (b"\x80" + b"\xff" * 11, 124),
        (b"77777777777\0", 124),
        (b"0x000000010\0", 124),
        (b"1_000000000\0", 124),
        (b"5", 156),
        (b"2", 156),
        (b"\0" * 100, 0),
    ],
)
@pytest.mark.parametrize("count", [1, 5])
def test_a_tar_header_that_lies_ends_in_a_line_and_never_loops(
    tmp_path: Path, value: bytes, at: int, count: int
) -> None:
    forge_records(small(tmp_path), [with_header(value, at)] * count + [joined(members(n)) for n in range(5 - count)])
    refused(lambda: list(first_records(*_opened(tmp_path), 8)), "000000.tar")


def test_a_record_that_is_only_headers_of_nothing_ends_in_a_line(tmp_path: Path) -> None:
    empty = joined([(f"000000_{row:06d}.json", b"") for row in range(2)])
    forge_records(small(tmp_path), [empty] * 5)
    refused(lambda: train_on(tmp_path), "000000.tar")


# --------------------------------------------------------------------------------------------------------------------
# uncond.npy and the list of excluded records


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(np.array([{}], dtype=object)),
        npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (3, 8), }"),
        b"garbage",
        b"",
        npy_bytes(np.zeros((LENGTH, WIDTH + 1), np.float16)),
        npy_bytes(np.zeros((LENGTH * WIDTH,), np.float16)),
        npy_bytes(np.zeros((LENGTH, WIDTH), np.int32)),
        npy_bytes(np.full((LENGTH, WIDTH), np.nan, np.float16)),
        npy_bytes(np.full((LENGTH, WIDTH), np.inf, np.float32)),
        ZEROS[:-1],
        ZEROS + b"x",
    ],
    ids=lambda data: repr(data[60:80]),
)
def test_an_empty_caption_that_is_not_finite_states_is_refused(tmp_path: Path, data: bytes) -> None:
    forge_uncond(small(tmp_path), data)
    with pytest.raises(ShardCorrupt, match=r"uncond\.npy "):
        read_uncond(*_opened(tmp_path))


def test_an_empty_caption_that_is_missing_or_huge_is_refused(tmp_path: Path) -> None:
    small(tmp_path)
    os.truncate(tmp_path / "uncond.npy", 2**40)
    refused(lambda: read_uncond(*_opened(tmp_path)), "uncond.npy has 1099511627776 bytes")
    (tmp_path / "uncond.npy").unlink()
    refused(lambda: read_uncond(*_opened(tmp_path)), "uncond.npy is missing or not what")


def pairs(*rows: tuple[int, int]) -> bytes:
    return npy_bytes(np.array(rows, dtype=np.int32))


@pytest.mark.parametrize(
    "data",
    [
        pairs((-5, 0), (0, 0)),
        pairs((0, 0), (2**31 - 1, 0)),
        pairs((0, 0), (0, 5)),
        pairs((0, -1), (0, 0)),
        pairs((0, 1), (0, 0)),
        pairs((0, 1), (0, 1)),
        pairs((0, 1)),
        pairs((0, 0), (0, 1), (0, 2)),
        npy_bytes(np.array([0, 1], dtype=np.int32)),
        npy_bytes(np.array([[0, 1, 0, 2]], dtype=np.int32)),
        npy_bytes(np.zeros((2, 2), dtype=np.float16)),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (2, 1000000000000), }"),
        b"",
        b"garbage",
    ],
    ids=lambda data: repr(data[-24:]),
)
def test_a_list_of_excluded_records_that_cannot_be_right_is_refused(tmp_path: Path, data: bytes) -> None:
    forge_excluded(small(tmp_path), data)
    refused(lambda: load_excluded(*_opened(tmp_path)), "000001.excluded.npy")
    refused(lambda: train_on(tmp_path), "000001.excluded.npy")


def test_a_list_of_excluded_records_that_is_right_is_read(tmp_path: Path) -> None:
    forge_excluded(small(tmp_path), pairs((0, 1), (1, 2)))
    assert load_excluded(*_opened(tmp_path)).tolist() == [[0, 1], [1, 2]]
    assert len(list(first_records(*_opened(tmp_path), 8))) == 6


def test_the_seed_of_encoders_is_a_number_or_a_line() -> None:
    assert contract().encoder_seed == -1
    assert contract(encoders={"seed": 7}).encoder_seed == 7
    for seed in ("7", None, -2, 2**64, True, [7]):
        with pytest.raises(DatasetError, match="seed"):
            _ = dataclasses.replace(contract(), encoders={"seed": seed}).encoder_seed
