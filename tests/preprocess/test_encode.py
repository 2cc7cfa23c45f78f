"""preprocess/encode.py: what is read is accepted or counted, and the same bytes come out whatever happens (invariants
2-4).

Encoders have the shipped architecture with random weights, and shards a few images each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from made.encode import ENCODERS, config, files, png, write_tar
from pipeline.conditions.lowres import lowres
from pipeline.conditions.mask import masks, unpack
from pipeline.config import EncodersConfig, LaunchConfig
from pipeline.config.conditions import BoxesConfig, LabelsConfig
from pipeline.data.format.manifest import MANIFEST, load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import DestinationExists, NonFinite, ShardCorrupt, SourceError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.encoders.text import load_text
from pipeline.storage.urls import open_storage
from preprocess.encode import main
from preprocess.encoding.encoder import to_unit_range
from preprocess.shapes.drawing import label_map, render, scene
from preprocess.shapes.shards import write_shards
from ranks import encode_worker

SHARDS, IMAGES = 3, 25  # 10 + 10 + 5


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    write_shards(str(folder), IMAGES, 0, "train", shard_size=10)
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"


@pytest.fixture(scope="module")
def cache(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("cache") / "c"
    conditions = ("boxes", "labels", "lowres", "mask")
    groups = {"boxes": BoxesConfig(count=25, most=8), "labels": LabelsConfig(count=25)}
    assert main(config(shapes, dest, conditions=conditions, **groups)) == 0
    return dest


def test_every_sample_is_cached_with_its_moments_text_and_facts(cache: Path) -> None:
    storage = open_storage(str(cache))
    manifest = load_manifest(storage)
    stage, tower = load_autoencoder(ENCODERS), load_text(ENCODERS)
    assert [entry.samples for entry in manifest.shards] == [10, 10, 5]
    assert manifest.contract.vae_sha256 == stage.weights_sha256
    assert manifest.contract.text_sha256 == tower.weights_sha256
    records = list(first_records(storage, manifest, IMAGES))
    facts = manifest.contract.conditions
    assert facts.lowres is not None
    assert facts.mask is not None
    for i, record in enumerate(records):
        truth = scene(0, i, "train")
        pixels = torch.from_numpy(render(truth))[None]
        moments = stage.encode(to_unit_range(pixels))[0].numpy()
        np.testing.assert_allclose(record.members["moments"], moments, atol=2e-3, rtol=2e-3)
        states = tower.encode(tower.tokenize([truth.caption]))[0].numpy()
        np.testing.assert_allclose(record.members["text"], states, atol=5e-3, rtol=2e-3)
        assert record.key == f"{i // 10:06d}_{i % 10:06d}"
        assert record.meta["caption"] == truth.caption
        assert record.meta["key"] == f"{i // 10:05d}{i % 10:04d}"
        assert record.meta["crop"] == [0, 0, 64, 64]
        assert (record.members["cond.labels"] == label_map(truth)[1::2, 1::2]).all()
        assert (record.members["cond.lowres"] == lowres(render(truth), facts.lowres, "")).all()
        boxes = record.members["cond.boxes"].astype(np.float64)
        assert (boxes[len(truth.objects) :] == -1).all()
        for box, thing in zip(boxes, truth.objects, strict=False):
            np.testing.assert_allclose(box, [thing.label, *(edge / 64 for edge in thing.box)], atol=1e-3)
        mask = masks(record.key, (64, 64), facts.mask)
        assert (unpack(record.members["cond.mask"], 64) == mask).all()
        hidden = to_unit_range(pixels) * torch.from_numpy(1 - mask)
        mean = stage.encode(hidden)[0, :4].numpy()
        np.testing.assert_allclose(record.members["cond.masked"], mean, atol=2e-3, rtol=2e-3)


def test_statistics_are_those_of_the_scaled_latents(cache: Path) -> None:
    storage = open_storage(str(cache))
    manifest = load_manifest(storage)
    contract = manifest.contract
    means = np.stack([r.members["moments"][:4] for r in first_records(storage, manifest, IMAGES)]).astype(np.float64)
    scaled = (means - contract.shift) * contract.scale
    np.testing.assert_allclose(manifest.statistics.mean, scaled.mean(axis=(0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(manifest.statistics.std, scaled.std(axis=(0, 2, 3)), rtol=1e-12)


def test_the_empty_caption_is_encoded_once(cache: Path) -> None:
    tower = load_text(ENCODERS)
    uncond = np.load(cache / "uncond.npy")
    assert uncond.dtype == np.float16
    np.testing.assert_allclose(uncond, tower.encode(tower.tokenize([""]))[0].numpy(), atol=5e-3, rtol=2e-3)


def test_webdataset_reads_the_cache(cache: Path) -> None:
    import webdataset

    storage = open_storage(str(cache))
    records = list(first_records(storage, load_manifest(storage), IMAGES))
    urls = [str(cache / f"{i:06d}.tar") for i in range(SHARDS)]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == [record.key for record in records]
    for sample, record in zip(found, records, strict=True):
        assert sample["json"] == record.meta
        assert (sample["moments.npy"] == record.members["moments"]).all()
        assert (sample["text.npy"] == record.members["text"]).all()


def test_bytes_do_not_depend_on_place_time_or_workers(shapes: str, tmp_path: Path) -> None:
    main(config(shapes, tmp_path / "a"))
    main(config(shapes, tmp_path / "b", workers=1))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_no_path_of_this_machine_enters_a_cache(cache: Path) -> None:
    for name, data in files(cache).items():
        data = re.sub(rb"[A-Za-z0-9+/=]{200,}", b"", data)  # pictures: a short host name can stand in any
        for secret in (str(cache.parent).encode(), b"/tmp", os.uname().nodename.encode(), os.getcwd().encode()):
            assert secret not in data, name
    assert load_manifest(open_storage(str(cache))).sources == ("{00000..00002}.tar",)


def test_a_rerun_does_nothing(shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(config(shapes, tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "card.html"}
    monkeypatch.setattr(NetworkStage, "encode", None)
    assert main(config(shapes, tmp_path)) == 0
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "card.html"}
    assert {name: time for name, time in after.items() if before.get(name) != time and "." in name} == {}


def test_a_lost_unit_is_made_again_with_the_same_bytes(shapes: str, tmp_path: Path) -> None:
    main(config(shapes, tmp_path))
    before = files(tmp_path)
    (tmp_path / "000001.tar").unlink()
    (tmp_path / "000002.index.json").unlink()
    main(config(shapes, tmp_path))
    assert files(tmp_path) == before


def test_another_contract_or_source_is_refused_with_the_difference(shapes: str, cache: Path, tmp_path: Path) -> None:
    main(config(shapes, tmp_path))
    with pytest.raises(DestinationExists, match="batch: 4, not 8"):
        main(config(shapes, tmp_path, batch=8))
    with pytest.raises(DestinationExists, match="vae_sha256"):
        main(config(shapes, tmp_path, encoders=EncodersConfig(seed=2)))
    with pytest.raises(DestinationExists, match="begun with 3 input shards"):
        main(config(shapes.replace("2}", "1}"), tmp_path))


def test_a_source_shard_that_changed_is_not_taken_for_the_one_that_was_encoded(shapes: str, tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for i in range(SHARDS):
        (source / f"{i:05d}.tar").write_bytes(Path(shapes).with_name(f"{i:05d}.tar").read_bytes())
    pattern = f"{source}/{{00000..00002}}.tar"
    main(config(pattern, tmp_path / "c"))
    (source / "00001.tar").write_bytes((source / "00002.tar").read_bytes())
    with pytest.raises(DestinationExists, match=r"another 00001\.tar"):
        main(config(pattern, tmp_path / "c"))


# --------------------------------------------------------------------------------------------------------------------
# Rejects


BAD = {
    "cut.png": (png()[:2000], b"a cut picture", "image_truncated"),
    "html.jpg": (b"<html>404</html>", b"a page", "image_unreadable"),
    "latin.png": (png(), b"caf\xe9", "caption_bad_utf8"),
    "silent.png": (png(), None, "caption_missing"),
    "blank.png": (png(), b" ", "caption_empty"),
    "large.png": (png((100, 90)), b"beyond the limit", "image_too_large"),
}


def write_bad(folder: Path) -> str:
    members = []
    for name, (image, text, _) in BAD.items():
        members.append((name, image))
        if text is not None:
            members.append((name[:-4] + ".txt", text))
    for key in ("a.b", "a.b.c", "кадр.1"):
        members += [(f"{key}.png", png()), (f"{key}.txt", f"fine {key}".encode())]
    members += [("words.txt", b"no picture"), ("00000.parquet", b"PAR1")]
    write_tar(folder / "00000.tar", members)
    return str(folder / "00000.tar")


def test_every_bad_sample_is_counted_by_its_reason_and_dotted_keys_stay_apart(tmp_path: Path) -> None:
    source = write_bad(tmp_path)
    limits = dataclasses.replace(config("", tmp_path).limits, pixels=5000)
    main(config(source, tmp_path / "c", max_rejects=1.0, limits=limits))
    storage = open_storage(str(tmp_path / "c"))
    manifest = load_manifest(storage)
    entry = manifest.units[0]
    expected = {reason: 1 for _, _, reason in BAD.values()} | {"image_missing": 1}
    assert entry.rejected == expected
    assert (entry.read, entry.accepted) == (10, 3)
    assert [r.meta["key"] for r in first_records(storage, manifest, 9)] == ["a.b", "a.b.c", "кадр.1"]
    assert json.loads((tmp_path / "c/units/000000.json").read_text())["passed_over"] == 1


def test_too_many_rejects_fail_and_can_be_accepted_afterwards(tmp_path: Path) -> None:
    source = write_bad(tmp_path)
    with pytest.raises(SourceError, match=r"6 of 10 samples were rejected .*max_rejects=0\.1"):
        main(config(source, tmp_path / "c"))
    assert not (tmp_path / "c" / MANIFEST).exists()
    made = (tmp_path / "c/000000.tar").stat().st_mtime_ns
    assert main(config(source, tmp_path / "c", max_rejects=0.6)) == 0
    assert (tmp_path / "c/000000.tar").stat().st_mtime_ns == made


def test_sources_without_anything_usable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.tar"):
        main(config(str(tmp_path / "none.tar"), tmp_path / "c"))
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(SourceError, match="holds no usable sample: 0 read"):
        main(config(str(tmp_path / "empty.tar"), tmp_path / "c"))
    assert not (tmp_path / "c" / MANIFEST).exists()


def test_long_captions_are_cut_and_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("k.png", png()), ("k.txt", b"word " * 200), ("l.png", png()), ("l.txt", b"red")])
    main(config(str(tmp_path / "0.tar"), tmp_path / "c"))
    storage = open_storage(str(tmp_path / "c"))
    first, second = first_records(storage, load_manifest(storage), 2)
    assert (first.meta["tokens"], first.meta["truncated"]) == (32, True)
    assert (second.meta["tokens"], second.meta["truncated"]) == (3, False)
    assert json.loads((tmp_path / "c/units/000000.json").read_text())["truncated"] == 1


# --------------------------------------------------------------------------------------------------------------------
# Failures


def cut_at_a_record(tar: bytes) -> bytes:
    return tar[: tar.index(b"000010003.txt") // 512 * 512]


def cut_in_a_header(tar: bytes) -> bytes:
    return tar[: tar.index(b"000010003.txt") + 100]


def cut_in_a_payload(tar: bytes) -> bytes:
    return tar[: tar.index(b"000010003.txt") + 520]


def header_bit_flipped(tar: bytes) -> bytes:
    at = tar.index(b"000010003.txt") + 130  # in the size
    return tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :]


@pytest.mark.parametrize("damage", [cut_at_a_record, cut_in_a_header, cut_in_a_payload, header_bit_flipped])
def test_a_damaged_input_shard_is_not_published_and_the_rest_goes_on_once_it_is_mended(
    shapes: str, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for i in range(SHARDS):
        (source / f"{i:05d}.tar").write_bytes(Path(shapes).with_name(f"{i:05d}.tar").read_bytes())
    whole = (source / "00001.tar").read_bytes()
    (source / "00001.tar").write_bytes(damage(whole))
    pattern = f"{source}/{{00000..00002}}.tar"
    with pytest.raises(ShardCorrupt, match=r"00001\.tar"):
        main(config(pattern, tmp_path / "c"))
    left = set(files(tmp_path / "c"))
    assert not {name for name in left if name.startswith("000001")} | left & {"units/000001.json", MANIFEST}
    assert {"units/000000.json", "units/000002.json"} <= left
    (source / "00001.tar").write_bytes(whole)
    main(config(pattern, tmp_path / "c"))
    main(config(shapes, tmp_path / "d"))
    assert files(tmp_path / "c") == files(tmp_path / "d")


def test_an_encoder_that_fails_leaves_nothing_of_its_unit(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = NetworkStage.encode, []

    def failing(self: NetworkStage, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:  # the second batch of the second unit
            raise RuntimeError("out of memory")
        return real(self, x)

    monkeypatch.setattr(NetworkStage, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(config(shapes, tmp_path))
    assert not set(files(tmp_path)) & {"000001.tar", "000001.index.json", MANIFEST}
    monkeypatch.setattr(NetworkStage, "encode", real)
    assert main(config(shapes, tmp_path)) == 0


def test_a_latent_that_is_not_finite_stops_the_stage_and_names_the_sample(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = NetworkStage.encode

    def broken(self: NetworkStage, x: torch.Tensor) -> torch.Tensor:
        moments = real(self, x)
        moments[2, 3, 0, 0] = float("nan")
        return moments

    monkeypatch.setattr(NetworkStage, "encode", broken)
    with pytest.raises(NonFinite, match=r"moments of sample 000000002 in .*00000\.tar"):
        main(config(shapes, tmp_path))
    assert not (tmp_path / "000000.tar").exists()


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.long)], ids=["before", "after"])
def test_a_kill_at_any_write_and_a_rerun_end_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """For each n a worker kills itself at its n-th change of the store, before or after the effect, and another run
    goes on. A kill before a change finds the store as a kill after the change before it does, so that the kills before
    each change and the one after the last leave every state behind."""
    write_shards(str(tmp_path / "s"), 5, 0, "train", shard_size=3)
    source = str(tmp_path / "s/{00000..00001}.tar")
    main(config(source, tmp_path / "clean"))
    clean = files(tmp_path / "clean")
    monkeypatch.setattr("preprocess.encoding.claims.POLL", 0.01)

    def killed(n: int, after: bool) -> bool:
        """Whether there is an n-th change, at which the worker has died; the dataset is whole then all the same."""
        dest, output = tmp_path / f"killed-{after}-{n:02d}", tmp_path / "output"
        work = config(source, dest, claim_seconds=60.0)
        status = encode_worker.wait(encode_worker.start(encode_worker.die_at_change, output, work, n, after))
        assert status in (0, -signal.SIGKILL), output.read_text()
        assert main(config(source, dest, claim_seconds=0.1)) == 0
        assert files(dest) == clean, dest.name
        return status != 0

    # Plan, empty caption; claim, tar, index, report and the claim's end, twice; two manifests, card: 15 changes of the
    # store. A worker that lives to its sixteenth has had no kill.
    assert [n for n in range(1, 17) if killed(n, after)] == list(range(1, 16))
    if not after:
        assert killed(15, True)


def test_two_processes_make_the_same_cache(shapes: str, tmp_path: Path) -> None:
    main(config(shapes, tmp_path / "one"))
    two = config(shapes, tmp_path / "two", launch=LaunchConfig(processes=2, threads=1))
    assert main(two) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
