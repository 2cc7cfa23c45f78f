"""Averages of the weights, partitioned as the optimizer is.

Arithmetic over whatever flat fp32 views of the weights this rank owns: under ZeRO each rank averages its own share, in
1/N of the memory and time. A decay depends on n, the number of samples seen, and on nothing else. A run keeps one
exponential average (EMA), and as many others beside it as it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.config import EmaConfig
from pipeline.runs.profiles import OWN, gamma_of, kind_of

Decay = Callable[[int, int], float]
"""(n, batch) -> weight that an average keeps in the step that ends at n samples seen and saw `batch` of them."""


def ema_decay(n: int, batch: int, config: EmaConfig, half_life: float = 0.0) -> float:
    """Weight that the average keeps in the step that ends at n samples seen and saw `batch` of them, 0 to 1.

    The half-life in force is min(half_life, warmup x n) samples (Karras et al. 2022, appendix F). half_life: 0 for that
    of the configuration.
    """
    return 0.5 ** (batch / min(half_life or config.half_life, config.warmup * n))


def power_decay(n: int, batch: int, gamma: float) -> float:
    """The same of the power-function average of exponent gamma: (1 - batch / n) ^ (gamma + 1) (Karras et al. 2024,
    section 3.1). In the first step nothing is kept."""
    return (1.0 - batch / n) ** (gamma + 1.0)


def decays(config: EmaConfig) -> dict[str, Decay]:
    """Every average that a run keeps, by its kind."""
    found: dict[str, Decay] = {OWN: lambda n, batch: ema_decay(n, batch, config)}
    for half_life in config.half_lives:
        found[kind_of(half_life)] = lambda n, batch, half_life=half_life: ema_decay(n, batch, config, half_life)  # type: ignore[misc]
    for width in config.widths:
        gamma = gamma_of(width)
        found[kind_of(width)] = lambda n, batch, gamma=gamma: power_decay(n, batch, gamma)  # type: ignore[misc]
    return found


class Ema:
    """The averages of some weights; each starts as a copy of them.

    weights: flat fp32 tensors that the optimizer changes in place. averages: by kind, in the same order.
    """

    def __init__(self, config: EmaConfig, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self._decays = decays(config)
        self.averages = {kind: [weight.detach().clone() for weight in weights] for kind in self._decays}

    @torch.no_grad()
    def update(self, n: int, batch: int) -> None:
        """Take the weights after the step that ends at n samples seen into the averages."""
        for kind, averages in self.averages.items():
            if averages:
                torch._foreach_lerp_(averages, self.weights, 1.0 - self._decays[kind](n, batch))
