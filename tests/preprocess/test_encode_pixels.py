"""`encode stored=pixels`: crops are cached as arrays or PNGs, without an autoencoder and captions or with, with every
proof that a cache of latents has."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.encode import config, files, png, write_tar
from made.forged_cache import forge_records, joined
from made.pixel_cache import KINDS, SIZES, crop, make_source, records
from made.pixel_cache import make_pixels as make
from pipeline.conditions.mask import hide, unpack
from pipeline.config import EncodersConfig, IndexConfig, InpaintTask, ReferenceConfig, VerifyConfig
from pipeline.config.check.verbs import check
from pipeline.config.conditions import ClassesConfig, LabelsConfig, LowresConfig, MaskConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.pixels import png_bytes, png_library
from pipeline.data.format.records import npy_bytes, pack
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.errors import DataError
from pipeline.evaluation.reference import load_reference
from pipeline.inference.requests.inpaint import HIDDEN, InpaintRequests
from pipeline.inference.requests.request import Request
from pipeline.inference.trained import load_encoders
from pipeline.models.encoders.first_stage import Identity
from pipeline.storage.urls import open_storage
from preprocess import encode, index, reference, verify
from preprocess.source import sample


@pytest.fixture
def source(tmp_path: Path) -> str:
    return make_source(tmp_path)


@pytest.fixture
def no_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder or a text tower that is built fails the test."""
    for place in ("preprocess.encode", "pipeline.inference.trained"):
        monkeypatch.setattr(f"{place}.load_text", None)
    for builder in ("_build", "_load_pretrained", "_load_single_file"):
        monkeypatch.setattr(f"pipeline.models.encoders.autoencoder.{builder}", None)


@pytest.mark.usefixtures("no_encoders")
@pytest.mark.parametrize("pixels", KINDS)
def test_crops_are_cached_streamed_and_proved_without_encoders_and_captions(
    pixels: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make(source, tmp_path / "cache", pixels)
    contract = manifest.contract
    assert (contract.stored, contract.pixels, contract.text, contract.caption_key) == ("pixels", pixels, None, "")
    assert (contract.latent_shape, contract.downsampling, contract.scale, contract.shift) == ((3, 24, 24), 1, 1.0, 0.0)
    assert contract.vae_sha256 == Identity.weights_sha256 and contract.encoders["vae"] == "pixels"
    assert contract.versions.get("png") == (png_library() if pixels == "png" else None)
    assert not (tmp_path / "cache" / "uncond.npy").exists()
    for number, record in enumerate(records(tmp_path / "cache")):
        assert (record.members["pixels"] == crop(number).transpose(2, 0, 1)).all(), number
        assert record.meta["key"] == f"{number:05d}"
    storage = open_storage(str(tmp_path / "cache"))
    dataset = dataset_of(storage, manifest)
    with Stream(dataset, dataset.order(0, 4), batch=4, members=("pixels",)) as stream:
        batch = next(stream)
    assert batch.tensors["pixels"].shape == (4, 3, 24, 24)
    for key, array in zip(batch.keys, batch.tensors["pixels"].numpy(), strict=True):
        unit, row = map(int, key.split("_"))
        assert (array == crop(3 * unit + row).transpose(2, 0, 1)).all()
    page = tmp_path / "page.html"
    settings = VerifyConfig(dataset=str(tmp_path / "cache"), source=source, report=str(page))
    assert verify.main(settings) == 0
    assert "6 made again, equal to the bit" in capsys.readouterr().out
    kind = "a lossless PNG of each crop" if pixels == "png" else "an array of each crop"
    assert kind in (tmp_path / "cache" / "card.html").read_text()


def test_statistics_are_of_pixels_from_minus_one_to_one_whatever_they_are_stored_as(
    source: str, tmp_path: Path
) -> None:
    found = [make(source, tmp_path / kind, kind).statistics for kind in KINDS]
    every = np.stack([crop(number) for number in range(len(SIZES))]).reshape(-1, 3) / 127.5 - 1
    np.testing.assert_allclose(found[0].mean, every.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found[0].std, every.std(axis=0), atol=1e-12)
    assert found[0] == found[1]


@pytest.mark.parametrize("pixels", KINDS)
def test_flipped_records_hold_mirrored_pixels_and_a_rerun_and_more_workers_change_nothing(
    pixels: str, source: str, tmp_path: Path
) -> None:
    make(source, tmp_path / "cache", pixels, flip=True)
    found = records(tmp_path / "cache")
    assert len(found) == 2 * len(SIZES)
    for one, mirrored in zip(found[::2], found[1::2], strict=True):
        assert mirrored.meta["flipped"]
        assert (mirrored.members["pixels"] == one.members["pixels"][..., ::-1]).all()
        assert not (mirrored.members["pixels"] == one.members["pixels"]).all()
    held = files(tmp_path / "cache")
    make(source, tmp_path / "cache", pixels, flip=True)
    assert files(tmp_path / "cache") == held
    make(source, tmp_path / "again", pixels, flip=True, decode_in="processes", workers=1)
    assert files(tmp_path / "again") == held
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "cache"), source=source)) == 0


def test_pngs_take_less_where_pictures_are_not_noise(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    out = io.BytesIO()
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3))).save(out, "PNG")
    write_tar(tmp_path / "in" / "0.tar", [("a.png", out.getvalue())])
    sizes = []
    for kind in KINDS:
        make(str(tmp_path / "in" / "*.tar"), tmp_path / kind, kind, resolution=(64,))
        report = json.loads((tmp_path / kind / "units" / "000000.json").read_bytes())
        sizes.append(report["member_bytes"]["pixels"])
    assert sizes[0] == 3 * 64 * 64 + 128 and sizes[1] < sizes[0] / 10


@pytest.mark.parametrize("pixels", KINDS)
def test_verify_finds_pixels_that_are_not_their_sources(
    pixels: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sample.cut

    def brighter(*given: Any) -> np.ndarray:
        wrong = np.array(real(*given))
        wrong[0, 0, 0] ^= 1
        return wrong

    with monkeypatch.context() as patch:
        patch.setattr(sample, "cut", brighter)
        make(source, tmp_path / "cache", pixels)
    with pytest.raises(DataError, match=r"pixels of 000000_000000 are not those of its source's crop"):
        verify.main(VerifyConfig(dataset=str(tmp_path / "cache"), source=source))


def test_verify_finds_a_png_that_cannot_be_decoded(source: str, tmp_path: Path) -> None:
    """Its hashes are right: somebody wrote it so."""
    dest = tmp_path / "cache"
    make(source, dest, "png")
    forged = []
    for number, record in enumerate(records(dest)[:3]):
        good = npy_bytes(png_bytes(crop(number)))
        bad = npy_bytes(np.frombuffer(png(SIZES[0], 0)[:-9], np.uint8))
        packed = pack(dataclasses.replace(record, members={}))
        name = f"{record.key}.pixels.npy"
        forged.append(joined([*packed, (name, bad if number == 1 else good)]))
    forge_records(dest, forged)
    with pytest.raises(DataError, match=r"record 000000_000001: its PNG is cut"):
        verify.main(VerifyConfig(dataset=str(dest), source=source, samples=0))


def test_captions_are_stored_where_their_key_is_given(source: str, tmp_path: Path) -> None:
    manifest = make(source, tmp_path / "cache", "png", caption_key=("txt",), text_storage="tokens")
    contract = manifest.contract
    assert contract.text is not None and (contract.text.storage, contract.caption_key) == ("tokens", "txt")
    first = records(tmp_path / "cache")[0]
    assert first.meta["caption"] == "picture number 0" and first.members["tokens"].dtype == np.int32
    stage, tower = load_encoders(contract, "cpu", EncodersConfig(seed=1, vae="demo", vae_dtype="bfloat16"))
    assert isinstance(stage, Identity) and tower is not None
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "cache"), source=source)) == 0


@pytest.mark.parametrize("pixels", KINDS)
def test_conditions_lie_beside_pixels_and_are_proved(pixels: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    members = []
    for number in range(3):
        labels = io.BytesIO()
        Image.fromarray(np.full((24, 24), number, np.uint8)).save(labels, "PNG")
        members += [(f"{number}.png", png((24, 24), number)), (f"{number}.cls", b"%d" % number)]
        members += [(f"{number}.labels.png", labels.getvalue())]
    write_tar(tmp_path / "in" / "0.tar", members)
    source = str(tmp_path / "in" / "*.tar")
    manifest = make(
        source,
        tmp_path / "cache",
        pixels,
        conditions=("class", "labels", "lowres", "mask"),
        classes=ClassesConfig(count=3),
        labels=LabelsConfig(count=3, grid=1),
        lowres=LowresConfig(factor=4),
        mask=MaskConfig(kinds=("rectangles",), variants=2),
    )
    shapes = {member.name: member.shape for member in manifest.contract.members}
    assert shapes["cond.masked"] == (2, 3, 24, 24) and shapes["cond.labels"] == (24, 24)
    for number, record in enumerate(records(tmp_path / "cache")):
        members_ = record.members
        assert int(members_["cond.class"]) == number and (members_["cond.labels"] == number).all()
        image = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        masks = unpack(members_["cond.mask"], 24)
        hidden = np.stack([hide(image, mask, "grey") for mask in masks]).transpose(0, 3, 1, 2)
        assert (members_["cond.masked"] == hidden.astype(np.float16)).all()
        asked = Request(label="", size=(24, 24), members={HIDDEN: hidden[0].transpose(1, 2, 0)})
        given = InpaintRequests(InpaintTask(), manifest.contract, 1).encoded(asked, Identity())
        assert (given.members["cond.masked"] == members_["cond.masked"][0]).all()
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "cache"), source=source)) == 0


@pytest.mark.parametrize("pixels", KINDS)
def test_a_cache_of_pixels_gets_its_indexes_and_manifest_back_to_the_byte(
    pixels: str, source: str, tmp_path: Path
) -> None:
    dest = tmp_path / "cache"
    manifest = make(source, dest, pixels, resolution=(24,), buckets=8)
    assert len(manifest.contract.buckets) > 1
    before = files(dest)
    lost = [name for name in before if name.endswith(".index.json") or name == "manifest.json" or "units/" in name]
    for name in lost:
        (dest / name).unlink()
    settings = IndexConfig(dataset=str(dest), source=f"{dest}/*.tar")
    assert index.main(settings) == 0
    assert files(dest) == {name: data for name, data in before.items() if "units/" not in name}
    for name in (*(name for name in lost if "units/" not in name), "manifests/000001.json"):
        (dest / name).unlink()
    assert index.main(settings) == 0  # without any copy: what the tars and contract.json say
    again = load_manifest(open_storage(str(dest)))
    assert (again.contract, again.samples) == (manifest.contract, len(SIZES))
    assert [shard.size for shard in again.shards] == [shard.size for shard in manifest.shards]
    assert again.statistics.mean == pytest.approx(manifest.statistics.mean)
    assert again.statistics.std == pytest.approx(manifest.statistics.std)
    assert verify.main(VerifyConfig(dataset=str(dest))) == 0


def test_a_references_floors_of_pixels_are_those_of_real_images(source: str, tmp_path: Path) -> None:
    """Nothing is lost, so reconstructions are no further away than the images are."""
    make(source, tmp_path / "cache", "png")
    dest = str(tmp_path / "reference.safetensors")
    assert reference.main(ReferenceConfig(dataset=str(tmp_path / "cache"), source=source, dest=dest)) == 0
    floors = load_reference(dest).facts.floors["3"]
    assert floors["real"] == floors["reconstruction"]


def test_any_resolution_is_cached_and_small_pictures_are_enlarged_to_cover_it(source: str, tmp_path: Path) -> None:
    settings = config(source, tmp_path / "cache", stored="pixels", resolution=(5, 33))
    check(settings)
    assert encode.main(settings) == 0
    for side in (5, 33):
        for number, record in enumerate(records(tmp_path / "cache" / str(side))):
            assert (record.members["pixels"] == crop(number, side).transpose(2, 0, 1)).all()
    small = records(tmp_path / "cache" / "33")[4]
    assert (small.meta["width"], small.meta["height"], small.meta["resized"]) == (16, 16, [33, 33])


def test_a_picture_of_two_channels_lies_over_white(tmp_path: Path) -> None:
    """Grey and alpha, as in the source of every cache."""
    (tmp_path / "in").mkdir()
    out = io.BytesIO()
    grey = np.zeros((24, 24, 2), np.uint8)
    grey[:, 12:, 1] = 255
    Image.fromarray(grey, "LA").save(out, "PNG")
    write_tar(tmp_path / "in" / "0.tar", [("a.png", out.getvalue())])
    make(str(tmp_path / "in" / "*.tar"), tmp_path / "cache")
    pixels = records(tmp_path / "cache")[0].members["pixels"]
    assert (pixels[:, :, :12] == 255).all() and (pixels[:, :, 12:] == 0).all()


@pytest.mark.parametrize("pixels", KINDS)
def test_a_dry_run_says_what_pixels_take_and_writes_nothing(
    pixels: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(source, tmp_path / "cache", stored="pixels", pixels=pixels, resolution=(24,), dry_run=True)
    check(settings)
    assert encode.main(settings) == 0
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if line.startswith("* none")]
    bytes_ = int(line.split()[2].replace(",", ""))
    assert 2000 < bytes_ < 4000, told
    assert not (tmp_path / "cache").exists()
