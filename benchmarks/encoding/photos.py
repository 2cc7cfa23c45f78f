"""Source shards of generated images that cost what photographs cost, in img2dataset's layout.

Light falls off as in photographs (amplitude about 1 / frequency), over a gradient, with flat shapes and a little noise
of the sensor: at JPEG quality 85, 512x384 pixels take about 60 kB and 1024x768 about 220 kB.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.format.records import END_OF_TAR, tar_member

FALL = 1.2  # power of 1 / frequency
QUALITY = 85
WORDS = (
    ("a photograph of", "a picture of", "a close view of", "an old print of", "a sketch of", "somebody looking at"),
    ("a large", "a small", "the only", "a broken", "a very bright", "half of a", "a wet", "an upside down"),
    ("red", "green", "blue", "yellow", "purple", "cyan", "dark grey", "nearly white"),
    ("circle", "square", "triangle", "cross", "cloud", "wall", "window", "bicycle"),
    ("left of", "right of", "above", "below", "in front of", "reflected in", "far behind"),
    ("a house by the sea", "two trees in the morning light", "a street full of people", "an empty room", "a river"),
)


def photo(number: int, width: int, height: int) -> bytes:
    """Image `number`, a JPEG of width x height pixels. The same arguments always give the same pixels."""
    rng = np.random.default_rng(number)
    across, down = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    light = 120 + rng.uniform(-40, 40) * across + rng.uniform(-60, 60) * down + 38 * _clouds(rng, width, height)
    tint, tone = 14 * _clouds(rng, width, height), 14 * _clouds(rng, width, height)
    image = _image(np.stack([light + tint, light - 0.5 * tint - 0.3 * tone, light + tone], axis=-1))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 9))):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.04, 0.2) * height
        red, green, blue = (int(level) for level in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape((x - radius, y - 0.8 * radius, x + radius, y + 0.8 * radius), fill=(red, green, blue))
    out = io.BytesIO()
    _image(np.asarray(image) + 3 * rng.standard_normal((height, width, 1))).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def caption(number: int) -> str:
    """About a dozen words; no two numbers have the same."""
    rng = np.random.default_rng([number, 1])
    return " ".join(words[int(rng.integers(len(words)))] for words in WORDS) + f", number {number}"


def write_photos(folder: Path, *, width: int, height: int, distinct: int, images: int, shard: int) -> list[Path]:
    """Tars 00000.tar, ... of `shard` images each, below `folder`; found again when they are there. Their paths.

    Images beyond the first `distinct` repeat them, under keys and captions of their own.
    """
    place = folder / f"{width}x{height}-{distinct}-{images}-{shard}"
    paths = [place / f"{number:05d}.tar" for number in range(-(-images // shard))]
    done = place / "complete"
    if done.exists():
        return paths
    place.mkdir(parents=True, exist_ok=True)
    numbers = range(min(distinct, images))
    # Spawned: the verb's fork server must not be there before the verb has said what it is to import.
    with multiprocessing.get_context("spawn").Pool() as pool:
        photos = pool.starmap(photo, [(number, width, height) for number in numbers], chunksize=4)
    rows = iter(range(images))
    for number, path in enumerate(paths):
        with path.open("wb") as tar:
            for row in itertools.islice(rows, shard):
                key = f"{number:05d}{row - number * shard:05d}"
                for name, payload in _members(row, photos[row % len(photos)], width, height):
                    tar.write(tar_member(f"{key}.{name}", payload))
            tar.write(END_OF_TAR)
    done.touch()
    return paths


def read_photos(paths: list[Path], count: int) -> list[bytes]:
    """The first `count` JPEGs of the shards."""
    import tarfile

    def all_of_them() -> Iterator[bytes]:
        for path in paths:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        file = tar.extractfile(member)
                        assert file is not None
                        yield file.read()

    return list(itertools.islice(all_of_them(), count))


def _members(row: int, jpeg: bytes, width: int, height: int) -> list[tuple[str, bytes]]:
    """The members of one sample, as img2dataset names and orders them."""
    text = caption(row)
    facts = {
        "caption": text,
        "url": f"https://example.invalid/{row}.jpg",
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
    }
    return [("jpg", jpeg), ("json", json.dumps(facts).encode()), ("txt", text.encode())]


def _clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(height, width) noise of unit variance whose amplitude falls with frequency."""
    frequency = np.hypot(np.fft.rfftfreq(width)[None, :], np.fft.fftfreq(height)[:, None])
    frequency[0, 0] = np.inf
    waves = rng.standard_normal((2, *frequency.shape))
    field = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency**FALL, (height, width))
    return field / field.std()


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
