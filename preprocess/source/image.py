"""Turns the bytes of one untrusted image into a crop of RGB pixels, or into a reason of rejection.

Every mode of JPEG, PNG and WebP becomes 8-bit RGB: CMYK and greys by Pillow's conversion, 16-bit greys by their upper 8
bits, transparency (alpha, or a transparent colour) over white. Colour profiles are applied where that is asked for
(preprocess/colour). EXIF orientation is applied, and damaged EXIF says that the picture is upright. Of an animation the
first picture is used.

Decoders raise whatever they raise for damaged bytes, so every exception of theirs is a rejection.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageFile

from pipeline.config import LimitsConfig
from pipeline.data.format.crops import Crop as Crop
from pipeline.data.format.crops import place_crop as place_crop
from pipeline.errors import RecordRejected
from preprocess.colour.profiles import Outcome, profile_of
from preprocess.source import jpeg, png
from preprocess.source.rgb import to_rgb

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
MOST_CROPS = 16  # areas of the crop that a resized image may have, whatever limits.pixels says

Image.MAX_IMAGE_PIXELS = None  # open_image has its own limit, which a user can set
warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong is counted, not printed


def refuse_resized(crop: Crop, limits: LimitsConfig) -> None:
    """Raises RecordRejected, image_too_large, for an image so thin that it has more than limits.pixels pixels once it
    covers its crop."""
    width, height = crop.resized
    if width * height > max(limits.pixels, MOST_CROPS * crop.size[0] * crop.size[1]):
        raise RecordRejected(
            "image_too_large",
            f"{crop.width} x {crop.height} pixels would become {width} x {height} to cover a crop of "
            f"{crop.size[0]} x {crop.size[1]}, limits.pixels={limits.pixels}",
        )


def open_image(data: bytes, limits: LimitsConfig) -> ImageFile.ImageFile:
    """Opens an image by reading only its header. Raises RecordRejected: image_unreadable, image_truncated, or
    image_too_large (according to the header; no pixel is decoded)."""
    try:
        if data.startswith(png.START):
            png.refuse_chunks(data)
        elif data.startswith(jpeg.START):
            jpeg.refuse_header(data)
        canvas = _webp_canvas(data)
        if canvas > limits.pixels:  # before its decoder takes memory for it
            raise RecordRejected("image_too_large", f"{canvas} pixels")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except RecordRejected:
        raise
    except Exception as error:
        raise _unreadable(data, error) from None
    if image.width < 1 or image.height < 1:
        raise RecordRejected("image_unreadable", "it has no pixels")
    if image.width * image.height > limits.pixels:
        raise RecordRejected("image_too_large", f"{image.width} x {image.height} pixels")
    return image


def decode_image(image: ImageFile.ImageFile, data: bytes, colour: str = "as_stored") -> Image.Image:
    """Decodes an opened image to upright RGB. data: the bytes of its file. colour: as in the contract. Raises
    RecordRejected: image_unreadable, image_truncated, or image_too_large for a JPEG of too many scans."""
    return decode_colours(image, data, colour)[0]


def decode_colours(image: ImageFile.ImageFile, data: bytes, colour: str) -> tuple[Image.Image, Outcome]:
    """The same, and what became of its colour profile: "" where none is looked for."""
    depth = 8
    try:
        if data.startswith(jpeg.START):
            jpeg.load_jpeg(image, data, jpeg.read_segments(data))
        elif data.startswith(png.START):
            png.load_png(image, data)
            depth = png.depth(data)
        else:
            image.load()
        profile = profile_of(image.info) if colour == "srgb" else None
        rgb = to_rgb(_upright(image), depth, None if profile is None else profile.to_srgb)
        return rgb, "" if profile is None else profile.outcome
    except (RecordRejected, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(data, error) from None


def _webp_canvas(data: bytes) -> int:
    """Pixels of the canvas of an extended WebP; 0 for anything else."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return 0
    width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
    return width * height


def _unreadable(data: bytes, error: Exception) -> RecordRejected:
    is_cut = _is_cut(data) or "truncated" in str(error)
    return RecordRejected("image_truncated" if is_cut else "image_unreadable", str(error))


def crop_image(image: Image.Image, crop: Crop) -> np.ndarray:
    """Resizes an image with antialiasing and crops it to (height, width, 3) uint8 RGB."""
    return np.asarray(cut(resize_image(image, crop), crop))


def resize_image(image: Image.Image, crop: Crop) -> Image.Image:
    """The whole image with antialiasing in the size in which the crop is cut from it."""
    return image if image.size == crop.resized else image.resize(crop.resized, FILTERS[RESIZE])


def cut(image: Image.Image, crop: Crop) -> Image.Image:
    """The part of a resized image that the crop shows."""
    left, top, width, height = crop.box
    return image if image.size == crop.size else image.crop((left, top, left + width, top + height))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return image  # damaged EXIF is ignored, as the pixels may be intact
    return image.transpose(turn) if turn is not None else image


def _is_cut(data: bytes) -> bool:
    """Whether the bytes begin like a JPEG, PNG or WebP file and lack its end."""
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data[-64:]
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False
