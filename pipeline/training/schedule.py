"""How far a run is: learning rates, and what comes every so many samples, are functions of n, the samples seen."""

from __future__ import annotations

import math

from pipeline.config import OptimConfig


def learning_rate(n: int, samples: int, config: OptimConfig) -> float:
    """Of the step that begins at n of `samples` samples seen: linear warm-up, then constant or cosine to 0."""
    warm = min(1.0, (n + config.batch) / config.warmup) if config.warmup > 0 else 1.0
    if config.decay == "cosine":
        progress = (n - config.warmup) / max(samples - config.warmup, 1)
        warm *= 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.lr * warm


def due(n: int, every: int, batch: int) -> bool:
    """Whether a multiple of `every` lies in (n - batch, n]: what comes every so many samples comes after this step."""
    return every > 0 and n // every > (n - batch) // every
