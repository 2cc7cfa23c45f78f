"""Learning rates and periodic events, as functions of n, the samples seen."""

from __future__ import annotations

import math

from pipeline.config import OptimConfig


def learning_rate(n: int, samples: int, config: OptimConfig) -> float:
    """Learning rate of the step that begins at n samples seen: linear warm-up, then constant, or cosine decay to 0 at
    config.decay_samples, or else at `samples`, the run's last one."""
    factor = min(1.0, (n + config.batch) / config.warmup) if config.warmup > 0 else 1.0
    if config.decay == "cosine":
        end = config.decay_samples or samples
        progress = (n - config.warmup) / max(end - config.warmup, 1)
        factor *= 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.lr * factor


def due(n: int, every: int, batch: int) -> bool:
    """Whether an event that comes every `every` samples comes after the step that ends at n samples: whether a multiple
    of `every` lies in (n - batch, n]. every: 0 = never."""
    return every > 0 and n // every > (n - batch) // every
