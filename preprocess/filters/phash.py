"""A 64-bit perceptual hash: pictures that look alike have hashes that differ in few bits.

Much as the hash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2: of
the picture's brightness in 32 x 32 pixels, the 8 x 8 lowest coefficients of a cosine transform; a bit says whether its
coefficient is above their median. (Zauner takes 1 to 8 half waves across and down; 0 to 7, as here, change less with
the size of a picture and with compression.) It is computed in whole numbers, so that it is the same on every machine.
Colours do not count, and all pictures of one plain colour have one hash.
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
    [[round(SCALE * math.cos(math.pi * k * (2 * n + 1) / (2 * SIDE))) for n in range(SIDE)] for k in range(WAVES)],
    dtype=np.int64,
)
"""(8, 32): the first rows of the cosine transform (type II) of 32 values, whose numbers are those of half waves."""


def perceptual_hash(image: Image.Image) -> bytes:
    """The hash of an RGB picture as BYTES bytes; the first bit, which stands for the mean, is 1."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.int64)
    centred = grey * grey.size - grey.sum()
    waves = (TRANSFORM @ centred @ TRANSFORM.T).reshape(-1)
    waves[0] = np.iinfo(np.int64).max
    median = np.sort(waves)[len(waves) // 2 - 1]  # the lower one
    return np.packbits(waves > median).tobytes()


def as_numbers(hashes: np.ndarray) -> np.ndarray:
    """Hashes (N, 8) uint8 -> (N,) uint64, of which bits differ as those of the hashes."""
    return np.ascontiguousarray(hashes).view(">u8").reshape(-1).astype(np.uint64)
