"""`latentmill index dest=`: what cannot be used is refused by name or counted, before anything is written where the
first records show it, and keys that contradict each other are refused."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.encode import files
from made.fuzz import bounded
from made.latents import bits, latent, npy, npz, tensors, write_mds, write_records
from pipeline.config import IndexConfig, LimitsConfig, VerifyConfig
from pipeline.config.check.verbs import check_index
from pipeline.config.values.members import Place, parse_place
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError, LatentmillError, ShardCorrupt, SourceError
from pipeline.storage.urls import open_storage
from preprocess import index, verify

COUNT = 5
Files = dict[str, bytes]


def config(source: Path | str, dest: Path, **changes: Any) -> IndexConfig:
    return IndexConfig(**{"source": str(source), "dest": str(dest), "text_member": "", "stored": "latents", **changes})


def refusal(source: Path | str, dest: Path, kind: type[LatentmillError], **changes: Any) -> str:
    """The line with which it is refused; nothing may have been written."""
    with bounded(), pytest.raises(kind) as caught:
        index.main(config(source, dest, **changes))
    assert not dest.exists() or files(dest) == {}
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_python_object() -> bytes:
    out = io.BytesIO()
    np.savez(out, z=np.array([{}], dtype=object))
    return out.getvalue()


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def lying(data: bytes, size: int) -> bytes:
    """An archive whose directory says that its array has `size` bytes."""
    at = data.rindex(b"PK\1\2")
    return data[: at + 24] + struct.pack("<L", size) + data[at + 28 :]


WHOLE = npz(z=latent(3))
DAMAGED: dict[str, tuple[bytes, str, str]] = {
    "no archive": (b"words", "member_unreadable", "it is not a .npz file"),
    "nothing": (b"", "member_unreadable", "it is not a .npz file"),
    "cut": (WHOLE[:-9], "member_unreadable", "it is cut"),
    "a flipped byte": (WHOLE[:300] + bytes([WHOLE[300] ^ 1]) + WHOLE[301:], "member_unreadable", "checksum"),
    "another array": (npz(y=latent(3)), "member_unreadable", "it holds no array 'z' (it has y)"),
    "two sizes": (npz(z_8x8=latent(3), z_6x6=latent(3, 6, 6)), "member_unreadable", "in several sizes (z_6x6, z_8x8)"),
    "an object": (as_python_object(), "member_unreadable", "it holds object, which is not read|it holds |O"),
    "no array": (zipped(("z.txt", b"1")), "member_unreadable", "'z.txt', which is no array"),
    "twice": (
        zipped(("z.npy", npy(latent(3))), ("y.npy", b"")).replace(b"y.npy", b"z.npy"),
        "member_unreadable",
        "'z' twice",
    ),
    "bzip2": (zipped(("z.npy", npy(latent(3))), method=zipfile.ZIP_BZIP2), "member_unreadable", "in another way"),
    "a bomb": (
        zipped(("z.npy", npy(np.zeros((4, 3000, 3000), np.float32))), method=zipfile.ZIP_DEFLATED),
        "member_unreadable",
        "an array takes 144000128 bytes, limits.member_bytes=",
    ),
    "a hidden bomb": (
        lying(zipped(("z.npy", bytes(10**7)), method=zipfile.ZIP_DEFLATED), 2000),
        "member_unreadable",
        "it ends early, or is longer",
    ),
    "other channels": (npz(z=latent(3, channels=3)), "member_mismatch", "(3, 8, 8), and (4, h, w) is wanted"),
    "no side": (npz(z=np.zeros((4, 0, 8), np.float32)), "member_unreadable", "shape (4, 0, 8)"),
    "NaN": (npz(z=np.full((4, 8, 8), np.nan, np.float32)), "member_mismatch", "NaN or infinity"),
    "too large": (npz(z=np.full((4, 8, 8), 7e4, np.float32)), "value_too_large", "7e+04, float16 holds up to 65504"),
    "whole numbers": (npz(z=np.ones((4, 8, 8), np.int32)), "member_mismatch", "holds int32, and floating-point"),
    "big-endian": (npz(z=latent(3).astype(">f4")), "member_unreadable", "it holds >f4, which is not read"),
    "bits": (npz(z=bits(latent(3))), "member_unreadable", "if these are the bits of bfloat16, write npz:z:bfloat16"),
}
DAMAGED["an object"] = (as_python_object(), "member_unreadable", "npz: it")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_npz_is_named_or_counted_up_to_max_rejects(tmp_path: Path, name: str) -> None:
    data, reason, words = DAMAGED[name]
    records: list[Files] = [{"npz": npz(z=latent(row))} for row in range(COUNT)]
    source = write_records(tmp_path / "theirs", [*records[:3], {"npz": data}, *records[3:]])
    changes: dict[str, Any] = {"moments_member": "npz:z", "limits": LimitsConfig(member_bytes=1_000_000)}
    line = refusal(f"{source}/*.tar", tmp_path / "no", SourceError, **changes)
    assert "0.tar, record 0_3: " in line and words in line and "max_rejects=" in line
    with bounded():
        assert index.main(config(f"{source}/*.tar", tmp_path / "cache", max_rejects=0.2, **changes)) == 0
    manifest = load_manifest(open_storage(str(tmp_path / "cache")))
    assert (manifest.samples, manifest.rejected) == (COUNT, {reason: 1})
    listed = json.loads((tmp_path / "cache/units/000000.rejected.jsonl").read_bytes())
    assert (listed["key"], listed["reason"]) == ("0_3", reason) and words in listed["message"]
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "cache"), source=f"{source}/*.tar")) == 0


def test_more_rejects_than_allowed_end_in_a_line_with_the_counts(tmp_path: Path) -> None:
    records: list[Files] = [{"npz": npz(z=latent(row)) if row % 2 else b"x"} for row in range(4)]
    source = write_records(tmp_path / "theirs", records)
    with pytest.raises(SourceError, match=r"2 of 4 records cannot be used \(2 member_unreadable; the first: 0"):
        index.main(config(f"{source}/*.tar", tmp_path / "cache", moments_member="npz:z", max_rejects=0.3))
    assert not (tmp_path / "cache/manifest.json").exists()
    assert index.main(config(f"{source}/*.tar", tmp_path / "cache", moments_member="npz:z", max_rejects=0.5)) == 0


def header(value: Any) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


TENSORS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is cut, or not a .safetensors file"),
    "a long header": ((2**40).to_bytes(8, "little") + b"{}", "it is cut, or not a .safetensors file"),
    "no JSON": (header(b"{"), "it is not JSON"),
    "a list": (header([1]), "its header is not that of"),
    "another": (tensors(y=latent(3)), "it holds no array 'z' (it has y)"),
    "outside": (
        header({"z": {"dtype": "F32", "shape": [4, 8, 8], "data_offsets": [0, 1024]}}),
        "lies outside of the file",
    ),
    "backwards": (header({"z": {"dtype": "F32", "shape": [0], "data_offsets": [8, 0]}}) + bytes(9), "lies outside"),
    "a negative side": (
        header({"z": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}) + bytes(4),
        "shape (-1, -1)",
    ),
    "another dtype": (header({"z": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}) + b"1", "holds F8"),
    "no offsets": (header({"z": {"dtype": "F32", "shape": [1]}}), "data_offsets: missing"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_damaged_safetensors_is_named(tmp_path: Path, name: str) -> None:
    data, words = TENSORS[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    line = refusal(tmp_path / "x.safetensors", tmp_path / "no", SourceError, moments_member="safetensors:z")
    assert "x.safetensors, record x: " in line and words in line


# --------------------------------------------------------------------------------------------------------------------
# MDS

COLUMNS = {"z": "ndarray:float32:4,8,8", "caption": "str", "p": "pkl"}


def samples(count: int = COUNT) -> list[Files]:
    return [{"z": latent(row).tobytes(), "caption": b"a dot", "p": b"\x80\x04cos\nsystem\n."} for row in range(count)]


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the facts of the first shard in index.json."""

    def write(folder: Path) -> None:
        value = json.loads((folder / "index.json").read_bytes())
        change(value["shards"][0])
        (folder / "index.json").write_text(json.dumps(value))

    return write


def edited_index(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "index.json").write_bytes(data)


def edited(at: int, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "shard.00000.mds"
        whole = bytearray(path.read_bytes())
        whole[at : at + len(data)] = data
        path.write_bytes(whole)

    return write


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (changed(lambda one: one.update(samples=7)), ShardCorrupt, "it holds 5 samples, its index says 7"),
        (changed(lambda one: one.update(version=1)), SourceError, "mds of version 2 is read, not mds 1"),
        (changed(lambda one: one.update(format="csv")), SourceError, "not csv 2"),
        (changed(lambda one: one.update(column_sizes=[1])), SourceError, "3 columns have not as many"),
        (changed(lambda one: one["raw_data"].update(basename="../x.mds")), SourceError, "is not a key"),
        (changed(lambda one: one["raw_data"].update(basename="x.mds")), SourceError, "zstd -d x.mds.zstd"),
        (changed(lambda one: one["raw_data"].update(bytes=9)), ShardCorrupt, "its index says 9"),
        (changed(lambda one: one["raw_data"]["hashes"].update(sha1="0" * 40)), ShardCorrupt, "its sha1 is not what"),
        (changed(lambda one: one.update(column_names=["a", "b", "c"])), ShardCorrupt, "its columns are not those"),
        (changed(lambda one: one.pop("samples")), SourceError, "samples: missing"),
        (lambda folder: (folder / "index.json").write_text("[]"), SourceError, "is no index of MDS shards"),
        (edited_index(b'{"version": 2, "shards": []}'), SourceError, "lists no shard"),
        (edited(0, b"\xff\xff\xff\xff"), ShardCorrupt, "holds 4294967295 samples"),
        (edited(8, b"\xff\xff\xff\xff"), ShardCorrupt, "its offsets do not lead"),
        (edited(4, b"\0\0\0\0"), ShardCorrupt, "its offsets do not lead"),
        (edited(30, b"\0"), ShardCorrupt, "its columns cannot be read"),
    ],
)
def test_a_damaged_mds_dataset_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], object], kind: type[LatentmillError], words: str
) -> None:
    folder = write_mds(tmp_path / "mds", COLUMNS, [samples()], ["sha1"])
    change(folder)
    line = ""
    with bounded(), pytest.raises(kind) as caught:
        index.main(config(folder / "index.json", tmp_path / "no", moments_member="z"))
    line = str(caught.value)
    assert words in line and "\n" not in line and not (tmp_path / "no/manifest.json").exists()


@pytest.mark.parametrize(
    ("place", "columns", "words"),
    [
        ("y", COLUMNS, "y is not there (it has caption, p, z)"),
        ("p", COLUMNS, "pickles are never opened"),
        ("caption", COLUMNS, "its encoding is 'str', which is no array"),
        ("z", {**COLUMNS, "z": "bytes"}, "it is raw bytes: say what of"),
        ("z:float16:4x8x8", {**COLUMNS, "z": "bytes"}, "an array of shape (4, 8, 8) has 1024 bytes of float16"),
        ("z:float64:5x5", {**COLUMNS, "z": "bytes"}, "an array of shape (5, 5) has 1024 bytes of float64"),
        ("z:float16", COLUMNS, "it holds float32, not float16"),
        ("z", {**COLUMNS, "z": "ndarray"}, "z: "),
        ("z", {**COLUMNS, "z": "ndarray:complex64:4,8,4"}, "it holds complex64"),
        ("z", {**COLUMNS, "z": "int"}, "its columns do not fill it"),
    ],
)
def test_a_column_that_is_no_array_of_latents_is_refused(
    tmp_path: Path, place: str, columns: dict[str, str], words: str
) -> None:
    folder = write_mds(tmp_path / "mds", columns, [samples()])
    line = refusal(folder / "index.json", tmp_path / "no", LatentmillError, moments_member=place)
    assert words in line and "shard.00000.mds, record 00000000: " in line


# --------------------------------------------------------------------------------------------------------------------
# Keys and sources


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dest": ""}, "dataset is missing: give dataset=... \\(the folder"),
        ({"dataset": "d"}, "dataset=d and dest=c"),
        ({"moments_member": "npz"}, "moments_member=npz: it does not say which array of the file"),
        ({"moments_member": "z.npy:float8"}, "float8 is no dtype"),
        ({"moments_member": "z:float16:4x"}, "a shape such as 4x32x32"),
        ({"moments_member": "a/z.npy"}, "is wanted, such as latent.npy:bfloat16"),
        ({"moments_member": ""}, "moments_member=: FILE"),
        ({"logvar_member": "moments.npy", "stored": "moments"}, "logvar_member=moments.npy is moments_member"),
        ({"logvar_member": "lv.npy"}, "logvar_member=lv.npy with stored=latents"),
        ({"scaled": True, "stored": "moments"}, "scaled=true with stored=moments"),
        ({"text_storage": "tokens"}, "give it \\(encoders=sd1\\)"),
        ({"dest": "", "dataset": "d", "scaled": True}, "scaled=true: tars that stay where they lie"),
        ({"dest": "", "dataset": "d", "stored": "moments", "logvar_member": "l.npy"}, "logvar_member=l.npy"),
        ({"dest": "", "dataset": "d", "moments_member": "npz:z"}, "are converted into a new cache, with dest="),
        ({"dest": "", "dataset": "d", "moments_member": "z.npy:bfloat16"}, "a .npy file is wanted"),
        ({"dest": "", "dataset": "d", "text_member": "t.npy", "caption_key": "caption"}, "txt, or json:KEY"),
        ({"text_member": "t.npy", "caption_key": "a/b"}, "a file or column is wanted"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    given = {"source": "s", "dest": "c", "text_member": "", "stored": "latents", **changes}
    with pytest.raises(ConfigError, match=words):
        check_index(IndexConfig(**given))


def test_places_are_read_from_left_to_right() -> None:
    assert parse_place("latent.npy:bfloat16") == Place("latent.npy", "", "bfloat16")
    assert parse_place("npz:latents") == Place("npz", "latents")
    assert parse_place("x.safetensors:m:bfloat16:1x4") == Place("x.safetensors", "m", "bfloat16", (1, 4))
    assert parse_place("latents_256:float16:4x32x32") == Place("latents_256", "", "float16", (4, 32, 32))


def test_sources_of_no_or_several_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("a.npz", "b.safetensors", "shard.00000.mds", "c.txt"):
        (tmp_path / name).write_bytes(npz(z=latent(0)))
    assert "names several kinds" in refusal(f"{tmp_path}/{{a.npz,b.safetensors}}", tmp_path / "no", ConfigError)
    assert "name the index.json beside it" in refusal(f"{tmp_path}/*.mds", tmp_path / "no", ConfigError)
    assert "c.txt is none of what is converted" in refusal(f"{tmp_path}/c.txt", tmp_path / "no", ConfigError)
    assert "npz:ARRAY is wanted" in refusal(f"{tmp_path}/*.npz", tmp_path / "no", ConfigError)
    with pytest.raises(ConfigError, match="is read and lies in it"):
        index.main(config(f"{tmp_path}/*.npz", tmp_path, moments_member="npz:z"))


def test_captions_that_are_missing_or_empty_are_counted_by_reason(tmp_path: Path) -> None:
    texts = {"a": b"words", "b": None, "c": b" \n", "d": b"\xff", "e": b"x" * 70_000}
    for name, text in texts.items():
        (tmp_path / f"{name}.npz").write_bytes(npz(z=latent(0), t=np.zeros((3, 8), np.float32)))
        if text is not None:
            (tmp_path / f"{name}.caption").write_bytes(text)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "uncond.npy").write_bytes(npy(np.zeros((3, 8), np.float16)))
    changes = {"moments_member": "npz:z", "text_member": "npz:t", "caption_key": "caption", "max_rejects": 0.9}
    assert index.main(config(f"{tmp_path}/*.npz", cache, **changes)) == 0
    manifest = load_manifest(open_storage(str(cache)))
    reasons = ("caption_bad_utf8", "caption_empty", "caption_missing", "caption_too_long")
    assert manifest.rejected == dict.fromkeys(reasons, 1)


def test_files_of_one_image_in_two_sizes_count_once(tmp_path: Path) -> None:
    for name in ("a_0064x0064_sd", "a_0128x0064_sd", "b"):
        (tmp_path / f"{name}.npz").write_bytes(npz(z=latent(0)))
    index.main(config(f"{tmp_path}/*.npz", tmp_path / "cache", moments_member="npz:z", max_rejects=0.5))
    assert load_manifest(open_storage(str(tmp_path / "cache"))).rejected == {"key_repeated": 1}


def test_tars_that_stay_where_they_lie_name_the_way_to_convert_bits(tmp_path: Path) -> None:
    source = write_records(tmp_path / "theirs", [{"z.npy": npy(bits(latent(0)))}])
    changes: dict[str, Any] = {"moments_member": "z.npy", "stored": "latents", "text_member": ""}
    with pytest.raises(SourceError, match=r"dest=CACHE in place of dataset=, and moments_member=z\.npy:bfloat16"):
        index.main(IndexConfig(dataset=str(source), source=f"{source}/*.tar", **changes))


def test_the_checksum_of_an_array_is_that_of_zip() -> None:
    assert zlib.crc32(npy(latent(0))) == zipfile.ZipFile(io.BytesIO(npz(z=latent(0)))).infolist()[0].CRC
