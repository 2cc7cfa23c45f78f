"""`latentmill index dest=`: MDS shards and files of arrays by themselves become a cache whose bytes do not depend on
threads or kills, which goes on with the same settings alone, and is proved against what was read."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.encode import ENCODERS, files
from made.latents import (
    CAPTIONS,
    conversion,
    half,
    latent,
    made,
    ndarray,
    npz,
    write_mds,
    write_records,
)
from pipeline.config import IndexConfig, VerifyConfig
from pipeline.data.format.manifest import manifest_bytes
from pipeline.data.format.records import npy_bytes
from pipeline.errors import DataError, DestinationExists, SourceError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.latents import Latents
from pipeline.models.encoders.text import load_text
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import index, verify
from preprocess.adopting.unit import UnitWriter
from preprocess.units.sources import find_inputs

COUNT = 5
LENGTH, WIDTH = 3, 8


def write_shards(folder: Path) -> Path:
    """Two shards of latents as raw bytes, states as `ndarray`, captions, and a class; scaled by 0.18215."""
    columns = {"caption": "str", "latents": "bytes", "states": "ndarray", "class": "int", "z": "ndarray:float32:4,8,8"}
    samples = [
        {
            "caption": CAPTIONS[row].encode(),
            "latents": half(latent(row) * 0.18215).tobytes(),
            "states": ndarray(np.full((LENGTH, WIDTH), row, np.float32)),
            "class": np.int64(row % 3).tobytes(),
            "z": latent(row).tobytes(),
        }
        for row in range(COUNT)
    ]
    return write_mds(folder, columns, [samples[:3], samples[3:]], ["sha1", "xxh64"][:1])


def test_columns_of_mds_shards_are_read_and_scaled_latents_unscaled(tmp_path: Path) -> None:
    source = f"{write_shards(tmp_path / 'mds')}/index.json"
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "uncond.npy").write_bytes(npy_bytes(np.zeros((LENGTH, WIDTH), np.float16)))
    changes: dict[str, Any] = {"stored": "latents", "scaled": True, "text_member": "states", "caption_key": "caption"}
    changes |= {"class_member": "class", "classes": 3, "moments_member": "latents:float16:4x8x8"}
    assert index.main(conversion(source, cache, **changes)) == 0
    manifest, found = made(cache)
    assert [unit.source for unit in manifest.units] == ["shard.00000.mds", "shard.00001.mds"]
    for row, record in enumerate(found):
        scaled = half(latent(row) * 0.18215).astype(np.float32)
        assert (record.members["latents"] == half(scaled / np.float32(0.18215))).all()
        assert (record.members["text"] == row).all() and record.meta["caption"] == CAPTIONS[row]
        assert int(record.members["cond.class"]) == row % 3
    np.testing.assert_allclose(manifest.statistics.std, 1, atol=0.15)
    assert verify.main(VerifyConfig(dataset=str(cache), source=source)) == 0
    assert index.main(conversion(source, tmp_path / "z", stored="latents", moments_member="z")) == 0
    for row, record in enumerate(made(tmp_path / "z")[1]):
        assert (record.members["latents"] == half(latent(row))).all()


def write_images(folder: Path) -> list[tuple[str, tuple[int, int]]]:
    """Files as sd-scripts writes them: .npz beside captions, in two sizes of latents. Names and (height, width)."""
    folder.mkdir(parents=True)
    listed = []
    for row in range(COUNT):
        height, width = [(8, 8), (6, 10)][row % 2]
        name = [f"{row}_{8 * width:04d}x{8 * height:04d}_sd", f"{row}"][row == 4]
        array = f"latents_{height}x{width}" if row == 2 else "latents"
        facts = {array: latent(row, height, width), "original_size": np.array([640, 480])}
        (folder / f"{name}.npz").write_bytes(npz(False, **facts, crop_ltrb=np.array([0, 0, 640, 480])))
        (folder / f"{row}.txt").write_text(CAPTIONS[row])
        listed.append((str(row), (height, width)))
    (folder / "0_te_outputs.npz").write_bytes(npz(hidden_state1=np.zeros((2, 3), np.float32)))
    return listed


TOKENS: dict[str, Any] = {"stored": "latents", "moments_member": "npz:latents", "encoders": ENCODERS}
TOKENS |= {"text_storage": "tokens", "caption_key": "txt"}


def test_npz_beside_captions_become_token_ids_and_a_tar_for_each_size(tmp_path: Path) -> None:
    listed = write_images(tmp_path / "train")
    cache, source = tmp_path / "cache", f"{tmp_path}/train/*.npz"
    assert index.main(conversion(source, cache, unit_size=3, **TOKENS)) == 0
    manifest, found = made(cache)
    contract, tower = manifest.contract, load_text(ENCODERS)
    units = ["0_0064x0064_sd.npz..2_0064x0064_sd.npz", "3_0080x0048_sd.npz..4.npz"]
    assert [unit.source for unit in manifest.units] == units
    assert contract.buckets == ((64, 64), (80, 48))
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("000000-64x64.tar", 2),
        ("000000-80x48.tar", 1),
        ("000001-64x64.tar", 1),
        ("000001-80x48.tar", 1),
    ]
    assert {record.meta["key"] for record in found} == {name for name, _ in listed}
    for record in found:
        row = int(record.meta["key"])
        assert (record.members["latents"] == half(latent(row, *listed[row][1]))).all()
        assert record.members["tokens"].tolist() == tower.ids(CAPTIONS[row])[0]
        assert record.meta["caption"] == CAPTIONS[row]
    assert contract.vae_sha256 == load_autoencoder(ENCODERS).weights_sha256
    assert contract.scale == Latents.of(contract).scale == load_autoencoder(ENCODERS).scale
    assert verify.main(VerifyConfig(dataset=str(cache), source=source)) == 0
    with pytest.raises(SourceError, match="was converted from latents"):
        find_inputs(manifest, "", str(cache))


# --------------------------------------------------------------------------------------------------------------------
# Bytes, kills and proofs


def test_bytes_are_the_same_for_one_thread_and_four_and_after_any_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "train")
    one, source = tmp_path / "one", f"{tmp_path}/train/*.npz"
    changes = {"stored": "latents", "moments_member": "npz:latents", "unit_size": 3}
    monkeypatch.setattr("preprocess.adopting.conversion.cores", lambda: 1)
    index.main(conversion(source, one, **changes))
    whole = files(one)
    monkeypatch.setattr("preprocess.adopting.conversion.cores", lambda: 4)
    index.main(conversion(source, tmp_path / "four", **changes))
    assert files(tmp_path / "four") == whole
    with ThreadPoolExecutor(2) as pool:  # as two processes would, at the same time
        assert list(pool.map(index.main, [conversion(source, tmp_path / "two", **changes)] * 2)) == [0, 0]
    assert files(tmp_path / "two") == whole
    assert index.main(conversion(source, one, **changes)) == 0
    assert files(one) == whole
    writes = len(whole)
    for kill_at in range(writes):
        dest, done = tmp_path / f"killed-{kill_at}", [0]
        killing(monkeypatch, done, kill_at)
        with pytest.raises(Killed):
            index.main(conversion(source, dest, **changes))
        assert not (dest / "manifest.json").exists()
        monkeypatch.undo()
        assert index.main(conversion(source, dest, **changes)) == 0
        assert files(dest) == whole


class Killed(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, done: list[int], kill_at: int) -> None:
    """Every write after the first `kill_at` fails, as if the process had ended."""
    for name in ("put", "put_file", "put_if_absent"):
        original = getattr(LocalStorage, name)

        def killed(self: LocalStorage, key: str, value: Any, original: Any = original) -> Any:
            if done[0] >= kill_at:
                raise Killed
            done[0] += 1
            return original(self, key, value)

        monkeypatch.setattr(LocalStorage, name, killed)


def test_verify_finds_what_changed_in_the_source_or_the_cache(tmp_path: Path) -> None:
    records = [{"npz": npz(z=latent(row))} for row in range(COUNT)]
    changes: dict[str, Any] = {"stored": "latents", "moments_member": "npz:z"}
    source, cache = write_records(tmp_path / "theirs", records, tars=2), tmp_path / "cache"
    index.main(conversion(f"{source}/*.tar", cache, **changes))
    tar = (source / "1.tar").read_bytes()
    other = bytearray(tar)
    other[tar.index(b"PK") + 400] ^= 1
    (source / "1.tar").write_bytes(other)
    with pytest.raises(DataError, match=r"1\.tar is not what was converted: its SHA-256 differs"):
        verify.main(VerifyConfig(dataset=str(cache), source=f"{source}/*.tar"))
    (source / "1.tar").write_bytes(tar)
    (source / "2.tar").write_bytes(tar)
    with pytest.raises(SourceError, match=r"is not what .* was converted from"):
        verify.main(VerifyConfig(dataset=str(cache), source=f"{source}/*.tar"))
    (source / "2.tar").unlink()
    held = files(cache)
    damaged = bytearray(held["000001-64x64.tar"])
    damaged[700] ^= 1
    (cache / "000001-64x64.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"Delete units/000001\.json and run its `latentmill index` again"):
        verify.main(VerifyConfig(dataset=str(cache)))
    (cache / "units/000001.json").unlink()
    index.main(conversion(f"{source}/*.tar", cache, **changes))
    assert files(cache) == held


def test_verify_finds_tars_that_the_contract_does_not_give(tmp_path: Path) -> None:
    """A manifest whose hashes are right, and which says that other settings made its tars."""
    source = write_records(tmp_path / "theirs", [{"npz": npz(z=latent(row))} for row in range(COUNT)])
    cache = tmp_path / "cache"
    index.main(conversion(f"{source}/*.tar", cache, stored="latents", moments_member="npz:z"))
    manifest = made(cache)[0]
    facts = manifest.contract.converted
    assert facts is not None
    contract = dataclasses.replace(manifest.contract, converted=dataclasses.replace(facts, scaled=True))
    (cache / "manifest.json").write_bytes(manifest_bytes(dataclasses.replace(manifest, contract=contract)))
    assert verify.main(VerifyConfig(dataset=str(cache))) == 0
    with pytest.raises(DataError, match=r"0\.tar: it is not converted to the tars that the manifest names"):
        verify.main(VerifyConfig(dataset=str(cache), source=f"{source}/*.tar"))


def test_units_that_are_done_are_not_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_records(tmp_path / "theirs", [{"npz": npz(z=latent(row))} for row in range(COUNT)], tars=3)
    changes: dict[str, Any] = {"stored": "latents", "moments_member": "npz:z"}
    index.main(conversion(f"{source}/*.tar", tmp_path / "cache", **changes))
    (tmp_path / "cache/units/000001.json").unlink()
    converted = []
    convert = UnitWriter.convert

    def noted(self: UnitWriter, *arguments: Any) -> Any:
        converted.append(self.number)
        return convert(self, *arguments)

    monkeypatch.setattr(UnitWriter, "convert", noted)
    index.main(conversion(f"{source}/*.tar", tmp_path / "cache", **changes))
    assert converted == [1]


def test_a_cache_goes_on_with_the_same_settings_and_source_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    cache, source = tmp_path / "cache", f"{tmp_path}/train/*.npz"
    changes: dict[str, Any] = {"stored": "latents", "moments_member": "npz:latents", "unit_size": 3}
    index.main(conversion(source, cache, **changes))
    with pytest.raises(DestinationExists, match=r"was begun otherwise \(scale: 0.5, not 0.18215\)"):
        index.main(conversion(source, cache, **changes, scale=0.5))
    (tmp_path / "train/9.npz").write_bytes(npz(latents=latent(9)))
    with pytest.raises(DestinationExists, match=r"2 units of .* now, and others"):
        index.main(conversion(source, cache, **changes))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    with pytest.raises(DestinationExists, match=r"notes\.txt"):
        index.main(conversion(source, tmp_path / "taken", **changes))
    whole = files(cache)
    in_place = IndexConfig(dataset=str(cache), source=f"{cache}/000000-64x64.tar", text_member="", stored="latents")
    in_place = dataclasses.replace(in_place, moments_member="latents.npy")
    with pytest.raises(DestinationExists, match="nothing to do"):
        index.main(in_place)
    (cache / "manifest.json").unlink()
    with pytest.raises(DestinationExists, match="run the same `latentmill index dest=` again"):
        index.main(in_place)
    (tmp_path / "train/9.npz").unlink()
    index.main(conversion(source, cache, **changes))
    assert files(cache) == whole


def test_a_cache_on_s3_is_converted_from_s3(s3: str, tmp_path: Path) -> None:
    source = open_storage(f"{s3}/train")
    write_images(tmp_path / "train")
    for name, data in files(tmp_path / "train").items():
        source.put(name, data)
    changes: dict[str, Any] = {"stored": "latents", "moments_member": "npz:latents"}
    index.main(conversion(f"{s3}/train/*.npz", f"{s3}/cache", **changes))
    index.main(conversion(f"{tmp_path}/train/*.npz", tmp_path / "cache", **changes))
    ours, theirs = made(f"{s3}/cache")[0], made(tmp_path / "cache")[0]
    assert ours.shards == theirs.shards and ours.units == theirs.units
    assert verify.main(VerifyConfig(dataset=f"{s3}/cache", source=f"{s3}/train/*.npz")) == 0
