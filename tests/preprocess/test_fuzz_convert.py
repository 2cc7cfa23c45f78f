"""Files of annotations that are damaged or hostile give a conversion or one line, soon and without much memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made.annotated import box, coco, greys, said, write, write_pictures
from made.fuzz import QUICK, bounded, mutated_bytes, mutated_value
from pipeline.config import ConvertConfig
from pipeline.errors import RecordRejected
from pipeline.storage.urls import open_storage
from preprocess import convert
from preprocess.converting.plan import plan_bytes
from preprocess.converting.samples import Folder, Samples

COCO = json.loads(coco([box(7, 1, [0, 0, 9, 9.5]), box(8, 90, [1, 2, 3, 4], iscrowd=1), said(9, "a caption")]))
CSV = b"ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\na,/m/1,0,0.5,0.25,1,0\nb,/m/2,0.1,0.5,0.25,1,1\n"
NAMES = b'/m/1,Cat\n/m/2,"Dog, a"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzzed")
    write_pictures(made / "images")
    return made


def through(folder: Path, **settings: Any) -> None:
    """All that a conversion does but the writing."""
    config = ConvertConfig(images=str(folder / "images"), dest=str(folder / "out"), max_rejects=1.0, **settings)
    images = open_storage(config.images)
    listing = convert.listed(images, "images", config.images)
    gathered = convert.gather(config, listing, listing if config.labels else None)
    convert.refuse_defects(config, gathered, gathered.images)
    plan_bytes(config, gathered, listing, listing if config.labels else None)
    assert gathered.images.lines().count(b"\n") == len(gathered.images.listed)
    assert gathered.annotations.lines().count(b"\n") == len(gathered.annotations.listed)
    maps = Folder(images, listing, 1 << 20) if config.labels else None
    samples = Samples(config, gathered, Folder(images, listing, 1 << 20), maps)
    for number in range(len(gathered.files)):
        try:
            members = dict(samples.sample(number).members)
        except RecordRejected:
            continue
        for name, data in members.items():
            for _, *edges in json.loads(data)["boxes"] if name.endswith(".json") and b"boxes" in data else ():
                assert 0 <= edges[0] < edges[2] <= 1 and 0 <= edges[1] < edges[3] <= 1


@given(
    st.one_of(
        mutated_value(COCO).map(lambda value: json.dumps(value).encode()), mutated_bytes(json.dumps(COCO).encode())
    )
)
@settings(**QUICK)  # type: ignore[arg-type]
def test_a_changed_file_of_coco_is_read_or_refused(folder: Path, data: bytes) -> None:
    write(folder, {"a.json": data})
    with bounded():
        through(folder, from_="coco", annotations=(str(folder / "a.json"),))


@given(mutated_bytes(CSV), st.one_of(st.just(NAMES), mutated_bytes(NAMES)))
@settings(**QUICK)  # type: ignore[arg-type]
def test_changed_files_of_openimages_are_read_or_refused(folder: Path, rows: bytes, names: bytes) -> None:
    write(folder, {"a.csv": rows, "n.csv": names})
    with bounded():
        through(folder, from_="openimages", annotations=(str(folder / "a.csv"),), names=str(folder / "n.csv"))


@given(mutated_value({"0": ["rose", "Rose"], "1": ["tulip", "Tulip"]}), st.sampled_from(["classes", "labels"]))
@settings(**QUICK)  # type: ignore[arg-type]
def test_a_changed_file_of_names_is_read_or_refused(folder: Path, value: Any, kind: str) -> None:
    write_pictures(folder / "tree" / "images", {"rose/a.jpg": (8, 8)})
    maps = {"tree/images/rose/a.png": greys(np.eye(8, dtype=np.uint8))}
    write(folder, {**maps, "n.json": json.dumps(value).encode()})
    where = {"labels": str(folder / "tree" / "images")} if kind == "labels" else {}
    with bounded():
        through(folder / "tree", from_=kind, names=str(folder / "n.json"), **where)
