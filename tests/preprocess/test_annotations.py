"""docs/how_to/annotations.md: its program makes shards of COCO's and OpenImages' files that encode takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.encode import config
from made.places import REPOSITORY
from pipeline.config.conditions import BoxesConfig
from pipeline.config.loading.load import load
from pipeline.storage.local import LocalStorage
from preprocess.source.recipe import recipe_of
from preprocess.source.sample import prepare
from preprocess.source.shard import SourceShard

PAGE = (REPOSITORY / "docs" / "how_to" / "annotations.md").read_text(encoding="utf-8")
COCO = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 64, "height": 32},
        {"id": 9, "file_name": "b.jpg", "width": 32, "height": 64},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
    "annotations": [
        {"image_id": 7, "category_id": 90, "bbox": [16, 0, 32.5, 32]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 64.01, 16]},
    ],
}
BOXES = """ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf
a,x,/m/cat,1,0.25,0.75,0,1,0,0,0
a,x,/m/dog,1,0,1,0.5,1,0,0,1
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The page's program, run beside a small COCO."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a", (64, 32)), ("b", (32, 64))):
        (tmp_path / "train2017").mkdir(exist_ok=True)
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "train2017" / f"{name}.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(COCO))
    code = re.search(r"^(    import .*?)^\S", PAGE, re.DOTALL | re.MULTILINE)
    assert code is not None
    defined: dict[str, Any] = {}
    exec(dedent(code[1]), defined)
    return defined


def boxes_of(tar: Path, names: Path) -> list[list[list[float]]]:
    """The boxes of each sample of a shard, as encode reads them."""
    boxes = BoxesConfig(names=str(names), most=4)
    settings = config("", "", text_storage="none", conditions=("boxes",), boxes=boxes, resolution=(32,))
    with SourceShard(LocalStorage(tar.parent), tar.name, settings.limits) as shard:
        found = [prepare(one, recipe_of(settings), None).pictures[0].conditions["boxes"] for one in shard.samples()]
    return [array[array[:, 0] >= 0].astype(np.float64).round(2).tolist() for array in found]


@pytest.mark.usefixtures("program")
def test_shards_of_coco(tmp_path: Path) -> None:
    names = tmp_path / "shards" / "names.txt"
    assert names.read_text() == "person\ntoothbrush\n"
    found = boxes_of(tmp_path / "shards" / "00000.tar", names)  # of the middle of the first: columns 16 to 48
    assert found == [[[1, 0, 0, 1, 1], [0, 0, 0, 1, 0.5]], []]


def test_shards_of_openimages(program: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text(BOXES)
    (tmp_path / "classes.csv").write_text("LabelName,DisplayName\n/m/cat,Cat\n/m/dog,Dog\n")
    program["shards"](*program["openimages"]("boxes.csv", "classes.csv"), images="train2017", dest="open")
    names = tmp_path / "open" / "names.txt"
    assert names.read_text() == "Cat\nDog\nCat (group)\nDog (group)\n"
    assert boxes_of(tmp_path / "open" / "00000.tar", names) == [[[0, 0, 0, 1, 1], [3, 0, 0.5, 1, 1]]]


def test_the_command_of_the_page_is_one_that_encode_takes() -> None:
    words = re.search(r"latentmill encode (.*?)\n\n", PAGE, re.DOTALL)
    assert words is not None
    given = [word.strip("'") for word in words[1].replace("\\", "").replace("'", "").split()]
    assert load("encode", given).conditions == ("boxes",)
