"""Which size of crop an image becomes, and where the crop lies in it: arithmetic on sizes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError


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


def nearest(sizes: Sequence[tuple[int, int]], width: int, height: int) -> int:
    """Index of the (width, height) of `sizes` whose aspect ratio is nearest to that of an image on a logarithmic scale;
    the first of equals."""
    aspect = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(aspect - math.log(sizes[i][0] / sizes[i][1])))


def bucket_sizes(resolution: int, step: int, most_aspect: float) -> tuple[tuple[int, int], ...]:
    """(width, height) of aspect-ratio buckets, from narrow to wide (Podell et al. 2023, section 2.3).

    Sides are multiples of `step`; areas are at most resolution^2 and as near to it as the step allows; longer sides are
    at most `most_aspect` times the shorter ones. With step 0 there is only the square. Raises ConfigError where no
    multiple fits.
    """
    if step == 0:
        return ((resolution, resolution),)
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // short // step * step
        if long >= short and long <= most_aspect * short:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        raise ConfigError(f"buckets={step}: no multiple of it fits resolution={resolution}")
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))
