"""preprocess/index.py: damaged records are counted, foreign files are left alone, an interrupted index goes on, and
what looks wrong about latents is said."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.cache import WIDTH, make_cache
from made.encode import files
from made.foreign import COUNT, Files, numbers, write
from pipeline.config import IndexConfig, LimitsConfig, VerifyConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.records import npy_bytes
from pipeline.errors import ConfigError, DestinationExists, LatentmillError, ShardCorrupt, SourceError
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import index, verify


def config(folder: Path, **changes: Any) -> IndexConfig:
    return IndexConfig(**{"dataset": str(folder), "source": f"{folder}/*.tar", **changes})


def refusal(folder: Path, kind: type[LatentmillError], **changes: Any) -> str:
    """The line with which indexing is refused; nothing may have been written."""
    before = files(folder)
    with pytest.raises(kind) as caught:
        index.main(config(folder, **changes))
    assert files(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


DAMAGED: dict[str, tuple[str, bytes]] = {
    "minus signs": ("moments.npy", npy("-" * 60000 + "1")),
    "sums": ("moments.npy", npy("1+" * 20000 + "1")),
    "hexadecimal": ("text.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + "f" * 20000 + ",), }")),
    "wide and empty": ("text.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 10000000000), }")),
    "surrogate": ("json", b'{"caption": "a \\ud800 b"}'),
    "a list": ("json", b"[1]"),
    "NaN": ("json", b'{"caption": NaN}'),
    "nested": ("json", b"[" * 100_000),
    "twice": ("json", b'{"caption": "a", "caption": "b"}'),
    "a number": ("json", b'{"caption": 5}'),
    "latin": ("json", b'{"caption": "\xe9"}'),
    "float64": ("moments.npy", npy_bytes(numbers(8, 2, 2)).replace(b"<f4", b"<f8")),
    "pickle": ("moments.npy", b"\x80\x04cos\nsystem\n."),
    "nothing": ("text.npy", b""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_is_named_or_counted_up_to_max_rejects(tmp_path: Path, name: str) -> None:
    file, data = DAMAGED[name]
    write(tmp_path, lambda row, one: one.update({file: data}) if row == 3 else None)
    line = refusal(tmp_path, SourceError)
    assert "0.tar, byte " in line and "record 0_3" in line and len(line) < 1000
    assert index.main(config(tmp_path, max_rejects=0.2)) == 0
    manifest = load_manifest(open_storage(str(tmp_path)))
    reason = "member_mismatch" if name == "wide and empty" else "member_unreadable"
    assert (manifest.samples, manifest.rejected) == (COUNT - 1, {reason: 1})
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0


def test_arrays_of_a_dtype_that_is_not_read_are_named_by_it(tmp_path: Path) -> None:
    def as_double(row: int, one: Files) -> None:
        out = io.BytesIO()
        np.save(out, numbers(8, 2, 2).astype(np.float64))
        one["moments.npy"] = out.getvalue()

    line = refusal(write(tmp_path, as_double), SourceError)
    assert "an array member holds float64; read are float16, float32" in line
    assert line.endswith("Write arrays as .npy of float16 or float32, and captions as UTF-8")


def test_a_tar_whose_header_names_a_negative_size_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "0.tar"
    for size in (b"-0000001000\0", b"        -1 \0", b"\x80" + b"\xff" * 11):
        data = bytearray(path.read_bytes())
        at = data.index(b"0_0.text.npy")
        data[at + 124 : at + 136] = size
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data)
        line = refusal(tmp_path, ShardCorrupt, max_rejects=0.9)
        assert f"0.tar, byte {at}: a tar header holds a size that is not a number" in line


def test_a_record_without_end_is_left_out_without_its_memory(tmp_path: Path) -> None:
    write(tmp_path, lambda row, one: one.update({f"{i}.bin": bytes(4000) for i in range(4)}) if row == 2 else None)
    limits = LimitsConfig(member_bytes=4000)
    assert "record 0_2 has more than 4 x limits.member_bytes" in refusal(tmp_path, SourceError, limits=limits)
    index.main(config(tmp_path, limits=limits, max_rejects=0.5))
    assert load_manifest(open_storage(str(tmp_path))).rejected == {"record_too_large": 1}
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0


@pytest.mark.parametrize(
    ("file", "shape"), [("moments.npy", (8, 0, 0)), ("text.npy", (0, WIDTH)), ("text.npy", (3, 0))]
)
def test_arrays_without_values_make_no_dataset(tmp_path: Path, file: str, shape: tuple[int, ...]) -> None:
    write(tmp_path, lambda row, one: one.update({file: npy_bytes(np.zeros(shape, np.float32))}))
    assert "make no dataset that can be read again" in refusal(tmp_path, ConfigError)


def test_settings_that_no_contract_holds_are_refused(tmp_path: Path) -> None:
    assert "scale" in refusal(write(tmp_path), ConfigError, scale=1e-9)
    assert "shift" in refusal(tmp_path, ConfigError, shift=1e30)


@pytest.mark.parametrize("name", ["a\n.tar", "\x1b[31m.tar"])
def test_a_tar_with_control_characters_in_its_name_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / "0.tar").rename(tmp_path / name)
    assert "control characters" in refusal(tmp_path, ConfigError)


# --------------------------------------------------------------------------------------------------------------------
# What is there already

FOREIGN = {
    "manifest.json": b'{"name": "an app", "icons": []}',
    "0.index.json": b'{"entries": []}',
    "1.index.json": b"",
    "contract.json": b'{"parties": 2}',
    "manifests/000001.json": b"{}",
    "uncond.npy": b"other",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_its_own_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    write(tmp_path, tars=2)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(FOREIGN[name])
    assert name in refusal(tmp_path, LatentmillError)


@pytest.mark.parametrize("name", ["manifest.json", "0.index.json"])
def test_a_foreign_file_is_found_before_any_tar_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(FOREIGN[name])

    def no_tar(*_: object) -> None:
        raise AssertionError("a tar was opened")

    monkeypatch.setattr("preprocess.adopting.scan.LatentShard.__init__", no_tar)
    assert name in refusal(tmp_path, DestinationExists)


def test_a_dataset_of_encode_is_not_indexed_over(tmp_path: Path) -> None:
    make_cache(str(tmp_path), [4])
    assert "nothing to do" in refusal(tmp_path, DestinationExists)


class Killed(BaseException):
    pass


def test_an_index_that_was_killed_at_any_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index.main(config(write(tmp_path / "whole", tars=2)))
    whole = files(tmp_path / "whole")
    put, writes = LocalStorage.put_if_absent, len(whole)
    for kill_at in range(writes):
        folder, done = write(tmp_path / str(kill_at), tars=2), [0]

        def killed(self: LocalStorage, key: str, data: bytes, at: int = kill_at, done: list[int] = done) -> bool:
            if done[0] == at:
                raise Killed
            done[0] += 1
            return put(self, key, data)

        with monkeypatch.context() as patch, pytest.MonkeyPatch.context():
            patch.setattr(LocalStorage, "put_if_absent", killed)
            try:
                index.main(config(folder))
            except Killed:
                assert not (folder / "manifest.json").exists()
        index.main(config(folder))
        found = files(folder)
        assert found.keys() == whole.keys()
        assert all(found[name] == whole[name] for name in whole if name != "contract.json" and "manifest" not in name)
        assert verify.main(VerifyConfig(dataset=str(folder))) == 0


@pytest.mark.parametrize("change", [{"scale": 0.5}, {"text_member": "states.npy"}, {"source": "0.tar"}])
def test_the_advice_to_delete_what_was_indexed_and_to_index_anew_ends_well(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    write(tmp_path, lambda row, one: one.update({"states.npy": one["text.npy"]}), tars=2)
    index.main(config(tmp_path))
    if "source" in change:
        change = {"source": str(tmp_path / "0.tar")}
    line = refusal(tmp_path, DestinationExists, **change)
    assert "delete contract.json, manifest.json, manifests/, all *.index.json and a uncond.npy that it made" in line
    for path in [tmp_path / "contract.json", tmp_path / "manifest.json", *tmp_path.glob("*.index.json")]:
        path.unlink()
    (tmp_path / "manifests/000001.json").unlink()
    assert index.main(config(tmp_path, **change)) == 0
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0


# --------------------------------------------------------------------------------------------------------------------
# What looks wrong


def lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    index.main(config(folder))
    return capsys.readouterr().out.splitlines()


def test_the_summary_shows_mean_and_deviation_and_finds_nothing_unusual(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = lines(write(tmp_path), capsys)
    assert len(said) == 2
    manifest = load_manifest(open_storage(str(tmp_path)))
    assert f"{manifest.statistics.mean[0]:+.3f} ± {manifest.statistics.std[0]:.3f}, " in said[1]
    assert "scale=0.18215" in said[1]


def test_moments_that_are_scaled_already_are_hinted_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, lambda row, one: one.update({"moments.npy": npy_bytes(numbers(8, 2, 2, seed=row))}))
    said = lines(tmp_path, capsys)
    assert len(said) == 3 and "scaled already: then give scale=1 shift=0" in said[2]


def test_a_deviation_in_place_of_a_log_variance_is_hinted_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spread(row: int, one: Files) -> None:
        moments = numbers(8, 2, 2, seed=row) / np.float32(0.18215)
        moments[4:] = np.exp(moments[4:] / 20)
        one["moments.npy"] = npy_bytes(moments)

    said = lines(write(tmp_path, spread), capsys)
    assert len(said) == 3 and "no log-variance is below 0" in said[2]


def test_links_and_folders_among_the_members_end_in_a_line(tmp_path: Path) -> None:
    write(tmp_path)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        info = tarfile.TarInfo("x.moments.npy")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert "1.tar, byte 0" in refusal(tmp_path, ShardCorrupt)
