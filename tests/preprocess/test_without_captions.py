"""A cache of images with classes and without captions is encoded, grown, previewed, verified and made a reference of,
and no text tower is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from made.encode import config, png, write_tar
from made.growing import _encoders  # noqa: F401  (a fixture that is used by itself)
from pipeline.conditions.facts import ClassFacts, Conditions
from pipeline.config import DataVerbConfig, ReferenceConfig, VerifyConfig
from pipeline.config.conditions import ClassesConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.shards import first_records
from pipeline.data.reading.stream import Stream
from pipeline.evaluation.reference import load_reference
from pipeline.preview import describe, job_of
from pipeline.storage.urls import open_storage
from preprocess import encode, reference, verify


def shard(path: Path, first: int, count: int = 4) -> None:
    """Images of noise with their classes."""
    path.parent.mkdir(exist_ok=True)
    members = []
    for number in range(first, first + count):
        members += [(f"{number:05d}.png", png((64, 64), number)), (f"{number:05d}.cls", b"%d" % (number % 3))]
    write_tar(path, members)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)
    for place in ("preprocess.encode", "pipeline.inference.trained"):
        monkeypatch.setattr(f"{place}.load_text", None)
    shard(tmp_path / "source" / "0.tar", 0)
    shard(tmp_path / "source" / "1.tar", 10)
    run(tmp_path)
    return tmp_path / "cache"


def run(folder: Path) -> None:
    settings = config(
        str(folder / "source" / "*.tar"),
        folder / "cache",
        text_storage="none",
        conditions=("class",),
        classes=ClassesConfig(count=3),
    )
    assert encode.main(settings) == 0


def test_it_is_encoded_without_a_text_tower_and_streams(cache: Path) -> None:
    storage = open_storage(str(cache))
    manifest = load_manifest(storage)
    contract = manifest.contract
    assert (contract.text, contract.caption_key, contract.text_sha256, manifest.uncond_sha256) == (None, "", "", "")
    assert contract.conditions == Conditions(classes=ClassFacts(count=3))
    assert not (cache / "uncond.npy").exists()
    assert [member.name for member in contract.members] == ["moments", "cond.class"]
    dataset = dataset_of(storage, manifest)
    with Stream(dataset, dataset.order(0, 4), batch=4, members=("moments", "cond.class")) as stream:
        batch = next(stream)
        names = {record.key: int(record.meta["key"]) for record in first_records(storage, manifest, 8)}
        assert batch.captions == [""] * 4
        assert batch.tensors["cond.class"].tolist() == [names[key] % 3 for key in batch.keys]


def test_it_grows_and_is_previewed_and_verified(cache: Path, tmp_path: Path) -> None:
    first = load_manifest(open_storage(str(cache)))
    shard(tmp_path / "source" / "2.tar", 20)
    run(tmp_path)
    grown = load_manifest(open_storage(str(cache)))
    assert (grown.version, grown.samples, grown.contract) == (2, 12, first.contract)
    assert "12 records" in describe(job_of(DataVerbConfig(dataset=str(cache), batch=2, world=2)), 2)
    verified = VerifyConfig(dataset=str(cache), source=str(tmp_path / "source" / "*.tar"), min_psnr=0)
    assert verify.main(verified) == 0


def test_its_reference_has_floors_and_no_score_of_captions(cache: Path, tmp_path: Path) -> None:
    source, dest = str(tmp_path / "source" / "*.tar"), str(tmp_path / "reference.safetensors")
    assert reference.main(ReferenceConfig(dataset=str(cache), source=source, dest=dest)) == 0
    facts = load_reference(dest).facts
    assert facts.clip_sha256 == "" and facts.scores == {} and facts.held == 4
    assert set(facts.floors["4"]) == {"real", "reconstruction"}
    assert reference.main(ReferenceConfig(dataset=str(cache), source=source, dest=dest)) == 0  # its own, again


def test_its_page_says_that_there_are_no_captions(cache: Path) -> None:
    page = (cache / "card.html").read_text()
    assert "captions cut at" not in page and "Text tower" not in page
    assert "<td>Captions</td>" in page and json.dumps("cond.class")[1:-1] in page
