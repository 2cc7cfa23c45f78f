"""A 64-bit perceptual hash: pictures that look alike have hashes that differ in few bits.

The hash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2: of the
picture's brightness in 32 x 32 pixels, the 8 x 8 coefficients of a cosine transform with 1 to 8 half waves across and
down; a bit says whether its coefficient is above their median. It is computed in whole numbers, so that it is the same
on every machine. Colours do not count, and a picture without structure has the hash 0.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

NAME = "phash 1"
"""Of this hash, which contracts name; raise the number with any change of its values."""
BYTES = 8
SIDE, WAVES = 32, 8
SCALE = 1 << 12  # of the transform's coefficients in whole numbers
TRANSFORM = np.array(
    [
        [round(SCALE * math.cos(math.pi * k * (2 * n + 1) / (2 * SIDE))) for n in range(SIDE)]
        for k in range(1, WAVES + 1)
    ],
    dtype=np.int64,
)
"""(8, 32): rows 1 to 8 of the cosine transform (type II) of 32 values."""


def perceptual_hash(image: Image.Image) -> bytes:
    """The hash of an RGB picture as BYTES bytes; the first bit is of one half wave across and one down."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.int64)
    waves = (TRANSFORM @ grey @ TRANSFORM.T).reshape(-1)
    median = np.sort(waves)[len(waves) // 2 - 1]  # the lower one
    return np.packbits(waves > median).tobytes()


def as_numbers(hashes: np.ndarray) -> np.ndarray:
    """Hashes (N, 8) uint8 -> (N,) uint64, of which bits differ as those of the hashes."""
    return np.ascontiguousarray(hashes).view(">u8").reshape(-1).astype(np.uint64)
