"""DDIM, DPM-Solver++, Heun and UniPC: functions (predict, levels, x) -> x at the last level."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from torch import Tensor

from pipeline.diffusion.levels import Level
from pipeline.diffusion.prediction import to_eps

Predict = Callable[[Tensor, Level], Tensor]


def ddim(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, equation 12 with sigma = 0): first order, one prediction per step.

    In rectified flow and in Karras et al. 2022 it is Euler's method (algorithm 1 without its correction).
    """
    for level, next_level in itertools.pairwise(levels):
        x0 = predict(x, level)
        x = next_level.alpha * x0 + next_level.sigma * to_eps(x0, x, level.alpha, level.sigma)
    return x


def dpmpp_2m(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order, from the previous prediction.

    Three steps are DDIM's: the first, which has no previous prediction; a last step to zero noise; and the step after
    one from pure noise (h = infinity).
    """
    last_x0, last_h = None, 0.0
    for level, next_level in itertools.pairwise(levels):
        x0 = predict(x, level)
        h = next_level.log_snr - level.log_snr
        slope = x0
        if last_x0 is not None and next_level.sigma > 0:
            slope = x0 + (x0 - last_x0) * (h / (2 * last_h))  # D_i, with r = last_h / h
        x = (next_level.sigma / level.sigma) * x - next_level.alpha * math.expm1(-h) * slope
        last_x0, last_h = x0, h
    return x


def heun(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1 without noise): second order, two predictions per step, and one
    in the last step, to no noise.

    The slope is that of x = alpha x_0 + sigma noise along a straight line in (alpha, sigma): the derivative by sigma
    where alpha is 1, as in the paper, and by t in rectified flow.
    """
    for level, next_level in itertools.pairwise(levels):
        x0 = predict(x, level)
        step = _straight_step(level, next_level, x0, to_eps(x0, x, level.alpha, level.sigma))
        if next_level.sigma > 0:
            next_x = x + step
            x0 = predict(next_x, next_level)
            step = (
                step + _straight_step(level, next_level, x0, to_eps(x0, next_x, next_level.alpha, next_level.sigma))
            ) / 2
        x = x + step
    return x


def _straight_step(level: Level, next_level: Level, x0: Tensor, eps: Tensor) -> Tensor:
    return (next_level.alpha - level.alpha) * x0 + (next_level.sigma - level.sigma) * eps


def unipc(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023, algorithms 5 and 6, data prediction, B(h) = exp(h) - 1): the step of
    DPM-Solver++(2M), corrected with the next level's prediction, which costs no extra prediction.

    The order is lower at both ends: the first step has no previous prediction, and the last step is DDIM's.
    """
    history: list[tuple[float, Tensor]] = []  # log SNR and predicted x_0 of the last two levels
    previous_level: Level | None = None
    start, order = x, 1  # of the step that led to this level
    for level, next_level in itertools.pairwise(levels):
        x0 = predict(x, level)
        if previous_level is not None:
            x = _corrected(start, previous_level, level, history, order, x0)
        history = [*history[-1:], (level.log_snr, x0)]
        previous_level, start, order = level, x, len(history)
        h = next_level.log_snr - level.log_snr
        slope = x0
        if order == 2 and next_level.sigma > 0:
            slope = x0 + (x0 - history[0][1]) * (h / (2 * (level.log_snr - history[0][0])))
        else:
            order = 1
        x = (next_level.sigma / level.sigma) * x - next_level.alpha * math.expm1(-h) * slope
    return x


def _corrected(
    start: Tensor, previous_level: Level, level: Level, history: list[tuple[float, Tensor]], order: int, x0: Tensor
) -> Tensor:
    """UniC: repeat the step from `previous_level` to `level` with the prediction x0 that was made at its end."""
    h = level.log_snr - previous_level.log_snr
    decay = math.expm1(-h)
    last = history[-1][1]
    change = (x0 - last) / 2
    if order == 2:
        ratio = (history[0][0] - history[-1][0]) / h  # r_1 < 0
        phi = -decay / h - 1  # h phi_2(-h)
        first, second = phi / decay, 2 * (-phi / h - 0.5) / decay  # required moments of the two weights
        weight = (first - second) / (1 - ratio)
        change = (first - weight) * (x0 - last) + weight / ratio * (history[0][1] - last)
    return (level.sigma / previous_level.sigma) * start - level.alpha * decay * (last + change)


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": ddim, "heun": heun, "unipc": unipc}
"""Samplers by name. Euler's method takes DDIM's steps: the two differ only in their levels (levels.py), and those only
in the discrete process."""
