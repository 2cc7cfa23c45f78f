"""A trial of a source: what it reads, what it refuses, and what encode would reject."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from made.encode import ENCODERS, png, write_tar
from pipeline.config import EncodeConfig, FiltersConfig, LimitsConfig
from pipeline.errors import ShardCorrupt, SourceError
from pipeline.planning.cached.facts import contracts_of
from pipeline.planning.cached.members import Ranges, counted, files_of
from pipeline.planning.cached.trial import Trial, trial
from pipeline.storage.local import LocalStorage


def tried(path: Path, shards: int = 1, **changes: Any) -> Trial:
    made = EncodeConfig(source=str(path), dest="d", encoders=ENCODERS, **changes)
    return trial(made, contracts_of(made), shards)


def sample(key: str, size: tuple[int, int] = (64, 64), caption: str = "a picture") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(size)), (f"{key}.txt", caption.encode())]


def test_a_bucket_is_read_by_ranges_until_enough_samples_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "0.tar", [one for i in range(40) for one in sample(f"{i:04d}")])
    size = (tmp_path / "0.tar").stat().st_size
    asked: list[int] = []

    class Far(LocalStorage):
        """A folder that is read as a bucket is."""

        def local_path(self, key: str) -> None:  # type: ignore[override]
            return None

        def get_range(self, key: str, offset: int, length: int) -> bytes:
            asked.append(length)
            return (tmp_path / key).read_bytes()[offset : offset + length]

    monkeypatch.setattr("pipeline.planning.cached.members.CHUNK", 1 << 16)
    monkeypatch.setattr("pipeline.planning.cached.trial.expand", lambda source: [(Far(str(tmp_path)), "0.tar")])
    monkeypatch.setattr("pipeline.planning.cached.trial.sizes", lambda places: [size])
    made = EncodeConfig(source=str(tmp_path / "0.tar"), dest="d", encoders=ENCODERS)
    found = trial(made, contracts_of(made), 1, most=8)
    assert found.read == found.counted == 8 and found.images == pytest.approx(40, abs=1)
    assert sum(asked) < size / 2


def test_on_a_disk_samples_are_counted_by_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "0.tar", [one for i in range(40) for one in sample(f"{i:04d}")])
    storage, asked = LocalStorage(str(tmp_path)), list[int]()
    whole = LocalStorage.get_range

    def get_range(self: LocalStorage, key: str, offset: int, length: int) -> bytes:
        asked.append(length)
        return whole(self, key, offset, length)

    monkeypatch.setattr(LocalStorage, "get_range", get_range)
    size = (tmp_path / "0.tar").stat().st_size
    assert counted(storage, "0.tar", size, LimitsConfig(), 99) == (40, size)
    assert set(asked) == {512} and len(asked) == 81
    samples, end = counted(storage, "0.tar", size, LimitsConfig(), 10)
    assert samples == 10 and end == 10 * (end // 10)


def test_what_encode_rejects_is_counted_and_not_planned(tmp_path: Path) -> None:
    members = [
        *sample("0"),
        *sample("1", (20, 64)),
        ("2.txt", b"no picture"),
        ("3.png", b"no PNG"),
        ("3.txt", b"damaged"),
        ("4.png", png()),
        *sample("5", caption=" \n"),
        *sample("6"),
    ]
    write_tar(tmp_path / "0.tar", members)
    found = tried(tmp_path / "0.tar", filters=FiltersConfig(max_aspect=2.0))
    assert dict(found.rejected) == {
        "filter:max_aspect": 1,
        "image_missing": 1,
        "image_unreadable": 1,
        "caption_missing": 1,
        "caption_empty": 1,
    }
    assert (found.read, found.images, [one.key for one in found.samples]) == (7, 2, ["0", "6"])
    assert found.samples[0].tokens == (4,) and found.estimated_tokens


def test_a_source_of_which_nothing_is_usable_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.txt", b"no picture")])
    with pytest.raises(SourceError, match=r"none of the first 1 samples is usable \(1 image_missing\)"):
        tried(tmp_path / "0.tar")


def test_without_a_trial_sizes_alone_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"never opened")
    found = tried(tmp_path / "0.tar", shards=0)
    assert (found.shards, found.source_bytes, found.images, found.unit_rows) == (1, 12, 0, (0,))


def test_tables_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="give images=N"):
        tried(tmp_path / "0.parquet")


def damaged(kind: str, data: bytes) -> bytes:
    if kind == "cut":
        return data[: len(data) // 2 - 100]
    if kind == "checksum":
        return b"x" + data[1:]
    link = bytearray(data[:512])
    link[156:157] = b"2"
    link[148:156] = b"%06o\0 " % (sum(link[:148]) + 8 * 32 + sum(link[156:]))
    return bytes(link) + data[512:]


@pytest.mark.parametrize("kind", ["cut", "checksum", "link"])
def test_a_damaged_or_hostile_tar_is_refused(kind: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("0") + sample("1"))
    (tmp_path / "0.tar").write_bytes(damaged(kind, (tmp_path / "0.tar").read_bytes()))
    with pytest.raises(ShardCorrupt):
        tried(tmp_path / "0.tar")


@pytest.mark.parametrize(
    ("field", "reason"), [(b"21 comment=a caption ", "header is damaged"), (b"21 size=0x10 bytes!!\n", "holds a size")]
)
def test_a_damaged_extended_header_is_reported_with_file_and_byte(tmp_path: Path, field: bytes, reason: str) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("0.txt", "1.txt"):
            member = tarfile.TarInfo(name)
            member.pax_headers = {"comment": "a caption"} if name == "1.txt" else {}
            tar.addfile(member)
    data = path.read_bytes()
    at = data.index(b"21 comment=a caption\n")
    path.write_bytes(data[:at] + field + data[at + 21 :])
    with pytest.raises(ShardCorrupt, match=rf"0\.tar, byte \d+: .*{reason}"):
        list(files_of(Ranges(LocalStorage(str(tmp_path)), "0.tar", len(data)), LimitsConfig()))


def test_a_member_beyond_the_limits_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("0"))
    size = (tmp_path / "0.tar").stat().st_size
    with pytest.raises(ShardCorrupt, match="member_bytes=100"):
        list(files_of(Ranges(LocalStorage(str(tmp_path)), "0.tar", size), LimitsConfig(member_bytes=100)))
