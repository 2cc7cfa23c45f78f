"""What open_dataset is asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The parameters of open_dataset, with the place that they have led to."""

    urls: tuple[str, ...]
    batch: int
    seed: int
    rank: int
    world: int
    samples: int | None
    sampled: bool
    members: tuple[str, ...] | None
    captions: bool
    weights: tuple[float, ...]
    columns: tuple[str, ...]
    tail: str
    memory_gb: float
    workers: int
    prefetch: int
    cache: str
    cache_gb: float
    device: str


def check(asked: Asked) -> None:
    """Raise ConfigError for values that can be known to be wrong before a cache is opened."""
    if not asked.urls or not all(asked.urls):
        raise ConfigError("no cache is named: give a folder or URL that `latentmill encode` wrote")
    if not 0 <= asked.seed < 1 << 64:
        raise ConfigError(f"seed={asked.seed}: a whole number from 0 to 2**64 - 1 is wanted")
    if asked.batch < 1 or asked.batch % asked.world:
        raise ConfigError(
            f"batch={asked.batch} is the global batch, which {asked.world} ranks share evenly: give a multiple of "
            f"{asked.world}"
        )
    if len(asked.urls) == 1 and asked.weights:
        raise ConfigError("weights are of several caches, and one is named: leave weights out")
    if asked.weights and (len(asked.weights) != len(asked.urls) or min(asked.weights) <= 0):
        raise ConfigError(f"weights={list(asked.weights)}: a positive number for each of the {len(asked.urls)} caches")
    if asked.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device={asked.device}: cpu, or cuda for a GPU, such as cuda:0")
    if asked.samples is not None and asked.samples < 1:
        raise ConfigError(f"samples={asked.samples}: at least 1, or None for an iteration without end")
