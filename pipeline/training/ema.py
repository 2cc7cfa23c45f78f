"""Exponential moving average of the weights, partitioned as the optimizer is.

Arithmetic over whatever flat fp32 views of the weights this rank owns: under ZeRO each rank averages its own share, in
1/N of the memory and time. The decay depends on n, the number of samples seen, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import EmaConfig


def ema_decay(n: int, batch: int, config: EmaConfig) -> float:
    """Weight that the average keeps in the step that ends at n samples seen and saw `batch` of them, 0 to 1.

    The half-life in force is min(half_life, warmup x n) samples (Karras et al. 2022, appendix F).
    """
    return 0.5 ** (batch / min(config.half_life, config.warmup * n))


class Ema:
    """The average of some weights; starts as a copy of them.

    weights: flat fp32 tensors that the optimizer changes in place. averages: the same shapes, in the same order.
    """

    def __init__(self, config: EmaConfig, weights: Sequence[Tensor]) -> None:
        self.config = config
        self.weights = list(weights)
        self.averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, n: int, batch: int) -> None:
        """Take the weights after the step that ends at n samples seen into the average."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self.weights, 1.0 - ema_decay(n, batch, self.config))
