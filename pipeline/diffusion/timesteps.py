"""The noise level of a training sample: a pure function of (seed, sample number), in integers and IEEE arithmetic.

A sample's 32-bit word is drawn independently or from a low-discrepancy sequence. A density then turns it into a time,
always through its quantile function, so evenly spread words give times that are evenly spread in the density.
"""

from __future__ import annotations

import math

from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.process import PROCESSES
from pipeline.philox import Stream


def independent_words(seed: int, numbers_B: Tensor) -> Tensor:
    """Independent uniform words: (B,) int64 in [0, 2**32)."""
    return philox.words(seed, Stream.TIMESTEP, numbers_B, 1)[:, 0]


def stratified_words(seed: int, numbers_B: Tensor) -> Tensor:
    """Words that are uniform over a run and almost evenly spread over any part of it, so batch losses vary less: (B,)
    int64 in [0, 2**32)."""
    fraction, _ = philox.stratified_uniform(seed, numbers_B)
    return (fraction >> 32) & philox.MASK


def uniform(word_B: Tensor, mean: float, std: float) -> Tensor:
    """(word + 1/2) / 2**32: float64 in (0, 1). mean and std are not used."""
    return (word_B.double() + 0.5) * 2.0**-32


def logit_normal(word_B: Tensor, mean: float, std: float) -> Tensor:
    """t in (0, 1), float64, with logit(t) normal (Esser et al. 2024, section 3.1, equation 19)."""
    return 1 / (1 + philox.exponential(-(mean + std * philox.normal_quantile(word_B))))


def log_normal(word_B: Tensor, mean: float, std: float) -> Tensor:
    """sigma > 0, float64, with ln(sigma) normal (Karras et al. 2022, table 1: P_mean and P_std)."""
    return philox.exponential(mean + std * philox.normal_quantile(word_B))


WORDS = {"uniform": independent_words, "stratified": stratified_words}
DENSITIES = {"uniform": uniform, "logit_normal": logit_normal, "log_normal": log_normal}


def draw_times(seed: int, numbers_B: Tensor, config: DiffusionConfig) -> Tensor:
    """The times (B,) of the samples numbered `numbers_B` (int64), on that tensor's device, in the units of the
    configuration's process: int64 in [0, T) for the discrete process, else float32: t for flow, sigma for edm."""
    return times_of(WORDS[config.timestep_sampling](seed, numbers_B), config)


def quarter_times(seed: int, numbers_B: Tensor, config: DiffusionConfig, quarter: int, quarters: int) -> Tensor:
    """Times (B,) in one of `quarters` equally likely parts of the noise levels, from 0, the least noise, spread over it
    at random, in the units of draw_times."""
    return times_of((independent_words(seed, numbers_B) + (quarter << 32)) // quarters, config)


def times_of(word_B: Tensor, config: DiffusionConfig) -> Tensor:
    """The times (B,) of uniform words (B,) int64 in [0, 2**32), in the units of draw_times."""
    discrete = PROCESSES[config.prediction] == "discrete"
    if discrete and config.timestep_density == "uniform":
        return (word_B * config.timesteps) >> 32  # exact: integers only
    time = DENSITIES[config.timestep_density](word_B, config.timestep_mean, config.timestep_std)
    if discrete:
        return (time * config.timesteps).long().clamp_(max=config.timesteps - 1)
    return time.float()


BUCKETS = 5
"""Ranges of noise levels whose losses are logged separately."""


def noise_bucket(time_B: Tensor, config: DiffusionConfig) -> Tensor:
    """The fifth of the noise levels that each time (B,) of draw_times lies in, from 0, the least noise: int64 (B,). The
    fifths are of t in the discrete process and in flow, of ln(sigma) between sigma_min and sigma_max in edm."""
    process = PROCESSES[config.prediction]
    fraction = time_B.double()
    if process == "discrete":
        fraction = fraction / config.timesteps
    elif process == "edm":
        low, high = math.log(config.sigma_min), math.log(config.sigma_max)
        fraction = (fraction.log() - low) / (high - low)
    return (fraction * BUCKETS).long().clamp_(0, BUCKETS - 1)
