"""Images with annotations as others keep them: COCO's json, OpenImages' csv, label maps, folders of classes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.encode import config as encode_config
from pipeline.config import ConvertConfig
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import first_records
from pipeline.errors import LatentmillError
from pipeline.storage.urls import open_storage
from preprocess import convert, encode

SIZES = {"a.jpg": (64, 32), "b.jpg": (32, 64), "c.png": (48, 48)}
"""(width, height) of the pictures."""
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 92, "name": "banner"}]


def picture(size: tuple[int, int], name: str = "x.png", seed: int = 0, orientation: int = 0) -> bytes:
    """The bytes of a picture of noise, as a JPEG or PNG by its name. size: (width, height). orientation: EXIF's."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(out, "PNG" if name.endswith("png") else "JPEG", exif=exif)
    return out.getvalue()


def greys(values: np.ndarray) -> bytes:
    """A PNG of numbers (H, W): 8 or 16 bits."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes files below a folder, by relative path."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]] = SIZES) -> Path:
    """Writes pictures of these sizes, each of another noise."""
    return write(folder, {name: picture(size, name, seed) for seed, (name, size) in enumerate(sizes.items())})


def images_of(sizes: dict[str, tuple[int, int]] = SIZES) -> list[dict[str, Any]]:
    """COCO's entries: a.jpg has the number 7, the next ones 8 and so on."""
    return [
        {"id": number, "file_name": name, "width": width, "height": height, "license": 3}
        for number, (name, (width, height)) in enumerate(sizes.items(), 7)
    ]


def coco(annotations: Sequence[Any], **changes: Any) -> bytes:
    """A file of COCO's format: images first, categories last, as theirs."""
    whole = {
        "info": {"year": 2017, "nested": [[1], {}]},
        "licenses": [],
        "images": images_of(),
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    whole |= changes
    return json.dumps({name: value for name, value in whole.items() if value is not None}).encode()


def box(image: Any, category: Any, bbox: Any, **more: Any) -> dict[str, Any]:
    """COCO's entry of a box."""
    outline = [[1.5, 2.5] * 20]
    return {"image_id": image, "category_id": category, "bbox": bbox, "segmentation": outline, "iscrowd": 0, **more}


def said(image: Any, caption: Any) -> dict[str, Any]:
    """COCO's entry of a caption."""
    return {"image_id": image, "id": 1, "caption": caption}


def converted(folder: Path, kind: str, **changes: Any) -> Path:
    """Converts folder/images to folder/out. Returns the latter."""
    fields: dict[str, Any] = {"from_": kind, "images": str(folder / "images"), "dest": str(folder / "out")}
    settings = ConvertConfig(**{**fields, **changes})
    assert convert.main(settings) == 0
    return Path(settings.dest)


def refusal(folder: Path, kind: str, **changes: Any) -> str:
    """The line with which a conversion is refused."""
    with pytest.raises(LatentmillError) as caught:
        converted(folder, kind, **changes)
    line = str(caught.value)
    assert "\n" not in line
    return line


def summary(out: Path) -> dict[str, Any]:
    """convert.json."""
    found: dict[str, Any] = json.loads((out / "convert.json").read_text())
    return found


def cached(out: Path, dest: Path, **changes: Any) -> tuple[Manifest, dict[str, Record]]:
    """Encodes the tars of a conversion at 32 pixels. Returns the manifest, and the records by the key of the sample."""
    settings: dict[str, Any] = {"resolution": (32,), "text_storage": "none", "max_rejects": 0.0}
    assert encode.main(encode_config(f"{out}/*.tar", dest, **{**settings, **changes})) == 0
    storage = open_storage(str(dest))
    manifest = load_manifest(storage)
    return manifest, {record.meta["key"]: record for record in first_records(storage, manifest, 99)}


def boxes_of(record: Record) -> list[list[float]]:
    """The boxes of a record that are there."""
    array = record.members["cond.boxes"].astype(np.float64)
    kept: list[list[float]] = array[array[:, 0] >= 0].round(3).tolist()
    return kept
