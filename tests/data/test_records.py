"""data/format/records.py and preprocess/encoding/writer.py: a record, its bytes, and reading it with other software."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made.cache import record
from pipeline.data.format.records import (
    END_OF_TAR,
    Record,
    find_records,
    npy_bytes,
    pack,
    parse_header,
    parse_npy,
    tar_member,
    unpack,
)
from pipeline.errors import ShardCorrupt
from preprocess.encoding.writer import Moments, ShardWriter


def tar_of(*records: Record) -> bytes:
    tar = io.BytesIO()
    writer = ShardWriter(tar)
    for one in records:
        writer.add(one)
    writer.finish()
    return tar.getvalue()


def same(a: Record, b: Record) -> bool:
    return (
        a.key == b.key
        and a.meta == b.meta
        and a.members.keys() == b.members.keys()
        and all((a.members[k] == b.members[k]).all() and a.members[k].dtype == b.members[k].dtype for k in a.members)
    )


def test_a_record_comes_back_as_it_was() -> None:
    one = record(3, 7)
    data = b"".join(tar_member(name, payload) for name, payload in pack(one))
    assert same(unpack(data), one)
    assert list(unpack(data, ("text",)).members) == ["text"]


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([np.float16, np.float32, np.uint8, np.int32]),
    st.lists(st.integers(0, 5), min_size=0, max_size=4),
    st.text(max_size=40),
)
def test_any_array_and_caption_survive(dtype: type, shape: list[int], caption: str) -> None:
    array: np.ndarray = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    assert (np.load(io.BytesIO(npy_bytes(array))) == array).all()
    one = Record("000000_000000", {"cond.x": array}, {"caption": caption})
    back = unpack(tar_of(one)[: -len(END_OF_TAR)])
    assert same(back, one)
    assert back.members["cond.x"].shape == tuple(shape)


def test_numpys_own_files_are_read_and_odd_ones_refused() -> None:
    def saved(array: np.ndarray) -> memoryview:
        out = io.BytesIO()
        np.save(out, array)
        return memoryview(out.getvalue())

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (parse_npy(saved(array)) == array).all()
    for odd in (np.asfortranarray(array), array.astype(">f4"), array.astype(np.float64), np.array([{}], dtype=object)):
        with pytest.raises(ShardCorrupt):
            parse_npy(saved(odd))
    with pytest.raises(ShardCorrupt, match="bytes of data"):
        parse_npy(saved(array)[:-1])


def test_arrays_are_read_only_views_of_the_shard() -> None:
    data = tar_of(record(0, 0))[: -len(END_OF_TAR)]
    moments = unpack(data).members["moments"]
    assert not moments.flags.writeable
    assert moments.base is not None


def test_equal_records_give_equal_bytes_that_name_no_time_or_owner() -> None:
    tar = tar_of(record(0, 0), record(0, 1))
    assert tar == tar_of(record(0, 0), record(0, 1))
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        members = opened.getmembers()
    assert [m.name for m in members[:4]] == [
        "000000_000000.json",
        "000000_000000.cond.labels.npy",
        "000000_000000.moments.npy",
        "000000_000000.text.npy",
    ]
    assert all((m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644) for m in members)
    # The layout is part of the format: a change must come with a new format number.
    assert hashlib.sha256(tar_of(Record("000000_000000", {"x": np.arange(3, dtype=np.uint8)}, {}))).hexdigest() == (
        "fcbbcca8b6c74c025721bf9b7d789cdc32761afd58f75272f579278b7027da47"
    )


def test_the_index_finds_and_proves_every_record() -> None:
    records = [record(0, row) for row in range(5)]
    tar = io.BytesIO()
    writer = ShardWriter(tar)
    for one in records:
        writer.add(one)
    facts = writer.finish()
    assert facts["bytes"] == len(tar.getvalue())
    assert facts["sha256"] == hashlib.sha256(tar.getvalue()).hexdigest()
    assert facts["samples"] == 5
    for one, (offset, size, sha256), found in zip(records, facts["records"], find_records(tar.getvalue()), strict=True):
        assert found == (one.key, offset, size)
        assert hashlib.sha256(tar.getvalue()[offset : offset + size]).hexdigest() == sha256
        assert same(unpack(tar.getvalue()[offset : offset + size]), one)


def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    import webdataset

    records = [record(2, row) for row in range(4)]
    (tmp_path / "000002.tar").write_bytes(tar_of(*records))
    found = list(webdataset.WebDataset(str(tmp_path / "000002.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == [one.key for one in records]
    for sample, one in zip(found, records, strict=True):
        assert sample["json"] == one.meta
        for name, array in one.members.items():
            assert (sample[f"{name}.npy"] == array).all()
            assert sample[f"{name}.npy"].dtype == array.dtype


def test_a_cached_tar_cut_anywhere_is_refused() -> None:
    tar = tar_of(record(0, 0), record(0, 1))
    for length in (*range(0, len(tar), 512), len(tar) - 1, 700):
        with pytest.raises(ShardCorrupt):
            list(find_records(tar[:length]))


def test_a_record_with_damaged_bytes_is_refused() -> None:
    data = tar_of(record(0, 0))[: -len(END_OF_TAR)]
    two = tar_of(record(0, 0), record(0, 1))[: -len(END_OF_TAR)]
    flipped = bytearray(data)
    flipped[2] ^= 1
    for bad in (data[:-512], bytes(flipped), two, data[512 * 2 :]):
        with pytest.raises(ShardCorrupt):
            unpack(bad)
    with pytest.raises(ShardCorrupt, match=r"no cond\.mask"):
        unpack(data, ("cond.mask",))


def test_headers_of_other_tar_writers_are_understood() -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("some/name.jpg")
        info.size = 12345
        header = parse_header(info.tobuf(form)[-512:])
        assert (header.name, header.size, header.kind) == (b"some/name.jpg", 12345, b"0")
    info = tarfile.TarInfo("p" * 90 + "/" + "n" * 60)
    assert parse_header(info.tobuf(tarfile.USTAR_FORMAT)).name == info.name.encode()
    info = tarfile.TarInfo("big")
    info.size = 1 << 40
    assert parse_header(info.tobuf(tarfile.GNU_FORMAT)).size == 1 << 40


def test_statistics_are_those_of_all_values_at_once() -> None:
    latents = np.random.default_rng(0).normal(3, 2, (10, 4, 5, 5))
    parts = [Moments(), Moments(), Moments()]
    for i, latent in enumerate(latents):
        parts[i // 4].add(latent)
    total = Moments()
    for part in parts:
        total.merge(Moments(**part.to_json()))
    np.testing.assert_allclose(total.mean, latents.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(total.std, latents.std(axis=(0, 2, 3)), rtol=1e-12)
