"""Randomness as a pure function of (seed, stream, sample number): Philox4x32-10 (Salmon et al. 2011).

Nothing here keeps state, so a sample's numbers do not depend on world size, batch size or restarts. The counter of the
block cipher is (n low, n high, stream, block) and its key is the 64-bit seed (low, high); a block is four 32-bit words.
Words are bit-exact everywhere. Uniforms are exact fractions of words. Normals use only IEEE additions, products,
quotients and square roots, each rounded once, and no library's logarithm or sine, so a sample's normals do not depend
on how it is batched, on memory alignment or on vector width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

MULTIPLY = (0xD2511F53, 0xCD9E8D57)  # of lanes 0 and 2
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after every round
ROUNDS = 10
MASK = 0xFFFFFFFF
NUMPY_BLOCKS = 1 << 14  # up to this many blocks NumPy is faster on a CPU: its calls cost less (half the time at 4,096)
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio; odd, so its multiples visit all 64-bit fractions


class Stream(IntEnum):
    """What a random number is used for. The numbers are part of every run's identity and never change."""

    POSTERIOR = 0  # sample of the autoencoder's posterior
    TIMESTEP = 1  # noise level of a training sample
    NOISE = 2  # Gaussian noise added to a training latent
    FLIP = 3  # mirroring of images
    DROPOUT = 4  # conditioning replaced by the null one
    SHUFFLE = 5  # order of records
    EVAL_NOISE = 6  # noise of held-out losses
    SAMPLER = 7  # initial noise of sampled images
    OFFSET = 8  # offset noise: one normal per channel of a training latent
    VARIANT = 9  # which of a record's stored variants of a condition a sample sees
    CROP = 10  # place of a crop that is taken in training
    AUGMENT = 11  # noise added to a condition, and its level
    CODE = 12  # restarts of a codebook's entries
    CUTOUT = 13  # parts of a picture that CLIP sees while it guides
    CAPTION = 14  # which of a record's captions a sample sees


# --------------------------------------------------------------------------------------------------------------------
# Words


def words_numpy(seed: int, stream: int, n: np.ndarray, count: int) -> np.ndarray:
    """The first `count` words of each number n: (N,) integers in [0, 2**64) -> (N, count) uint32."""
    lanes = _blocks_numpy(seed, stream, np.asarray(n).astype(np.uint64), -(-count // 4))
    return np.stack(lanes, axis=-1).reshape(len(lanes[0]), -1)[:, :count].astype(np.uint32)


def words(seed: int, stream: int, n: Tensor, count: int, device: torch.device | str | None = None) -> Tensor:
    """The first `count` words of each number n: (B,) int64 -> (B, count) int64 in [0, 2**32). device: None = n's."""
    lanes = _blocks(seed, stream, n.to(device or n.device), -(-count // 4))
    return torch.stack(lanes, dim=-1).reshape(len(n), -1)[:, :count]


def rounds_numpy(counter: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """The cipher applied to four words in uint64 arrays that broadcast together."""
    x0, x1, x2, x3 = np.broadcast_arrays(*counter)
    mask, half = np.uint64(MASK), np.uint64(32)
    for key0, key1 in _round_keys(seed):
        product0, product1 = x0 * np.uint64(MULTIPLY[0]), x2 * np.uint64(MULTIPLY[1])
        x0, x1 = (product1 >> half) ^ x1 ^ np.uint64(key0), product1 & mask
        x2, x3 = (product0 >> half) ^ x3 ^ np.uint64(key1), product0 & mask
    return [x0, x1, x2, x3]


def rounds(counter: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The cipher applied to four words in int64 tensors that broadcast together (their products wrap like unsigned
    ones)."""
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    for key0, key1 in _round_keys(seed):
        product0, product1 = x0 * MULTIPLY[0], x2 * MULTIPLY[1]
        x0 = (product1 >> 32).bitwise_and_(MASK).bitwise_xor_(x1).bitwise_xor_(key0)
        x2 = (product0 >> 32).bitwise_and_(MASK).bitwise_xor_(x3).bitwise_xor_(key1)
        x1, x3 = product1.bitwise_and_(MASK), product0.bitwise_and_(MASK)
    return [x0, x1, x2, x3]


def _blocks_numpy(seed: int, stream: int, n: np.ndarray, blocks: int) -> list[np.ndarray]:
    """The four words of blocks 0 to blocks - 1 of each number (N,) uint64: four arrays (N, blocks) uint64."""
    low, high = (n & np.uint64(MASK))[:, None], (n >> np.uint64(32))[:, None]
    return rounds_numpy((low, high, np.full_like(low, int(stream)), np.arange(blocks, dtype=np.uint64)[None]), seed)


def _blocks(seed: int, stream: int, n: Tensor, blocks: int) -> list[Tensor]:
    """The four words of blocks 0 to blocks - 1 of each number: four tensors (B, blocks) int64."""
    if n.device.type == "cpu" and len(n) * blocks <= NUMPY_BLOCKS:
        lanes = _blocks_numpy(seed, stream, n.numpy().astype(np.uint64), blocks)
        return [torch.from_numpy(lane.view(np.int64)) for lane in lanes]
    low, high = (n & MASK)[:, None], ((n >> 32) & MASK)[:, None]
    block = torch.arange(blocks, dtype=torch.int64, device=n.device)[None]
    return rounds((low, high, torch.full_like(low, int(stream)), block), seed)


def _round_keys(seed: int) -> list[tuple[int, int]]:
    """The two key words of each round, from a seed in [0, 2**64)."""
    assert 0 <= seed < 1 << 64, f"seed {seed} is not a 64-bit unsigned integer"
    low, high = seed & MASK, seed >> 32
    return [((low + i * WEYL[0]) & MASK, (high + i * WEYL[1]) & MASK) for i in range(ROUNDS)]


def mix64(x: np.ndarray) -> np.ndarray:
    """A hash of each uint64 (Stafford's variant 13 of MurmurHash3's finalizer): every input bit reaches every output
    bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --------------------------------------------------------------------------------------------------------------------
# Distributions


def uniform(seed: int, stream: int, n: Tensor, count: int = 1) -> Tensor:
    """Uniform multiples of 2**-53 (two words each): (B,) int64 -> (B, count) float64 in [0, 1)."""
    pairs = words(seed, stream, n, 2 * count)
    high, low = pairs[:, 0::2] >> 5, pairs[:, 1::2] >> 6  # 27 and 26 bits
    return ((high << 26) | low).double() * 2.0**-53


def normal(seed: int, stream: int, n: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals by Box & Muller (1958): (B,) int64 -> (B, *shape) float32.

    Two words give two normals. Arithmetic is float64, rounded once at the end. The largest magnitude is 6.8.
    """
    count = math.prod(shape)
    lanes = _blocks(seed, stream, n, -(-count // 4))
    normals = []
    for radius_word, angle_word in (lanes[:2], lanes[2:]):
        radius = log_fraction(radius_word).mul_(-2.0).sqrt_()
        sine, cosine = _sine_cosine(angle_word)
        normals += [cosine.mul_(radius).float(), sine.mul_(radius).float()]
    return torch.stack(normals, dim=-1).reshape(len(n), -1)[:, :count].reshape(len(n), *shape)


SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # bit pattern of sqrt(1/2) in float64


def log_fraction(word: Tensor) -> Tensor:
    """ln((word + 1/2) / 2**32) in float64, to about 1e-11 relative."""
    bits = word.double().add_(0.5).mul_(2.0**-32).view(torch.int64)
    exponent = (bits - SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).view(torch.float64)  # in [sqrt(1/2), sqrt(2))
    s = (mantissa - 1.0).div_(mantissa.add_(1.0))  # ln m = 2 artanh s, |s| < 0.172
    square = s * s
    series = _horner(square, [2.0 / (2 * k + 1) for k in range(7)])
    return series.mul_(s).add_(exponent.double().mul_(math.log(2.0)))


def _sine_cosine(word: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi word / 2**32 - pi in float64: series at a quarter of the angle, then doubled twice."""
    quarter = word.double().sub_(2.0**31).mul_(math.pi / 2 / 2.0**32)  # in [-pi/4, pi/4)
    square = quarter * quarter
    sine = _horner(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]).mul_(quarter)
    cosine = _horner(square, [(-1) ** k / math.factorial(2 * k) for k in range(8)])
    for _ in range(2):
        sine, cosine = sine.mul(cosine).mul_(2.0), sine.mul_(sine).mul_(-2.0).add_(1.0)
    return sine, cosine


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """coefficients[0] + coefficients[1] x + coefficients[2] x**2 + ..."""
    total = (x * coefficients[-1]).add_(coefficients[-2])
    for coefficient in reversed(coefficients[:-2]):
        total.mul_(x).add_(coefficient)
    return total


# Wichura 1988 (algorithm AS 241, PPND16): numerator and denominator for each of two ranges, lowest power first.
# fmt: off
_CENTRAL = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)
# fmt: on


def normal_quantile(word: Tensor) -> Tensor:
    """The quantile z of a standard normal at (word + 1/2) / 2**32, in float64 to about 1e-10: |z| < 6.34.

    int64 in [0, 2**32) -> float64 of the same shape. z(word) = -z(2**32 - 1 - word) exactly.
    """
    centred = (word.double() - (2.0**31 - 0.5)).mul_(2.0**-32)
    square = (centred * centred).neg_().add_(0.180625)
    central = _horner(square, _CENTRAL[0]).div_(_horner(square, _CENTRAL[1])).mul_(centred)
    r = log_fraction(torch.minimum(word, MASK - word)).neg_().sqrt_().sub_(1.6)  # at most sqrt(33 ln 2) - 1.6
    tail = _horner(r, _TAIL[0]).div_(_horner(r, _TAIL[1]))
    return torch.where(centred.abs() <= 0.425, central, torch.where(centred < 0, -tail, tail))


def exponential(x: Tensor) -> Tensor:
    """e to the power of x in float64, to 3e-14 relative for |x| < 80; x is clamped to +-700."""
    x = x.clamp(-700.0, 700.0)
    exponent = x.mul(1 / math.log(2.0)).add_(0.5).floor_()
    remainder = x - exponent * math.log(2.0)  # |rest| < 0.35
    series = _horner(remainder, [1 / math.factorial(k) for k in range(15)])
    return series.mul_(((exponent.long() + 1023) << 52).view(torch.float64))


def stratified_uniform(seed: int, n: Tensor) -> tuple[Tensor, Tensor]:
    """u(n) = frac(u0(seed) + n / golden ratio): any consecutive values of n cover [0, 1) almost evenly.

    (B,) int64 -> the exact 64-bit fraction (B,), as the bit pattern of an int64, and its top 53 bits (B,), as float64
    in [0, 1).
    """
    offset = words(seed, Stream.TIMESTEP, torch.zeros(1, dtype=torch.int64, device=n.device), 2)
    start = (offset[:, 0] << 32) | offset[:, 1]
    fraction = start + n * (GOLDEN - (1 << 64))  # the same step modulo 2**64, as a signed integer
    return fraction, ((fraction >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
