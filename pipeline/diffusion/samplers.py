"""DDIM, DPM-Solver++, Heun, UniPC: functions of (predict, levels, x)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from torch import Tensor

from pipeline.diffusion.levels import Level
from pipeline.diffusion.prediction import to_eps

Predict = Callable[[Tensor, Level], Tensor]


def ddim(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, equation 12 with sigma = 0): first order, one prediction a step.

    It is Euler's method on the flow of rectified flow and of Karras et al. 2022 (algorithm 1 without its correction).
    """
    for now, then in itertools.pairwise(levels):
        x0 = predict(x, now)
        x = then.alpha * x0 + then.sigma * to_eps(x0, x, now.alpha, now.sigma)
    return x


def dpmpp_2m(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order by remembering the last prediction.

    The first step has no memory and a last step to zero noise has no second order; both are DDIM's, and so is the step
    after one from no signal at all (h = infinity).
    """
    last_x0, last_h = None, 0.0
    for now, then in itertools.pairwise(levels):
        x0 = predict(x, now)
        h = then.log_snr - now.log_snr
        slope = x0
        if last_x0 is not None and then.sigma > 0:
            slope = x0 + (x0 - last_x0) * (h / (2 * last_h))  # D_i, with r = last_h / h
        x = (then.sigma / now.sigma) * x - then.alpha * math.expm1(-h) * slope
        last_x0, last_h = x0, h
    return x


def heun(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1 without noise): second order, two predictions a step and one in
    the last, to no noise.

    The slope is that of x = alpha x_0 + sigma noise along a straight line of (alpha, sigma): of sigma where alpha is 1,
    as in the paper, and of t in rectified flow.
    """
    for now, then in itertools.pairwise(levels):
        x0 = predict(x, now)
        moved = _along(now, then, x0, to_eps(x0, x, now.alpha, now.sigma))
        if then.sigma > 0:
            there = x + moved
            x0 = predict(there, then)
            moved = (moved + _along(now, then, x0, to_eps(x0, there, then.alpha, then.sigma))) / 2
        x = x + moved
    return x


def _along(now: Level, then: Level, x0: Tensor, eps: Tensor) -> Tensor:
    return (then.alpha - now.alpha) * x0 + (then.sigma - now.sigma) * eps


def unipc(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023, algorithms 5 and 6, data prediction, B(h) = exp(h) - 1): DPM-Solver++(2M)'s
    step, corrected when the next level's prediction is there, which costs none.

    Lower order at both ends: the first step has no memory, and the last is DDIM's.
    """
    past: list[tuple[float, Tensor]] = []  # log SNR and x_0 of the last two levels
    before: Level | None = None
    start, order = x, 1  # of the step that led here
    for now, then in itertools.pairwise(levels):
        x0 = predict(x, now)
        if before is not None:
            x = _corrected(start, before, now, past, order, x0)
        past = [*past[-1:], (now.log_snr, x0)]
        before, start, order = now, x, len(past)
        h = then.log_snr - now.log_snr
        slope = x0
        if order == 2 and then.sigma > 0:
            slope = x0 + (x0 - past[0][1]) * (h / (2 * (now.log_snr - past[0][0])))
        else:
            order = 1
        x = (then.sigma / now.sigma) * x - then.alpha * math.expm1(-h) * slope
    return x


def _corrected(
    start: Tensor, before: Level, now: Level, past: list[tuple[float, Tensor]], order: int, x0: Tensor
) -> Tensor:
    """UniC: the step from `before` to `now` taken again, with the prediction x0 that was made at its end."""
    h = now.log_snr - before.log_snr
    decay = math.expm1(-h)
    last = past[-1][1]
    change = (x0 - last) / 2
    if order == 2:
        ratio = (past[0][0] - past[-1][0]) / h  # r_1 < 0
        phi = -decay / h - 1  # h phi_2(-h)
        first, second = phi / decay, 2 * (-phi / h - 0.5) / decay  # what the two weights' moments must be
        weight = (first - second) / (1 - ratio)
        change = (first - weight) * (x0 - last) + weight / ratio * (past[0][1] - last)
    return (now.sigma / before.sigma) * start - now.alpha * decay * (last + change)


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": ddim, "heun": heun, "unipc": unipc}
"""By name. Euler's method is DDIM's step: the two differ in their levels (levels.py), and there only in the discrete
process."""
