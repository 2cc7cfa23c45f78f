"""preprocess/index.py: tars of latents without captions, and with classes or boxes, are adopted, or refused by name; a
dataset that was indexed in format 2 stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made.encode import ENCODERS, files, write_tar
from made.fuzz import bounded
from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions
from pipeline.config import DataVerbConfig, IndexConfig, VerifyConfig
from pipeline.config.check.verbs import check_index
from pipeline.data.format.contract_json import contract_to_json
from pipeline.data.format.manifest import load_manifest, manifest_bytes
from pipeline.data.format.records import npy_bytes
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.errors import ConfigError, ContractMismatch, DestinationExists, LatentmillError, SourceError
from pipeline.inference.trained import load_encoders
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.latents import Latents
from pipeline.preview import describe, job_of
from pipeline.storage.urls import open_storage
from preprocess import index, verify

COUNTS = (5, 4)
BOXES = np.array([[0, 0.1, 0.2, 0.5, 0.6], [4, 0, 0, 1, 1], [-1] * 5, [-1] * 5], np.float16)
Files = dict[str, Any]


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def sample(tar: int, row: int) -> Files:
    moments = np.random.default_rng([tar, row]).standard_normal((8, 2, 2)).astype(np.float32)
    return {"z.npy": moments, "label.npy": np.array((tar + row) % 3, np.int32), "b.npy": BOXES, "cls": b"7"}


def write(folder: Path, change: Callable[[Files], object] = lambda one: None, at: tuple[int, int] = (1, 2)) -> Path:
    """Tars of other software; `change` is of one record."""
    folder.mkdir(parents=True, exist_ok=True)
    for tar, count in enumerate(COUNTS):
        members = []
        for row in range(count):
            one = sample(tar, row)
            if (tar, row) == at:
                change(one)
            data = {name: npy_bytes(item) if isinstance(item, np.ndarray) else item for name, item in one.items()}
            members += [(f"{tar}_{row}.{name}", item) for name, item in data.items()]
        write_tar(folder / f"{tar}.tar", members)
    return folder


WITHOUT: dict[str, Any] = {"moments_member": "z.npy", "text_member": ""}
WITH_BOTH: dict[str, Any] = {
    **WITHOUT,
    "class_member": "label.npy",
    "classes": 3,
    "boxes_member": "b.npy",
    "box_classes": 5,
}


def config(folder: Path, **changes: Any) -> IndexConfig:
    made = IndexConfig(**{"dataset": str(folder), "source": f"{folder}/*.tar", **changes})
    check_index(made)
    return made


def refusal(folder: Path, kind: type[LatentmillError], **changes: Any) -> str:
    """The line with which indexing is refused; nothing may have been written."""
    before = files(folder)
    with pytest.raises(kind) as caught:
        index.main(config(folder, **changes))
    assert files(folder) == before
    return str(caught.value)


def streamed(folder: Path, members: tuple[str, ...]) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    storage = open_storage(str(folder))
    dataset = dataset_of(storage, load_manifest(storage))
    found = {}
    with Stream(dataset, dataset.order(3, 1), batch=1, members=members) as stream:
        for _ in range(sum(COUNTS)):
            batch = next(stream)
            found[batch.keys[0]] = batch.captions[0], {name: batch.tensors[name][0].numpy() for name in members}
    return found


def test_tars_without_captions_are_adopted_and_streamed(tmp_path: Path) -> None:
    write(tmp_path)
    before = files(tmp_path)
    assert index.main(config(tmp_path, **WITHOUT)) == 0
    after = files(tmp_path)
    assert after.items() >= before.items() and "uncond.npy" not in after
    manifest = load_manifest(open_storage(str(tmp_path)))
    contract = manifest.contract
    assert (manifest.format, manifest.uncond_sha256, contract.text, contract.caption_key) == (3, "", None, "")
    assert contract.conditions == Conditions()
    for key, (caption, arrays) in streamed(tmp_path, ("moments",)).items():
        tar, row = map(int, key.split("_"))
        assert caption == "" and (arrays["moments"] == sample(tar, row)["z.npy"]).all()
    assert index.main(config(tmp_path, **WITHOUT)) == 0
    assert files(tmp_path) == after
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0
    assert "9 records" in describe(job_of(DataVerbConfig(dataset=str(tmp_path), batch=2, world=2)), 2)


def test_classes_and_boxes_are_adopted_with_the_facts_given(tmp_path: Path) -> None:
    write(tmp_path)
    assert index.main(config(tmp_path, **WITH_BOTH)) == 0
    contract = load_manifest(open_storage(str(tmp_path))).contract
    assert contract.conditions == Conditions(
        classes=ClassFacts(count=3, key="unknown"), boxes=BoxFacts(count=5, most=4)
    )
    for key, (_, arrays) in streamed(tmp_path, ("moments", "cond.class", "cond.boxes")).items():
        tar, row = map(int, key.split("_"))
        assert arrays["cond.class"].shape == () and int(arrays["cond.class"]) == (tar + row) % 3
        assert (arrays["cond.boxes"] == BOXES).all()
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0
    assert "conditions.classes.count: 3, not 4" in refusal(tmp_path, DestinationExists, **{**WITH_BOTH, "classes": 4})


def test_own_names_need_no_layout(tmp_path: Path) -> None:
    for tar in range(2):
        members = []
        for row in range(3):
            one = sample(tar, row)
            members.append((f"{tar}_{row}.moments.npy", npy_bytes(one["z.npy"])))
            members.append((f"{tar}_{row}.cond.class.npy", npy_bytes(one["label.npy"])))
        write_tar(tmp_path / f"{tar}.tar", members)
    assert index.main(config(tmp_path, text_member="", class_member="cond.class.npy", classes=3)) == 0
    assert "layout" not in json.loads((tmp_path / "0.index.json").read_bytes())
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0


def test_latents_without_a_variance_are_adopted_and_drawn_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    settings: dict[str, Any] = {**WITHOUT, "stored": "latents", "channels": 8, "scale": 0.5, "shift": 0.25}
    assert index.main(config(tmp_path, **settings)) == 0
    told = capsys.readouterr().out
    assert "log-variance" not in told and "+/-" not in told
    manifest = load_manifest(open_storage(str(tmp_path)))
    latents = Latents.of(manifest.contract)
    assert (manifest.contract.latent_shape, latents.member) == ((8, 2, 2), "latents")
    drawn = []
    for key, (_, arrays) in streamed(tmp_path, ("latents",)).items():
        tar, row = map(int, key.split("_"))
        drawn.append(latents.draw(torch.from_numpy(arrays["latents"])[None], None)[0].numpy())
        assert (drawn[-1] == (sample(tar, row)["z.npy"] - np.float32(0.25)) * np.float32(0.5)).all()
    np.testing.assert_allclose(manifest.statistics.mean, np.stack(drawn).mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(manifest.statistics.std, np.stack(drawn).std(axis=(0, 2, 3)), atol=1e-6)
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0
    held = files(tmp_path)
    assert index.main(config(tmp_path, **settings)) == 0
    assert files(tmp_path) == held
    assert "stored: latents, not moments" in refusal(
        tmp_path, DestinationExists, **{**settings, "stored": "moments", "channels": 4}
    )


def boxes(*row: float) -> Callable[[Files], object]:
    return lambda one: one.update({"b.npy": np.array([row, *BOXES[1:]], np.float16)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.update({"label.npy": np.array(3, np.int32)}), "its class is 3, and classes are 0 to 2"),
        (lambda one: one.update({"label.npy": np.array(-1, np.int32)}), "its class is -1, and classes are 0 to 2"),
        (lambda one: one.update({"label.npy": np.array([1], np.int32)}), "cond.class is not int32 ()"),
        (lambda one: one.update({"label.npy": np.array(1, np.uint8)}), "cond.class is not int32 ()"),
        (lambda one: one.pop("label.npy"), "label.npy is not there"),
        (boxes(5, 0, 0, 1, 1), "box 0 has class 5, and classes are 0 to 4"),
        (boxes(0.5, 0, 0, 1, 1), "box 0 has class 0.5"),
        (boxes(-1, 0, 0, 1, 1), "rows without a box are all -1"),
        (boxes(0, 0.5, 0, 0.25, 1), "box 0 has edges [0.5, 0.0, 0.25, 1.0]"),
        (boxes(0, 0, 0, 1.5, 1), "box 0 has edges"),
        (boxes(0, float("nan"), 0, 1, 1), "cond.boxes holds NaN"),
        (lambda one: one.update({"b.npy": BOXES[:3]}), "cond.boxes is not float16 (4, 5)"),
    ],
)
def test_a_record_with_a_wrong_condition_is_refused_by_name_or_left_out(
    tmp_path: Path, change: Callable[[Files], object], words: str
) -> None:
    write(tmp_path, change)
    line = refusal(tmp_path, SourceError, **WITH_BOTH)
    assert "1.tar, byte " in line and words in line and "1_2" in line
    assert index.main(config(tmp_path, **WITH_BOTH, max_rejects=0.2)) == 0
    assert [unit.accepted for unit in load_manifest(open_storage(str(tmp_path))).units] == [5, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda one: one.update({"label.npy": np.array([1], np.int32)}),
            "label.npy has shape (1,), and cond.class is ()",
        ),
        (lambda one: one.update({"label.npy": np.array(1, np.float32)}), "label.npy is float32, not int32"),
        (lambda one: one.update({"b.npy": BOXES[:, :4]}), "b.npy has shape (4, 4), and cond.boxes is (N, 5)"),
        (lambda one: one.update({"b.npy": BOXES.astype(np.float32)}), "b.npy is float32, not float16"),
        (lambda one: one.update({"b.npy": BOXES[:0]}), "b.npy has shape (0, 5)"),
    ],
)
def test_arrays_that_are_no_classes_or_boxes_are_refused(
    tmp_path: Path, change: Callable[[Files], object], words: str
) -> None:
    write(tmp_path, change, at=(0, 0))
    assert words in refusal(tmp_path, SourceError, **WITH_BOTH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_member": "label.npy"}, "class_member=label.npy and classes=0: give both"),
        ({"classes": 3}, "class_member= and classes=3: give both"),
        ({"boxes_member": "b.npy"}, "boxes_member=b.npy and box_classes=0"),
        ({"class_member": "cls", "classes": 3}, "class_member=cls: a .npy file is wanted"),
        ({"moments_member": ""}, "moments_member=: a .npy file is wanted"),
        ({"class_member": "z.npy", "classes": 3, "moments_member": "z.npy"}, "class_member=z.npy is moments_member"),
        ({"text_member": "moments.npy"}, "text_member=moments.npy is moments_member"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **changes)
    check_index(IndexConfig(dataset="d", source="s", text_member="", caption_key=""))


def test_the_autoencoder_of_tars_without_captions_is_loaded_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setattr("preprocess.adopting.foreign.load_text", None)
    monkeypatch.setattr("pipeline.inference.trained.load_text", None)
    assert index.main(config(tmp_path, **WITHOUT, encoders=ENCODERS)) == 0
    contract = load_manifest(open_storage(str(tmp_path))).contract
    stage, tower = load_encoders(contract)
    assert tower is None and stage.weights_sha256 == load_autoencoder(ENCODERS).weights_sha256
    with pytest.raises(ContractMismatch, match="does not know its encoders"):
        load_encoders(dataclasses.replace(contract, vae_sha256=""))
    with pytest.raises(ContractMismatch, match=r"autoencoder .*latent scale"):
        load_encoders(dataclasses.replace(contract, vae_sha256="e" * 64, scale=0.123))
    with pytest.raises(ContractMismatch, match="autoencoder pixels"):
        load_encoders(dataclasses.replace(contract, stored="pixels"))


def test_a_dataset_that_was_indexed_in_format_2_stays_as_it_is(tmp_path: Path) -> None:
    """contract.json and the manifest that the version before wrote are found again, to the byte."""

    def with_text(one: Files) -> None:
        one.update({"text.npy": np.zeros((3, 8), np.float16), "json": b'{"caption": "words"}'})

    for tar, count in enumerate(COUNTS):
        members = []
        for row in range(count):
            one = sample(tar, row)
            with_text(one)
            members.append((f"{tar}_{row}.moments.npy", npy_bytes(one["z.npy"])))
            members += [(f"{tar}_{row}.text.npy", npy_bytes(one["text.npy"])), (f"{tar}_{row}.json", one["json"])]
        write_tar(tmp_path / f"{tar}.tar", members)
    (tmp_path / "uncond.npy").write_bytes(npy_bytes(np.zeros((3, 8), np.float16)))
    assert index.main(config(tmp_path)) == 0
    manifest = load_manifest(open_storage(str(tmp_path)))
    before = dataclasses.replace(manifest, format=2)
    plan = json.loads((tmp_path / "contract.json").read_bytes())
    plan["contract"] = contract_to_json(manifest.contract, 2)
    written = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    (tmp_path / "contract.json").write_bytes(written)
    for name in ("manifest.json", "manifests/000001.json"):
        (tmp_path / name).write_bytes(manifest_bytes(before))
    held = files(tmp_path)
    assert index.main(config(tmp_path)) == 0
    assert files(tmp_path) == held
    digest = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert load_manifest(open_storage(str(tmp_path))).digest == digest
    for name in ("manifest.json", "manifests/000001.json"):
        (tmp_path / name).unlink()
    assert index.main(config(tmp_path)) == 0
    assert files(tmp_path) == held


def labelled(one: Files, value: np.ndarray) -> None:
    one["label.npy"] = value


def test_any_class_is_adopted_or_left_out(tmp_path: Path) -> None:
    """Every value of an int32, and arrays of other kinds, in the middle of a tar."""
    arrays: list[np.ndarray] = [np.array(v, np.int32) for v in (0, 2, 3, -1, 2**31 - 1, -(2**31))]
    arrays += [np.zeros((0,), np.int32), np.zeros((2, 2), np.int32)]
    arrays += [np.array(1, np.float16), np.array(1, np.uint8)]
    for number, value in enumerate(arrays):
        folder = write(tmp_path / str(number), partial(labelled, value=value))
        with bounded():
            assert index.main(config(folder, **WITH_BOTH, max_rejects=0.5)) == 0
            rejected = sum(load_manifest(open_storage(str(folder))).rejected.values())
            assert rejected == (0 if number in (0, 1) else 1)
