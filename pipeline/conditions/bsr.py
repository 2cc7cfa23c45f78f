"""The degradation "LDM-BSR" of Rombach et al. 2021 (appendix), a light form of BSRGAN's (Zhang et al. 2021): a blur,
two resizes, noise and JPEG in a drawn order, then JPEG once more.

Images are float32 (H, W, 3) in [0, 1]. Only elementwise sums and products touch them, which every machine rounds alike.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.conditions.draws import Draws
from pipeline.conditions.resampling import KERNELS, Kernel, gaussian, mirrored, normalised, resize, weighted

HALVED = (1, 4)
"""Chance that an image is first halved, at factor 4 alone."""
RESIZED = (4, 5)
"""Chance that the first resize is one to a drawn size, rather than a blur and every factor-th pixel."""
HALVING: tuple[Kernel, ...] = (*KERNELS, "antialiased")
JPEG = (9, 10)
"""Chance of JPEG among the steps; JPEG at the end is certain."""
QUALITY = (80, 95)
LEVELS = (1, 2)
"""Standard deviation of the noise, of 255."""
COLOURED, GREY, OF_BOTH = 4, 4, 2
"""Chances of noise of each channel by itself, of all channels alike, and of correlated channels."""
NEGLIGIBLE = 2.0**-12
"""Weights of a blur below this share of its largest are left out."""
SMALLEST = 1e-6
"""Variance of a blur in square pixels; smaller ones count as this one."""
GAUSSIAN = 25
"""Side of the blur before every factor-th pixel is taken."""
ONE = np.float32(1)


def degrade(pixels_HWC: np.ndarray, factor: int, key: str, variant: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H/factor, W/factor, 3) uint8; the factor divides H and W. All draws follow from the record's
    key and the variant."""
    draws = Draws("bsr", key, variant)
    height, width = (side // factor for side in pixels_HWC.shape[:2])
    image = pixels_HWC.astype(np.float32) / np.float32(255)
    if factor == 4 and _happens(draws, HALVED):
        half = (image.shape[0] // 2, image.shape[1] // 2)
        image = _clipped(resize(image, half, draws.choice(HALVING, (1, 1, 1, 3))))
        factor = 2
    steps = draws.shuffle(["blur", "first", "last", "noise", "jpeg"])
    first, last = steps.index("first"), steps.index("last")
    if first > last:
        steps[first], steps[last] = "last", "first"
    for step in steps:
        if step == "blur":
            image = _blur(image, factor, draws)
        elif step == "first":
            image = _clipped(_first_resize(image, factor, draws))
        elif step == "last":
            image = _clipped(resize(image, (height, width), draws.choice(KERNELS)))
        elif step == "noise":
            image = _clipped(image + _noise(image.shape[:2], draws))
        elif _happens(draws, JPEG):
            image = _jpeg(image, draws).astype(np.float32) / np.float32(255)
    return _jpeg(image, draws)


def _happens(draws: Draws, chance: tuple[int, int]) -> bool:
    return draws.integer(1, chance[1]) <= chance[0]


def _clipped(image: np.ndarray) -> np.ndarray:
    return np.clip(image, np.float32(0), ONE, out=image)


# --------------------------------------------------------------------------------------------------------------------
# Steps


def _blur(image: np.ndarray, factor: int, draws: Draws) -> np.ndarray:
    """Convolves with a Gaussian: with equal chances one of two drawn variances along a drawn direction, on 5 to 14
    pixels, or one that is round, on 5 to 7."""
    if draws.integer(0, 1):
        most = (4 + factor) / 4
        variances = (most * draws.uniform(), most * draws.uniform())
        side, (x, y) = draws.integer(5, 14), draws.direction()
    else:
        deviation = (2 + 0.2 * factor) / 4 * draws.uniform()
        variances = (deviation**2, deviation**2)
        side, (x, y) = draws.integer(5, 7), (1.0, 0.0)
    places = np.arange(side) - (side - 1) / 2
    along = x * places[None, :] + y * places[:, None]
    beside = x * places[:, None] - y * places[None, :]
    wide, narrow = (max(variance, SMALLEST) for variance in variances)
    return convolve(image, gaussian(0.5 * (along**2 / wide + beside**2 / narrow)))


def convolve(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The image blurred by weights of at most 1 that are alike seen from both ends, scaled to the sum 1; it is mirrored
    at its border. A side of an even number shifts the image by half a pixel, as in scipy."""
    weights = normalised(np.where(weights < NEGLIGIBLE * weights.max(), 0, weights))
    height, width = image.shape[:2]
    rows, columns = np.nonzero(weights)
    before = ((weights.shape[0] - 1) // 2, (weights.shape[1] - 1) // 2)
    up, down = max(before[0] - rows.min(), 0), max(rows.max() - before[0], 0)
    left, right = max(before[1] - columns.min(), 0), max(columns.max() - before[1], 0)
    padded = np.pad(image, ((up, down), (left, right), (0, 0)), mode="reflect").reshape(height + up + down, -1)
    total, product = np.zeros((height, 3 * width), np.float32), np.empty((height, 3 * width), np.float32)
    for row, column in zip(rows.tolist(), columns.tolist()):
        y, x = row - before[0] + up, 3 * (column - before[1] + left)
        np.multiply(padded[y : y + height, x : x + 3 * width], weights[row, column], out=product)
        np.add(total, product, out=total)
    return total.reshape(image.shape)


def _first_resize(image: np.ndarray, factor: int, draws: Draws) -> np.ndarray:
    """To a size that is smaller by 1 to 2 * factor; or blurred, and every factor-th pixel taken, from the middle of the
    first ones on."""
    height, width = image.shape[:2]
    if _happens(draws, RESIZED):
        by = draws.uniform(1, 2 * factor)
        return resize(image, (max(int(height / by), 1), max(int(width / by), 1)), draws.choice(KERNELS))
    deviation = draws.uniform(0.1, 0.6 * factor)
    line = gaussian(0.5 * ((np.arange(GAUSSIAN) - GAUSSIAN // 2) / deviation) ** 2)
    places = np.minimum(np.arange(GAUSSIAN) + (factor - 1) / 2, GAUSSIAN - 1)  # moved to the middle of the pixels
    low, share = places.astype(np.int64), places % 1
    weights = normalised((1 - share) * line[low] + share * line[np.minimum(low + 1, GAUSSIAN - 1)])
    for axis, side in ((0, height), (1, width)):
        taken = np.arange(0, side, factor)
        index = mirrored(taken[:, None] + np.arange(GAUSSIAN) - GAUSSIAN // 2, side)
        image = weighted(image, axis, index, np.broadcast_to(weights, index.shape))
    return image


def _noise(size: tuple[int, int], draws: Draws) -> np.ndarray:
    """(H, W, 3) or (H, W, 1) float32 of mean 0. Noise with correlated channels has the largest level."""
    level, most = (np.float32(level / 255) for level in (draws.integer(*LEVELS), LEVELS[1]))
    kind = draws.choice(("coloured", "grey", "both"), (COLOURED, GREY, OF_BOTH))
    if kind != "both":
        return level * draws.normal((*size, 3 if kind == "coloured" else 1))
    lower = _root_of_covariance(draws)
    normal = draws.normal((3, *size))
    channels = []
    for i in range(3):
        channel = np.float32(lower[i][0]) * normal[0]
        for j in range(1, i + 1):
            channel += np.float32(lower[i][j]) * normal[j]
        channels.append(most * channel)
    return np.stack(channels, axis=-1)


def _root_of_covariance(draws: Draws) -> list[list[float]]:
    """The lower triangle L with L L^T = |U^T D U|, for three drawn variances D in 0..1 and a drawn rotation U. (For
    three channels, the absolute values of a covariance are a covariance.)"""
    variances = [draws.uniform() for _ in range(3)]
    axes: list[list[float]] = []
    while len(axes) < 3:  # Gram and Schmidt
        axis = [draws.uniform() for _ in range(3)]
        for other in axes:
            shared = sum(a * b for a, b in zip(axis, other))
            axis = [a - shared * b for a, b in zip(axis, other)]
        length = sum(a * a for a in axis) ** 0.5
        if length > 1e-3:
            axes.append([a / length for a in axis])
    lower = [[0.0] * 3 for _ in range(3)]
    for i in range(3):
        for j in range(i + 1):
            covariance = abs(sum(d * axis[i] * axis[j] for d, axis in zip(variances, axes)))
            rest = covariance - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = max(rest, 0.0) ** 0.5 if i == j else rest / lower[j][j] if lower[j][j] > 1e-9 else 0.0
    return lower


def _jpeg(image: np.ndarray, draws: Draws) -> np.ndarray:
    """The image as uint8, through JPEG of a drawn quality with halved chroma."""
    file = io.BytesIO()
    levels = np.rint(image * np.float32(255)).astype(np.uint8)
    Image.fromarray(levels).save(file, "JPEG", quality=draws.integer(*QUALITY), subsampling="4:2:0")
    file.seek(0)
    return np.asarray(Image.open(file, formats=("JPEG",)))
