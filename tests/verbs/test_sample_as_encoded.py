"""`sample` asks in the terms in which `encode` stores: a sample's own files give the arrays of its record."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.asked import pixels
from made.encode import ENCODERS, config, write_tar
from pipeline.config import ClassTask, InpaintTask, LayoutTask, SampleConfig, SemanticTask, SuperresTask, TaskConfig
from pipeline.config.conditions import BoxesConfig, ClassesConfig, LabelsConfig, MaskConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.inference.requests.request import make_requests
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.storage.urls import open_storage
from preprocess.encode import main

SIDE = 64
BOXES = [[3, 0.1, 0.2, 0.7, 0.9], [0, 0.5, 0.0, 1.0, 0.25]]


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample's files, and the cache that encode makes of them."""
    folder = tmp_path_factory.mktemp("as_encoded")
    rng = np.random.default_rng(1)
    files = {
        "png": png(pixels(SIDE, SIDE)),
        "cls": b"5",
        "json": json.dumps({"boxes": BOXES}).encode(),
        "labels.png": png(rng.integers(0, 9, (SIDE, SIDE), dtype=np.uint8)),
        "mask.png": png(np.kron(rng.integers(0, 2, (8, 8), dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))),
    }
    for name, data in files.items():
        (folder / f"a.{name}").write_bytes(data)
    write_tar(folder / "0.tar", [(f"a.{name}", data) for name, data in files.items()])
    settings = config(
        f"{folder}/0.tar",
        folder / "cache",
        resolution=(SIDE,),
        text_storage="none",
        conditions=("class", "boxes", "labels", "lowres", "mask"),
        classes=ClassesConfig(count=9),
        boxes=BoxesConfig(count=9, most=4),
        labels=LabelsConfig(count=10, offset=1),
        mask=MaskConfig(kinds=("file",), convention="ldm"),
        batch=1,
    )
    assert main(settings) == 0
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path) -> tuple[Contract, dict[str, np.ndarray]]:
    """The contract, and the arrays of the only record."""
    storage = open_storage(str(folder / "cache"))
    manifest = load_manifest(storage)
    (record,) = first_records(storage, manifest, 1)
    small = record.members["cond.lowres"].transpose(1, 2, 0)
    (folder / "a.lr.png").write_bytes(png(np.ascontiguousarray(small)))
    return manifest.contract, dict(record.members)


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        (ClassTask(), {"class_": "5"}),
        (LayoutTask(), {"boxes": "a.json"}),
        (SemanticTask(), {"labels": "a.labels.png"}),
        (SuperresTask(), {"image": "a.lr.png"}),
        (InpaintTask(), {"image": "a.png", "mask": "a.mask.png"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_samples_own_files_give_the_arrays_of_its_record(
    folder: Path, stored: tuple[Contract, dict[str, np.ndarray]], task: TaskConfig, asked: dict[str, str]
) -> None:
    contract, record = stored
    words: dict[str, Any] = {key: (value if key == "class_" else f"{folder}/{value}",) for key, value in asked.items()}
    requests = make_requests(task, contract, 2)
    (request,) = requests.rows(SampleConfig(run="r", **words))
    members = requests.encoded(request, load_autoencoder(ENCODERS)).members
    assert set(members) == set(task.members) and request.size == (SIDE, SIDE)
    for name, array in members.items():
        assert array.dtype == record[name].dtype and (array == record[name]).all(), name
