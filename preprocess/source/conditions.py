"""Makes the arrays of a record that stand beside its image, from its sample and the facts of the cache's conditions.

A decoding worker reads what the sample holds and crops it with the image (`read_conditions`). What depends on the size
of the latent is made where the record is (`undrawn_arrays`). Holes depend on the record's key, which is not known
before all samples ahead of it are read: `encode` has its workers draw them once it is (`draw_holes`). `verify` makes
all of these arrays at once (`stored_arrays`). pipeline/conditions says how each is made, and makes it for `sample`,
too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.conditions.boxes import crop_boxes, flip_boxes, read_boxes
from pipeline.conditions.classes import read_class
from pipeline.conditions.facts import Conditions, LowresFacts, MaskFacts
from pipeline.conditions.labels import label_map, sample_labels
from pipeline.conditions.lowres import crop_small, lowres
from pipeline.conditions.mask import mask_map, masks, pack, unpack
from pipeline.config import LimitsConfig
from pipeline.errors import RecordRejected
from preprocess.source import png
from preprocess.source.image import Crop, cut, decode_image, open_image
from preprocess.source.shard import Sample

ALONG_ROWS = ("labels", "lowres", "mask")
"""Arrays whose last axis runs along the rows of the picture."""


def read_conditions(
    sample: Sample,
    columns: Mapping[str, Any],
    facts: Conditions,
    crop: Crop,
    pixels_HWC: np.ndarray,
    limits: LimitsConfig,
    colour: str = "as_stored",
) -> tuple[dict[str, np.ndarray], int]:
    """What a sample gives beside its picture, cropped like it, by the condition's name; and how many boxes were cut.

    class: int32 (). boxes: float16 (most, 5). labels: uint8 (H, W), every pixel. lowres: uint8 ([K,] 3, H/s, W/s).
    mask: uint8 (H, W), 1 inside the hole, of the sample's own file. columns: of its json. colour: what
    is done with colour profiles. Raises RecordRejected.
    """
    arrays: dict[str, np.ndarray] = {}
    cut_boxes = 0
    if facts.classes is not None:
        arrays["class"] = read_class(sample.members.get("cls"), columns, facts.classes, sample.key)
    if facts.boxes is not None:
        arrays["boxes"], cut_boxes = crop_boxes(read_boxes(columns.get("boxes")), crop, facts.boxes)
    if facts.labels is not None:
        image, depth = open_map(sample, "labels", crop)
        labels = label_map(image, facts.labels.offset, facts.labels.count, depth)
        arrays["labels"] = crop_nearest(labels, crop)
    if facts.lowres is not None:
        given = given_lowres(sample, facts.lowres, crop, limits, colour) if facts.lowres.degradation == "file" else None
        arrays["lowres"] = lowres(pixels_HWC, facts.lowres, sample.key, given)
    if facts.mask is not None and "file" in facts.mask.kinds:
        arrays["mask"] = crop_nearest(mask_map(open_map(sample, "mask", crop)[0]), crop)
    return arrays, cut_boxes


def flipped(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `read_conditions` gave, with left and right exchanged."""
    result = dict(arrays)
    for name in result.keys() & set(ALONG_ROWS):
        result[name] = np.ascontiguousarray(result[name][..., ::-1])
    if "boxes" in result:
        result["boxes"] = flip_boxes(result["boxes"])
    return result


def stored_arrays(
    arrays: Mapping[str, np.ndarray], pixels_HWC: np.ndarray, key: str, facts: Conditions, downsampling: int
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The arrays of a record that need no encoder, by their stored names, and its masks (K, H, W) or None.

    arrays: what `read_conditions` gave. key: of the record. downsampling: pixels per latent position, along a side.
    """
    stored = undrawn_arrays(arrays, pixels_HWC, facts, downsampling)
    if facts.mask is None:
        return stored, None
    wanted = Holes(key, (pixels_HWC.shape[1], pixels_HWC.shape[0]), arrays.get("mask"))
    stored["cond.mask"], drawn = stored_holes(draw_holes(wanted, facts.mask), wanted.size, facts.mask)
    return stored, drawn


def undrawn_arrays(
    arrays: Mapping[str, np.ndarray], pixels_HWC: np.ndarray, facts: Conditions, downsampling: int
) -> dict[str, np.ndarray]:
    """The same without holes."""
    height, width = pixels_HWC.shape[:2]
    stored = {f"cond.{name}": array for name, array in arrays.items() if name not in ("labels", "mask")}
    if facts.labels is not None:
        cells = (height // downsampling * facts.labels.grid, width // downsampling * facts.labels.grid)
        stored["cond.labels"] = sample_labels(arrays["labels"], cells)
    if facts.pixels:
        stored["pixels"] = np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
    return stored


@dataclass(frozen=True)
class Holes:
    """What the holes of one record are drawn from. key: the record's. size: (width, height) of its crop in pixels.
    given: (H, W) uint8, the crop of the sample's own mask, where there is one."""

    key: str
    size: tuple[int, int]
    given: np.ndarray | None = None


@dataclass(frozen=True)
class Drawing:
    """A task of a decoding worker, as it is sent to its process: the holes of several records. Any other is a list of
    samples."""

    wanted: Sequence[Holes]


def draw_holes(wanted: Holes, facts: MaskFacts) -> np.ndarray:
    """The holes, packed, which processes pass on at an eighth of the cost: ([K,] H, ceil(W / 8)) uint8."""
    return pack(masks(wanted.key, wanted.size, facts, wanted.given))


def stored_holes(packed: np.ndarray, size: tuple[int, int], facts: MaskFacts) -> tuple[np.ndarray, np.ndarray]:
    """`cond.mask` as it is stored, and the masks (K, H, W), of what `draw_holes` gave for a crop of `size`."""
    mask = unpack(packed, size[0])
    return packed if facts.packed else mask, mask.reshape(-1, size[1], size[0])


# --------------------------------------------------------------------------------------------------------------------
# Files beside the image


def member(sample: Sample, suffix: str, name: str) -> bytes:
    """A file of a sample. Raises RecordRejected, NAME_missing."""
    data = sample.members.get(suffix)
    if data is None:
        raise RecordRejected(f"{name}_missing", sample.files)
    return data


def open_map(sample: Sample, name: str, crop: Crop) -> tuple[Image.Image, int]:
    """The file NAME.png of a sample, whose pixels say something of those of its image, decoded; and bits of a channel
    in the file. Raises RecordRejected: NAME_missing, NAME_size or NAME_unreadable."""
    data = member(sample, f"{name}.png", name)
    try:
        png.refuse_chunks(data)
        opened = Image.open(io.BytesIO(data), formats=("PNG",))
        if opened.size != (crop.width, crop.height):
            raise RecordRejected(f"{name}_size", f"{opened.size} beside an image of {(crop.width, crop.height)}")
        png.load_png(opened, data)
        return opened, png.depth(data)
    except RecordRejected as rejection:
        if rejection.reason == f"{name}_size":
            raise
        raise RecordRejected(f"{name}_unreadable", str(rejection)) from None
    except MemoryError:
        raise
    except Exception as error:
        raise RecordRejected(f"{name}_unreadable", str(error)) from None


def crop_nearest(numbers_HW: np.ndarray, crop: Crop) -> np.ndarray:
    """Crops numbers of pixels like the image that they stand beside, without mixing them: (height, width) uint8."""
    image = Image.fromarray(numbers_HW)
    if image.size != crop.resized:
        image = image.resize(crop.resized, Image.Resampling.NEAREST)
    return np.asarray(cut(image, crop))


def given_lowres(
    sample: Sample, facts: LowresFacts, crop: Crop, limits: LimitsConfig, colour: str = "as_stored"
) -> np.ndarray:
    """The part of a sample's .lr.png that shows the crop, (H/s, W/s, 3) uint8. Raises RecordRejected: lowres_missing,
    lowres_size, or lowres_unreadable."""
    data = member(sample, "lr.png", "lowres")
    try:
        image = decode_image(open_image(data, limits), data, colour)
    except RecordRejected as rejection:
        raise RecordRejected("lowres_unreadable", str(rejection)) from None
    return crop_small(image, crop, (crop.width, crop.height), facts.factor)
