"""`latentmill index dest=`: latents of other software become a cache with the same values, bytes that do not depend on
threads or kills, and a proof against what was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made.encode import ENCODERS, files
from made.latents import CAPTIONS, bits, latent, logvar, ndarray, npy, npz, tensors, write_mds, write_records
from pipeline.config import IndexConfig, VerifyConfig
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import Record, npy_bytes
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.shards import first_records
from pipeline.data.reading.stream import Stream
from pipeline.errors import DataError, DestinationExists, SourceError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.latents import Latents
from pipeline.models.encoders.text import load_text
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import index, reference, verify

COUNT = 5
LENGTH, WIDTH = 3, 8


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def config(source: str, dest: Path | str, **changes: Any) -> IndexConfig:
    return IndexConfig(**{"source": source, "dest": str(dest), "text_member": "", **changes})


def made(dest: Path | str) -> tuple[Manifest, list[Record]]:
    """The manifest, and all records in order."""
    storage = open_storage(str(dest))
    manifest = load_manifest(storage)
    return manifest, list(first_records(storage, manifest, 10**6))


def half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16)


def caption(text: str) -> bytes:
    return json.dumps({"caption": text}).encode()


def mean(row: int) -> np.ndarray:
    return latent(row)


MOMENTS = [np.concatenate([mean(row), logvar(row)]) for row in range(COUNT)]
AS_BITS = (np.uint32(1) * bits(mean(0))).astype(np.uint32)  # what `bits` keeps, as float32 again


def widened(array: np.ndarray) -> np.ndarray:
    """What is left of float32 values in bfloat16."""
    return (bits(array).astype(np.uint32) << 16).view(np.float32)


SOURCES: dict[str, tuple[list[dict[str, bytes]], dict[str, Any], list[np.ndarray]]] = {
    "one npy": ([{"moments.npy": npy(one)} for one in MOMENTS], {}, MOMENTS),
    "mean and log-variance": (
        [{"mean.npy": npy(mean(row)), "lv.npy": npy(logvar(row))} for row in range(COUNT)],
        {"moments_member": "mean.npy", "logvar_member": "lv.npy"},
        MOMENTS,
    ),
    "bfloat16 as uint16": (
        [{"latent.npy": npy(bits(one))} for one in MOMENTS],
        {"moments_member": "latent.npy:bfloat16"},
        [widened(one) for one in MOMENTS],
    ),
    "npz": (
        [{"npz": npz(mean=mean(row), lv=logvar(row))} for row in range(COUNT)],
        {"moments_member": "npz:mean", "logvar_member": "npz:lv"},
        MOMENTS,
    ),
    "compressed npz of a batch of one": (
        [{"z.npz": npz(True, m=one[None].astype(np.float64))} for one in MOMENTS],
        {"moments_member": "z.npz:m"},
        MOMENTS,
    ),
    "safetensors": (
        [{"safetensors": tensors(mean=mean(row), lv=half(logvar(row)))} for row in range(COUNT)],
        {"moments_member": "safetensors:mean", "logvar_member": "safetensors:lv"},
        MOMENTS,
    ),
    "in Fortran order": ([{"moments.npy": npy(np.asfortranarray(one))} for one in MOMENTS], {}, MOMENTS),
}


@pytest.mark.parametrize("name", SOURCES)
def test_arrays_of_every_kind_of_file_are_stored_as_they_are_to_float16(tmp_path: Path, name: str) -> None:
    records, changes, wanted = SOURCES[name]
    source = write_records(tmp_path / "theirs", records, tars=2)
    before = files(source)
    assert index.main(config(f"{source}/*.tar", tmp_path / "cache", **changes)) == 0
    assert files(source) == before
    manifest, found = made(tmp_path / "cache")
    assert [record.meta["key"] for record in found] == ["0_0", "0_1", "0_2", "1_0", "1_1"]
    for record, array in zip(found, wanted, strict=True):
        assert record.members["moments"].dtype == np.float16
        assert (record.members["moments"] == half(array)).all()
    assert [unit.source for unit in manifest.units] == ["0.tar", "1.tar"]
    assert not manifest.adopted and manifest.contract.converted is not None
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "cache"), source=f"{source}/*.tar")) == 0


def test_bfloat16_of_safetensors_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import save

    moments = [torch.from_numpy(one).to(torch.bfloat16) for one in MOMENTS]
    records = [{"safetensors": save({"m": one})} for one in moments]
    write_records(tmp_path / "theirs", records)
    index.main(config(f"{tmp_path}/theirs/*.tar", tmp_path / "cache", moments_member="safetensors:m"))
    for record, one in zip(made(tmp_path / "cache")[1], moments, strict=True):
        assert (torch.from_numpy(record.members["moments"].copy()) == one.to(torch.float16)).all()


def test_states_captions_classes_and_boxes_are_converted_and_streamed(tmp_path: Path) -> None:
    boxes = np.array([[1, 0.25, 0.25, 0.5, 0.75], [-1] * 5], np.float32)
    states = [np.random.default_rng(row).standard_normal((1, LENGTH, WIDTH)).astype(np.float32) for row in range(COUNT)]
    records = [
        {
            "npz": npz(m=MOMENTS[row], t=states[row], c=np.array([row % 3]), b=boxes),
            "txt": f"  {CAPTIONS[row]}\n".encode(),
        }
        for row in range(COUNT)
    ]
    write_records(tmp_path / "theirs", records)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "uncond.npy").write_bytes(npy_bytes(np.zeros((LENGTH, WIDTH), np.float16)))
    changes = {"text_member": "npz:t", "caption_key": "txt", "class_member": "npz:c", "classes": 3}
    changes |= {"boxes_member": "npz:b", "box_classes": 2}
    assert index.main(config(f"{tmp_path}/theirs/*.tar", cache, moments_member="npz:m", **changes)) == 0
    manifest, found = made(cache)
    names = tuple(member.name for member in manifest.contract.members)
    with Stream(dataset_of(open_storage(str(cache)), manifest), dataset_of(open_storage(str(cache)), manifest).order(3, 1), batch=1, members=names) as stream:
        seen = {}
        for _ in range(COUNT):
            batch = next(stream)
            seen[batch.captions[0]] = {name: tensor[0].numpy() for name, tensor in batch.tensors.items()}
    for row in range(COUNT):
        one = seen[CAPTIONS[row]]
        assert (one["moments"] == half(MOMENTS[row])).all() and (one["text"] == half(states[row][0])).all()
        assert int(one["cond.class"]) == row % 3 and (one["cond.boxes"] == half(boxes)).all()
    assert [record.meta["caption"] for record in found] == list(CAPTIONS)
    assert verify.main(VerifyConfig(dataset=str(cache), source=f"{tmp_path}/theirs/*.tar")) == 0


# --------------------------------------------------------------------------------------------------------------------
# MDS and files by themselves


def write_shards(folder: Path) -> Path:
    """Two shards of latents as raw bytes, states as `ndarray`, captions, and a class; scaled by 0.18215."""
    columns = {"caption": "str", "latents": "bytes", "states": "ndarray", "class": "int", "z": "ndarray:float32:4,8,8"}
    samples = [
        {
            "caption": CAPTIONS[row].encode(),
            "latents": half(mean(row) * 0.18215).tobytes(),
            "states": ndarray(np.full((LENGTH, WIDTH), row, np.float32)),
            "class": np.int64(row % 3).tobytes(),
            "z": mean(row).tobytes(),
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
    assert index.main(config(source, cache, **changes)) == 0
    manifest, found = made(cache)
    assert [unit.source for unit in manifest.units] == ["shard.00000.mds", "shard.00001.mds"]
    for row, record in enumerate(found):
        np.testing.assert_allclose(record.members["latents"], mean(row), atol=0.01)
        assert (record.members["text"] == row).all() and record.meta["caption"] == CAPTIONS[row]
        assert int(record.members["cond.class"]) == row % 3
    np.testing.assert_allclose(manifest.statistics.std, 1, atol=0.15)
    assert verify.main(VerifyConfig(dataset=str(cache), source=source)) == 0
    assert index.main(config(source, tmp_path / "z", stored="latents", moments_member="z")) == 0
    for row, record in enumerate(made(tmp_path / "z")[1]):
        assert (record.members["latents"] == half(mean(row))).all()


def write_images(folder: Path) -> list[tuple[str, tuple[int, int]]]:
    """Files as sd-scripts writes them: .npz beside captions, in two sizes of latents. Names and (height, width)."""
    folder.mkdir(parents=True)
    listed = []
    for row in range(COUNT):
        height, width = [(8, 8), (6, 10)][row % 2]
        name = [f"{row}_{8 * width:04d}x{8 * height:04d}_sd", f"{row}"][row == 4]
        array = f"latents_{height}x{width}" if row == 2 else "latents"
        facts = {array: latent(row, height, width), "original_size": np.array([640, 480])}
        (folder / f"{name}.npz").write_bytes(npz(**facts, crop_ltrb=np.array([0, 0, 640, 480])))
        (folder / f"{row}.txt").write_text(CAPTIONS[row])
        listed.append((str(row), (height, width)))
    (folder / "0_te_outputs.npz").write_bytes(npz(hidden_state1=np.zeros((2, 3), np.float32)))
    return listed


TOKENS: dict[str, Any] = {"stored": "latents", "moments_member": "npz:latents", "encoders": ENCODERS}
TOKENS |= {"text_storage": "tokens", "caption_key": "txt"}


def test_npz_beside_captions_become_token_ids_and_a_tar_for_each_size(tmp_path: Path) -> None:
    listed = write_images(tmp_path / "train")
    cache, source = tmp_path / "cache", f"{tmp_path}/train/*.npz"
    assert index.main(config(source, cache, unit_size=3, **TOKENS)) == 0
    manifest, found = made(cache)
    contract, tower = manifest.contract, load_text(ENCODERS)
    assert [unit.source for unit in manifest.units] == ["0_0064x0064_sd.npz..2_0064x0064_sd.npz", "3_0080x0048_sd.npz..4.npz"]
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
        reference.main(reference.ReferenceConfig(dataset=str(cache)))


# --------------------------------------------------------------------------------------------------------------------
# Bytes, kills and proofs


def test_bytes_are_the_same_for_one_thread_and_four_and_after_any_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "train")
    one, source = tmp_path / "one", f"{tmp_path}/train/*.npz"
    changes = {"stored": "latents", "moments_member": "npz:latents", "unit_size": 2}
    monkeypatch.setattr("preprocess.adopting.conversion.cores", lambda: 1)
    index.main(config(source, one, **changes))
    whole = files(one)
    monkeypatch.setattr("preprocess.adopting.conversion.cores", lambda: 4)
    index.main(config(source, tmp_path / "four", **changes))
    assert files(tmp_path / "four") == whole
    assert index.main(config(source, one, **changes)) == 0
    assert files(one) == whole
    writes = len(whole)
    for kill_at in range(writes):
        dest, done = tmp_path / f"killed-{kill_at}", [0]
        killing(monkeypatch, done, kill_at)
        with pytest.raises(Killed):
            index.main(config(source, dest, **changes))
        assert not (dest / "manifest.json").exists()
        monkeypatch.undo()
        assert index.main(config(source, dest, **changes)) == 0
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
    records, changes, _ = SOURCES["npz"]
    source, cache = write_records(tmp_path / "theirs", records, tars=2), tmp_path / "cache"
    index.main(config(f"{source}/*.tar", cache, **changes))
    tar = (source / "1.tar").read_bytes()
    other = bytearray(tar)
    other[-1024 - 512 * 3] ^= 1
    (source / "1.tar").write_bytes(other)
    with pytest.raises(DataError, match=r"1\.tar is not what was converted: its SHA-256 differs"):
        verify.main(VerifyConfig(dataset=str(cache), source=f"{source}/*.tar"))
    (source / "1.tar").write_bytes(tar)
    (source / "2.tar").write_bytes(tar)
    with pytest.raises(SourceError, match="is not what .* was converted from"):
        verify.main(VerifyConfig(dataset=str(cache), source=f"{source}/*.tar"))
    (source / "2.tar").unlink()
    held = files(cache)
    damaged = bytearray(held["000001-64x64.tar"])
    damaged[700] ^= 1
    (cache / "000001-64x64.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"Delete units/000001\.json and run its `latentmill index` again"):
        verify.main(VerifyConfig(dataset=str(cache)))
    (cache / "units/000001.json").unlink()
    index.main(config(f"{source}/*.tar", cache, **changes))
    assert files(cache) == held


def test_a_cache_goes_on_with_the_same_settings_and_source_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    cache, source = tmp_path / "cache", f"{tmp_path}/train/*.npz"
    changes: dict[str, Any] = {"stored": "latents", "moments_member": "npz:latents", "unit_size": 2}
    index.main(config(source, cache, **changes))
    with pytest.raises(DestinationExists, match=r"was begun otherwise \(scale: 0.5, not 0.18215\)"):
        index.main(config(source, cache, **changes, scale=0.5))
    (tmp_path / "train/9.npz").write_bytes(npz(latents=latent(9)))
    with pytest.raises(DestinationExists, match="3 units of .* now, and others"):
        index.main(config(source, cache, **changes))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    with pytest.raises(DestinationExists, match=r"notes\.txt"):
        index.main(config(source, tmp_path / "taken", **changes))
    with pytest.raises(DestinationExists, match="nothing to do"):
        index.main(IndexConfig(dataset=str(cache), source=f"{cache}/*.tar", text_member=""))


def test_a_cache_on_s3_is_converted_from_s3(s3: str, tmp_path: Path) -> None:
    source = open_storage(f"{s3}/train")
    write_images(tmp_path / "train")
    for name, data in files(tmp_path / "train").items():
        source.put(name, data)
    changes: dict[str, Any] = {"stored": "latents", "moments_member": "npz:latents"}
    index.main(config(f"{s3}/train/*.npz", f"{s3}/cache", **changes))
    index.main(config(f"{tmp_path}/train/*.npz", tmp_path / "cache", **changes))
    ours, theirs = made(f"{s3}/cache")[0], made(tmp_path / "cache")[0]
    assert ours.shards == theirs.shards and ours.units == theirs.units
    assert verify.main(VerifyConfig(dataset=f"{s3}/cache", source=f"{s3}/train/*.npz")) == 0


# --------------------------------------------------------------------------------------------------------------------
# What is said


@pytest.mark.parametrize(
    ("factor", "changes", "words"),
    [
        (1, {}, ""),
        (0.18215, {}, "scaled already: then give scale=1 shift=0, or convert them with dest= and scaled=true"),
        (0.18215, {"scaled": True}, ""),
        (1, {"scaled": True}, "as of latents that were not scaled: then leave scaled= out"),
        (1, {"scale": 1.0}, "unscaled latents of Stable Diffusion 1 and 2 are like this"),
        (0.18215 / 0.13025, {"scale": 1.0}, "unscaled latents of SDXL are like this"),
        (100, {}, ": scale=0.0018"),
    ],
)
def test_scaled_latents_are_known_by_their_deviation_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, changes: dict[str, Any], words: str
) -> None:
    write_records(tmp_path / "theirs", [{"moments.npy": npy(mean(row) * np.float32(factor))} for row in range(COUNT)])
    index.main(config(f"{tmp_path}/theirs/*.tar", tmp_path / "cache", stored="latents", **changes))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (3 if words else 2)
    assert "converted from 1 tars" in said[0] and words in said[-1]
