"""Averages of the weights, partitioned as the optimizer is.

Each rank averages the flat fp32 views of the weights that it owns: under ZeRO its own share, in 1/N of the memory and
time. A decay depends on n, the number of samples seen, and the batch alone. A run keeps one exponential moving average
(EMA), and further averages where the configuration asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.config import EmaConfig
from pipeline.runs.profiles import OWN, gamma_of, kind_of

Decay = Callable[[int, int], float]
"""(n, batch) -> decay, 0 to 1: the factor of the average in the step of `batch` samples that ends at n samples seen."""


def ema_decay(n: int, batch: int, config: EmaConfig, half_life: float = 0.0) -> float:
    """Decay of an exponential average, 0 to 1, in the step of `batch` samples that ends at n samples seen.

    Its half-life at n is min(half_life, warmup x n) samples (Karras et al. 2022, appendix F). half_life: 0 for the
    configuration's.
    """
    return 0.5 ** (batch / min(half_life or config.half_life, config.warmup * n))


def power_decay(n: int, batch: int, gamma: float) -> float:
    """Decay of the power-function average of exponent gamma: (1 - batch / n) ^ (gamma + 1) (Karras et al. 2024, section
    3.1). It is 0 in the first step."""
    return (1.0 - batch / n) ** (gamma + 1.0)


def decays(config: EmaConfig) -> dict[str, Decay]:
    """The decay of every average that a run keeps, by kind."""
    by_kind: dict[str, Decay] = {OWN: lambda n, batch: ema_decay(n, batch, config)}
    for half_life in config.half_lives:
        by_kind[kind_of(half_life)] = lambda n, batch, half_life=half_life: ema_decay(n, batch, config, half_life)  # type: ignore[misc]
    for width in config.widths:
        gamma = gamma_of(width)
        by_kind[kind_of(width)] = lambda n, batch, gamma=gamma: power_decay(n, batch, gamma)  # type: ignore[misc]
    return by_kind


class Ema:
    """The averages of the weights; each starts as a copy of them.

    weights: flat fp32 tensors that the optimizer changes in place. averages: by kind, in the order of the weights.
    """

    def __init__(self, config: EmaConfig, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self._decays = decays(config)
        self.averages = {kind: [weight.detach().clone() for weight in weights] for kind in self._decays}

    @torch.no_grad()
    def update(self, n: int, batch: int) -> None:
        """Update the averages with the weights after the step of `batch` samples that ends at n samples seen."""
        for kind, averages in self.averages.items():
            if averages:
                torch._foreach_lerp_(averages, self.weights, 1.0 - self._decays[kind](n, batch))
