"""columns.py: the arrays of a block are located where reading its records one by one locates them, or refused."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.format.records import Record, npy_bytes, pack, record_key, tar_member, unpack
from pipeline.data.reading import columns as module
from pipeline.data.reading.columns import find_columns
from pipeline.errors import ShardCorrupt

MEMBERS = ("moments", "text")


def block(records: list[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes, offsets and sizes of consecutive records."""
    parts = [b"".join(tar_member(name, payload) for name, payload in pack(one)) for one in records]
    sizes = np.array([len(part) for part in parts])
    return np.frombuffer(b"".join(parts), dtype=np.uint8), np.cumsum(sizes) - sizes, sizes


def record(row: int, caption: str, tokens: int = 3) -> Record:
    rng = np.random.default_rng(row)
    arrays: dict[str, np.ndarray] = {
        "moments": rng.standard_normal((8, 4, 4)).astype(np.float16),
        "text": rng.standard_normal((tokens, 5)).astype(np.float16),
        "cond.labels": rng.integers(0, 9, (6, 6)).astype(np.uint8),
    }
    return Record(record_key(1, row), arrays, {"caption": caption})


def check(data: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, layout: dict[str, str] | None = None) -> None:
    """Assert that the columns have what `unpack` reads."""
    found = find_columns(data, offsets, sizes, MEMBERS, layout)
    assert set(found) == set(MEMBERS)
    for place, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        expected = unpack(data.data[offset : offset + size], MEMBERS, layout=layout).members
        for name, column in found.items():
            start, shape = column.starts[place], column.shape(place)
            bytes_of = int(np.prod(shape)) * column.dtype.itemsize
            assert data[start : start + bytes_of].tobytes() == expected[name].tobytes()
            assert (shape, column.dtype) == (expected[name].shape, expected[name].dtype)


@settings(deadline=None, max_examples=60)
@given(captions=st.lists(st.text(max_size=1500), min_size=1, max_size=8), lengths=st.booleans())
def test_columns_are_what_unpack_reads_whatever_captions_and_lengths_are(captions: list[str], lengths: bool) -> None:
    records = [record(row, text, 1 + row % 3 if lengths else 3) for row, text in enumerate(captions)]
    check(*block(records))


def test_records_that_look_alike_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_one_by_one", None)
    check(*block([record(row, "a" * 300 * row) for row in range(5)]))


@pytest.mark.parametrize("keys", [["a", "bb", "ccc"], ["a/x", "b/y", "c/z"], ["d.e/x", "d.f/y", "d.g/z"]])
def test_keys_of_others_are_read_too(keys: list[str]) -> None:
    layout = {"moments": "latent.npy", "text": "clip.npy", "caption": "txt"}
    parts = []
    for row, key in enumerate(keys):
        one = record(row, "")
        members = [("clip.npy", npy_bytes(one.members["text"])), ("latent.npy", npy_bytes(one.members["moments"]))]
        parts.append(b"".join(tar_member(f"{key}.{name}", data) for name, data in [*members, ("txt", b"words")]))
    sizes = np.array([len(part) for part in parts])
    check(np.frombuffer(b"".join(parts), dtype=np.uint8), np.cumsum(sizes) - sizes, sizes, layout)


def test_long_names_of_other_writers_are_read_too() -> None:
    parts = []
    for row in range(3):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, payload in pack(record(row, "words")):
                info = tarfile.TarInfo("f" * 120 + "/" + name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
            end = tar.offset
        parts.append(out.getvalue()[:end])
    sizes = np.array([len(part) for part in parts])
    check(np.frombuffer(b"".join(parts), dtype=np.uint8), np.cumsum(sizes) - sizes, sizes)


def test_a_member_that_is_missing_is_named() -> None:
    with pytest.raises(ShardCorrupt, match=r"has no cond\.boxes"):
        find_columns(*block([record(0, "a"), record(1, "b")]), ("moments", "cond.boxes"))


@settings(deadline=None, max_examples=150)
@given(place=st.integers(0, 3 * 512 - 1), bit=st.integers(0, 7), row=st.integers(0, 3))
def test_a_damaged_header_is_refused_or_read_as_unpack_reads_it(place: int, bit: int, row: int) -> None:
    """Hashes find damage; damage that they miss must not cause reads outside of a record."""
    data, offsets, sizes = block([record(row, "words") for row in range(4)])
    changed = data.copy()
    changed[offsets[row] + place] ^= 1 << bit
    try:
        found = find_columns(changed, offsets, sizes, MEMBERS)
    except ShardCorrupt:
        return
    for column in found.values():
        for at, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
            end = column.starts[at] + int(np.prod(column.shape(at))) * column.dtype.itemsize
            assert offset <= column.starts[at] <= end <= offset + size
