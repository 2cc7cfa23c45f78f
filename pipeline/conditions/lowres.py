"""cond.lowres: the crop at a lower resolution, in 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.conditions.boxes import CropBox
from pipeline.conditions.bsr import degrade
from pipeline.conditions.facts import LowresFacts
from pipeline.errors import RecordRejected

BICUBIC = Image.Resampling.BICUBIC


def lowres(pixels_HWC: np.ndarray, facts: LowresFacts, key: str, given: np.ndarray | None = None) -> np.ndarray:
    """The small image of a crop: (3, h, w) uint8, or (facts.variants, 3, h, w) where there are several.

    pixels_HWC: uint8. h and w are H and W divided by facts.factor, rounded down; what is left at the right and the
    bottom is not seen. key: the record's, from which all draws of "bsr" follow. given: (h, w, 3) uint8, the sample's
    own small image, for "file". Raises RecordRejected: lowres_missing, or lowres_size for another size.
    """
    factor = facts.factor
    height, width = (side // factor for side in pixels_HWC.shape[:2])
    assert height and width, f"{pixels_HWC.shape[1]} x {pixels_HWC.shape[0]} pixels are too few for factor {factor}"
    whole = pixels_HWC[: height * factor, : width * factor]
    if facts.degradation == "bsr":
        small = [degrade(whole, factor, key, variant) for variant in range(facts.variants)]
    elif facts.degradation == "file":
        if given is None:
            raise RecordRejected("lowres_missing")
        if given.shape != (height, width, 3):
            raise RecordRejected("lowres_size", f"{given.shape[1]} x {given.shape[0]}, {width} x {height} are wanted")
        small = [given] * facts.variants
    else:
        reduce = _box if facts.degradation == "box" else bicubic
        small = [reduce(whole, factor)] * facts.variants
    stored = np.stack([np.ascontiguousarray(one.transpose(2, 0, 1)) for one in small])
    return stored[0] if facts.variants == 1 else stored


def bicubic(pixels_HWC: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H/factor, W/factor, 3) uint8: Pillow's bicubic filter (a = -0.5), widened by the factor
    against aliasing, clipped and rounded to 8 bits."""
    height, width = (side // factor for side in pixels_HWC.shape[:2])
    return np.asarray(Image.fromarray(pixels_HWC).resize((width, height), BICUBIC))


def _box(pixels_HWC: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H/factor, W/factor, 3) uint8: means over blocks, rounded half up."""
    height, width = (side // factor for side in pixels_HWC.shape[:2])
    blocks = pixels_HWC.reshape(height, factor, width, factor, 3)
    area = factor**2
    return ((blocks.sum(axis=(1, 3), dtype=np.uint32) + area // 2) // area).astype(np.uint8)


def crop_small(image: Image.Image, crop: CropBox, size: tuple[int, int], factor: int) -> np.ndarray:
    """What a crop of an image shows, of that image's own small version; the array `given` of `lowres`.

    image: the small version, RGB. crop: where the crop lies in the large image. size: (width, height) of the upright
    original large image in pixels. Where the crop was not resized, its pixels are those of the file; else they are
    resized, by Pillow's bicubic filter. Returns (h, w, 3) uint8. Raises RecordRejected, lowres_size, for a file that is
    not as large as the image divided by the factor, up to rounding.
    """
    if any(abs(small * factor - large) >= factor for small, large in zip(image.size, size)):
        raise RecordRejected(
            "lowres_size",
            f"{image.width} x {image.height} beside an image of {size[0]} x {size[1]} at factor {factor}",
        )
    left, top, width, height = crop.box
    across, down = (small / whole for small, whole in zip(image.size, crop.resized))
    wanted = (width // factor, height // factor)
    region = (left * across, top * down, (left + width) * across, (top + height) * down)
    return np.asarray(image.resize(wanted, BICUBIC, box=region))


def enlarge(lowres_3hw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(3, h, w) uint8 -> (height, width, 3) uint8 by Pillow's bicubic filter: the baseline of super-resolution. size:
    (width, height) in pixels."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(lowres_3hw.transpose(1, 2, 0))).resize(size, BICUBIC))


def flip(lowres_array: np.ndarray) -> np.ndarray:
    """Small images (..., h, w) with left and right exchanged."""
    return np.ascontiguousarray(lowres_array[..., ::-1])
