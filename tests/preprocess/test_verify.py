"""preprocess/verify.py: a good cache passes; each way of being wrong fails and is named."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import EncodeConfig, EncodersConfig, LaunchConfig, VerifyConfig
from pipeline.data.format.contract import canonical_json
from pipeline.data.format.manifest import MANIFEST, Manifest, load_manifest, manifest_bytes
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import read
from pipeline.errors import ContractMismatch, DataError, DatasetError, ShardCorrupt, SourceError
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from preprocess import encode
from preprocess.encoding import encoder
from preprocess.encoding.writer import ShardWriter
from preprocess.proving.against_source import spread
from preprocess.reference import real_images
from preprocess.shapes.shards import write_shards
from preprocess.verify import main

ENCODERS = EncodersConfig(seed=1)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    write_shards(str(folder), 20, 0, "train", shard_size=10)
    return f"{folder}/{{00000..00001}}.tar"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One shard of six images, for ways to be wrong that befall every image."""
    folder = tmp_path_factory.mktemp("few")
    write_shards(str(folder), 6, 0, "train", shard_size=6)
    return f"{folder}/00000.tar"


def make(shapes: str, dest: Path, **changes: Any) -> None:
    fields: dict[str, Any] = {"encoders": ENCODERS, "batch": 8, "decode_in": "threads"}
    fields["launch"] = LaunchConfig(threads=1)
    encode.main(EncodeConfig(source=shapes, dest=str(dest), **{**fields, **changes}))


def verify(dest: Path, shapes: str, **changes: Any) -> int:
    # Random encoders decode to nothing like the image: only the moments can be judged with them.
    fields: dict[str, Any] = {"samples": 12, "min_psnr": 0.0}
    return main(VerifyConfig(dataset=str(dest), source=shapes, **{**fields, **changes}))


def forge(dest: Path, change: Callable[[Record], Record], manifest_changes: dict[str, Any] | None = None) -> None:
    """Rewrites the first shard record by record, with an index and manifest whose hashes agree with it."""
    storage = open_storage(str(dest))
    manifest = load_manifest(storage)
    entry = manifest.shards[0]
    tar = io.BytesIO()
    writer = ShardWriter(tar)
    for record in read(storage, manifest, 0, range(entry.samples)):
        writer.add(change(record))
    facts = writer.finish()
    index = canonical_json(facts)
    (dest / entry.name).write_bytes(tar.getvalue())
    (dest / entry.index_name).write_bytes(index)
    entry = dataclasses.replace(
        entry, bytes=facts["bytes"], sha256=facts["sha256"], index_sha256=hashlib.sha256(index).hexdigest()
    )
    write_manifest(
        dest, dataclasses.replace(manifest, shards=(entry, *manifest.shards[1:]), **(manifest_changes or {}))
    )


def write_manifest(dest: Path, manifest: Manifest) -> None:
    (dest / MANIFEST).write_bytes(manifest_bytes(manifest))


def edited(record: Record, meta: dict[str, Any] | None = None, **members: np.ndarray) -> Record:
    return Record(record.key, {**record.members, **members}, {**record.meta, **(meta or {})})


@pytest.fixture(scope="module")
def good(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("good") / "c"
    make(shapes, dest)
    return dest


@pytest.fixture
def cache(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "c"))


def test_a_good_cache_passes_and_says_what_was_checked(
    cache: Path, shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(cache, shapes, report=str(tmp_path / "page.html")) == 0
    said = capsys.readouterr().out
    assert "2 tars and indexes" in said
    assert "20 records = 20 read - 0 rejected" in said
    assert "12 decoded" in said
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 12
    assert "http" not in page


def test_the_shipped_encoders_reconstruct_the_shapes(shapes: str, tmp_path: Path) -> None:
    make(shapes, tmp_path / "c", encoders=EncodersConfig())
    assert verify(tmp_path / "c", shapes, min_psnr=24.0) == 0
    with pytest.raises(DataError, match="min_psnr=60"):
        verify(tmp_path / "c", shapes, min_psnr=60.0)


def test_without_its_source_a_cache_is_checked_by_itself(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(VerifyConfig(dataset=str(cache))) == 0
    assert "not compared, for it is not here" in capsys.readouterr().out


def test_a_flipped_bit_and_a_swapped_shard_are_found(cache: Path, shapes: str) -> None:
    whole = (cache / "000001.tar").read_bytes()
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    for bad in (bytes(flipped), whole[:-512], (cache / "000000.tar").read_bytes()):
        (cache / "000001.tar").write_bytes(bad)
        with pytest.raises((DataError, DatasetError), match=r"000001\.tar"):
            verify(cache, shapes)


def test_missing_files_are_found(cache: Path, shapes: str) -> None:
    data = (cache / "uncond.npy").read_bytes()
    (cache / "uncond.npy").write_bytes(data[:-2] + b"xx")
    with pytest.raises(DataError, match="uncond"):
        verify(cache, shapes)
    (cache / "000001.index.json").unlink()
    with pytest.raises(DatasetError, match=r"000001\.index\.json"):
        verify(cache, shapes)


def test_counts_that_do_not_add_up_are_found(cache: Path, shapes: str) -> None:
    manifest = load_manifest(open_storage(str(cache)))
    entry = dataclasses.replace(manifest.units[1], read=11)
    write_manifest(cache, dataclasses.replace(manifest, units=(manifest.units[0], entry)))
    with pytest.raises(DataError, match="11 read is not 10 accepted"):
        verify(cache, shapes)


def _nan(record: Record) -> Record:
    moments = record.members["moments"].copy()
    moments[0, 0, 0] = np.nan
    return edited(record, moments=moments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_nan, "NaN"),
        (lambda r: edited(r, text=r.members["text"][:-1]), "text is not float16"),
        (lambda r: edited(r, moments=r.members["moments"].astype(np.float32)), "moments is not float16"),
        (lambda r: edited(r, extra=np.zeros(1, np.uint8)), "does not name"),
        (lambda r: edited(r, meta={"caption": ""}), "has no caption"),
        (lambda r: Record("000005_000000", r.members, r.meta), "is not what its index says"),
    ],
)
def test_records_that_break_the_contract_are_found(
    cache: Path, shapes: str, change: Callable[[Record], Record], said: str
) -> None:
    forge(cache, lambda record: change(record) if record.key.endswith("4") else record)
    with pytest.raises(DataError, match=said):
        verify(cache, shapes)


def test_statistics_that_are_not_the_latents_are_found(cache: Path, shapes: str) -> None:
    forge(cache, lambda record: edited(record, moments=(record.members["moments"] * np.float16(1.1))))
    with pytest.raises(DataError, match="the manifest says"):
        verify(cache, shapes)


# Ways in which published pipelines went wrong, with every hash and statistic in order: only the source shows them.


def test_captions_of_other_samples_are_found(cache: Path, shapes: str) -> None:
    forge(cache, lambda record: edited(record, meta={"caption": "a small blue cross"}))
    with pytest.raises(DataError, match="is not its source's"):
        verify(cache, shapes)


def test_text_states_of_other_captions_are_found(cache: Path, shapes: str) -> None:
    forge(cache, lambda record: edited(record, text=np.roll(record.members["text"], 1, axis=0)))
    with pytest.raises(DataError, match="text states differ"):
        verify(cache, shapes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pixels: pixels.permute(0, 3, 1, 2).float() / 255,
        lambda pixels: pixels.flip(3).permute(0, 3, 1, 2).float() / 127.5 - 1,
        lambda pixels: pixels.roll(8, 1).permute(0, 3, 1, 2).float() / 127.5 - 1,
        lambda pixels: pixels.flip(2).permute(0, 3, 1, 2).float() / 127.5 - 1,
    ],
    ids=["range 0 to 1", "channels swapped", "crop off by 8", "mirrored"],
)
def test_pixels_that_were_encoded_wrongly_are_found(
    few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    monkeypatch.setattr(encoder, "to_unit_range", wrong)
    make(few, tmp_path / "c", encoders=EncodersConfig())
    monkeypatch.undo()
    with pytest.raises(DataError, match="latents differ by up to"):
        verify(tmp_path / "c", few, samples=6)


def test_a_scale_applied_twice_is_found(few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.models.encoders.first_stage import NetworkStage

    real = NetworkStage.encode
    monkeypatch.setattr(NetworkStage, "encode", lambda self, x: real(self, x) * self.scale)
    make(few, tmp_path / "c", encoders=EncodersConfig())
    monkeypatch.undo()
    with pytest.raises(DataError, match="latents differ by up to"):
        verify(tmp_path / "c", few, samples=6)


def test_another_source_is_refused(cache: Path, shapes: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not what"):
        verify(cache, shapes.replace("{00000..00001}", "00000"))
    write_shards(str(tmp_path / "other"), 20, 7, "train", shard_size=10)
    with pytest.raises(DataError, match=r"is not the shard that was encoded|is not its source's"):
        verify(cache, str(tmp_path / "other/{00000..00001}.tar"))


def test_records_are_chosen_evenly() -> None:
    assert spread(10, 3) == [0, 4, 9]
    assert spread(2, 5) == [0, 1]
    assert spread(0, 5) == []


@pytest.mark.parametrize(
    ("fact", "said"),
    [({"scale": 1.0}, "latent scale"), ({"shift": 0.5}, "latent shift"), ({"vae_sha256": "0" * 64}, "autoencoder")],
)
def test_a_contract_that_is_not_its_encoders_is_refused(
    cache: Path, shapes: str, fact: dict[str, Any], said: str
) -> None:
    manifest = load_manifest(open_storage(str(cache)))
    scale, shift = manifest.contract.scale, manifest.contract.shift
    contract = dataclasses.replace(manifest.contract, **fact)
    raw = np.array(manifest.statistics.mean) / scale + shift
    changed = dataclasses.replace(
        manifest.statistics,
        mean=tuple(((raw - contract.shift) * contract.scale).tolist()),
        std=tuple((np.array(manifest.statistics.std) / scale * contract.scale).tolist()),
    )
    write_manifest(cache, dataclasses.replace(manifest, contract=contract, statistics=changed))
    with pytest.raises(DatasetError, match=said):
        verify(cache, shapes)


def test_images_that_the_encoders_cannot_show_are_told_from_a_damaged_cache(good: Path, shapes: str) -> None:
    with pytest.raises(DataError, match=r"is what its manifest promises, but .* below min_psnr=20"):
        verify(good, shapes, min_psnr=20.0)  # its encoders have random weights


# A cache may be a stranger's: what its json and its manifest say is checked before it is used.


@pytest.mark.parametrize("key", [None, ["a"], 5, {"a": 1}])
def test_a_record_that_names_no_sample_of_the_source_ends_in_a_line(cache: Path, shapes: str, key: Any) -> None:
    forge(cache, lambda record: edited(record, meta={"key": key}))
    with pytest.raises(ShardCorrupt, match="does not say which sample of the source it is of"):
        verify(cache, shapes)
    with pytest.raises(ShardCorrupt, match="does not say which sample of the source it is of"):
        next(real_images(open_storage(str(cache)), load_manifest(open_storage(str(cache))), shapes, 4))


@pytest.mark.parametrize(
    "meta",
    [
        {"resized": [60_000, 60_000]},
        {"resized": [64, 10**12]},
        {"resized": "64x64"},
        {"resized": None},
        {"crop": [0, 0, 60_000, 60_000]},
        {"crop": [-8, 0, 64, 64]},
        {"crop": [8, 0, 64, 64]},
        {"crop": [0, 0, 32, 32]},
        {"width": 10**9},
        {"width": 32, "height": 32},
        {"width": "64"},
    ],
    ids=str,
)
def test_a_crop_that_cannot_be_of_its_image_is_refused_before_it_is_made(
    cache: Path, shapes: str, meta: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(cache, lambda record: edited(record, meta=meta))
    monkeypatch.setattr("preprocess.reference.crop_image", lambda *_: pytest.fail("a crop was made"))
    storage = open_storage(str(cache))
    with pytest.raises(ContractMismatch, match=r"00000\.tar, sample .*000000\.tar was made from"):
        next(real_images(storage, load_manifest(storage), shapes, 4))


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..3000000000}.tar",
        "{0..9}{0..9}{0..9}{0..9}.tar",
        "{a,{b,{c,d}}}.tar",
        "/**/*",
        "**/*.tar",
        "/etc/*.tar",
        "~/x/*.tar",
        "../*.tar",
        "{..,x}/*.tar",
        "s3://somebody/else/*.tar",
        "s3://{a,b}/*.tar",
        "https://x/y.tar",
    ],
)
def test_a_strangers_source_pattern_leads_to_no_other_place_unasked(
    cache: Path, pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is looked into by the names of the shards; nothing is listed or expanded."""
    write_manifest(cache, dataclasses.replace(load_manifest(open_storage(str(cache))), sources=(pattern,)))
    opened: list[str] = []
    monkeypatch.chdir(cache)

    def opening(url: str) -> Storage:
        opened.append(url)
        return open_storage(url)

    monkeypatch.setattr("preprocess.units.sources.open_storage", opening)
    assert main(VerifyConfig(dataset=str(cache))) == 0
    assert "not compared, for it is not here" in capsys.readouterr().out
    storage = open_storage(str(cache))
    with pytest.raises(SourceError):
        next(real_images(storage, load_manifest(storage), "", 4))
    assert all("://" not in url and url[:1] not in "/~" and ".." not in url.split("/") for url in opened)


def test_a_dataset_without_records_is_no_good_one(cache: Path) -> None:
    manifest = load_manifest(open_storage(str(cache)))
    write_manifest(cache, dataclasses.replace(manifest, shards=(), units=()))
    with pytest.raises(DataError, match="holds no record"):
        main(VerifyConfig(dataset=str(cache)))
