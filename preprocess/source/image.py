"""Turns the bytes of one untrusted image into a crop of RGB pixels, or into a reason of rejection.

Every mode of JPEG, PNG and WebP becomes 8-bit RGB: CMYK and greys by Pillow's conversion, 16-bit greys by their upper 8
bits, transparency (alpha, or a transparent palette entry) over white. EXIF orientation is applied; embedded colour
profiles are not. Of an animation the first picture is used.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.config import LimitsConfig
from pipeline.errors import RecordRejected

FORMATS = ("JPEG", "PNG", "WEBP")
RESIZE = "lanczos"  # recorded in the contract
FILTERS = {"lanczos": Image.Resampling.LANCZOS}
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, RuntimeError, OverflowError)

Image.MAX_IMAGE_PIXELS = None  # open_image has its own limit, which a user can set


@dataclass(frozen=True)
class Crop:
    """The origin of a crop's pixels: width and height of the upright original, the (width, height) that it was resized
    to, and the box (left, top, width, height) of the crop in the resized image. All in pixels."""

    width: int
    height: int
    resized: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the crop."""
        return self.box[2:]


def place_crop(width: int, height: int, size: tuple[int, int], policy: str, seed: int, key: str) -> Crop:
    """Places a crop of `size` (width, height) in an image that is resized until it just covers the crop.

    policy: centre or random. A random place depends only on seed and key (the sample's), and is uniform up to the
    rounding of a 64-bit integer.
    """
    scale = max(size[0] / width, size[1] / height)
    resized = (max(size[0], round(width * scale)), max(size[1], round(height * scale)))
    room = (resized[0] - size[0], resized[1] - size[1])
    if policy == "centre":
        left, top = room[0] // 2, room[1] // 2
    else:
        digest = hashlib.sha256(f"crop {seed} {key}".encode("utf-8", "surrogatepass")).digest()
        left, top = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") * (room[i] + 1) >> 64 for i in range(2))
    return Crop(width, height, resized, (left, top, *size))


def open_image(data: bytes, limits: LimitsConfig) -> Image.Image:
    """Opens an image by reading only its header. Raises RecordRejected: image_unreadable, image_truncated, or
    image_too_large (according to the header; no pixel is decoded)."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (UnidentifiedImageError, *UNREADABLE) as error:
        raise _unreadable(data, error) from None
    if image.width < 1 or image.height < 1:
        raise RecordRejected("image_unreadable", "it has no pixels")
    if image.width * image.height > limits.pixels:
        raise RecordRejected("image_too_large", f"{image.width} x {image.height} pixels")
    return image


def decode_image(image: Image.Image, data: bytes) -> Image.Image:
    """Decodes an opened image to upright RGB. data: the bytes of its file. Raises RecordRejected: image_unreadable or
    image_truncated."""
    try:
        image.load()
        return _to_rgb(_upright(image))
    except UNREADABLE as error:
        raise _unreadable(data, error) from None


def _unreadable(data: bytes, error: Exception) -> RecordRejected:
    return RecordRejected("image_truncated" if _is_cut(data) else "image_unreadable", str(error))


def crop_image(image: Image.Image, crop: Crop) -> np.ndarray:
    """Resizes an image with antialiasing and crops it to (height, width, 3) uint8 RGB."""
    if image.size != crop.resized:
        image = image.resize(crop.resized, FILTERS[RESIZE])
    return np.asarray(_cut(image, crop))


def crop_labels(data: bytes, crop: Crop, limits: LimitsConfig) -> np.ndarray:
    """Crops a label map (a PNG of class numbers, as large as its image) like the image, without mixing classes.

    Returns (height, width) uint8. Raises RecordRejected: labels_unreadable or labels_size.
    """
    try:
        labels: Image.Image = Image.open(io.BytesIO(data), formats=("PNG",))
        if labels.size != (crop.width, crop.height) or labels.width * labels.height > limits.pixels:
            raise RecordRejected("labels_size", f"{labels.size} beside an image of {(crop.width, crop.height)}")
        labels.load()
    except (UnidentifiedImageError, *UNREADABLE) as error:
        raise RecordRejected("labels_unreadable", str(error)) from None
    if labels.mode not in ("L", "P"):
        raise RecordRejected("labels_unreadable", f"its mode is {labels.mode}, not 8-bit grey or palette")
    if labels.size != crop.resized:
        labels = labels.resize(crop.resized, Image.Resampling.NEAREST)
    return np.asarray(_cut(labels, crop))


def _cut(image: Image.Image, crop: Crop) -> Image.Image:
    left, top, width, height = crop.box
    return image if image.size == crop.size else image.crop((left, top, left + width, top + height))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except UNREADABLE:
        return image  # damaged EXIF is ignored, as the pixels may be intact
    return image.transpose(turn) if turn is not None else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _is_cut(data: bytes) -> bool:
    """Whether the bytes begin like a JPEG, PNG or WebP file and lack its end."""
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data[-64:]
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False
