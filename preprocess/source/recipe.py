"""What is done to every sample, apart from the encoders: all that a decoding worker needs to know.

It comes from the configuration of `encode`, and again from a cache's contract when `verify` and `reference` go back to
the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.config import EncodeConfig, FiltersConfig, LimitsConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """One dataset that a pass makes.

    resolution: side in pixels of the square whose area its crops have. sizes: (width, height) of the crops.
    """

    resolution: int
    sizes: tuple[tuple[int, int], ...]

    def nearest(self, width: int, height: int) -> int:
        """Number of the size whose aspect ratio is nearest to an image's, on a logarithmic scale; of two, the first."""
        aspect = math.log(width / height)
        return min(range(len(self.sizes)), key=lambda i: abs(aspect - math.log(self.sizes[i][0] / self.sizes[i][1])))


@dataclass(frozen=True)
class Recipe:
    """Targets, crop policy, filters and limits; the fields are EncodeConfig's."""

    targets: tuple[Target, ...]
    crop: str = "centre"
    seed: int = 0
    flip: bool = False
    caption_key: str = "txt"
    conditions: tuple[str, ...] = ()
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    @property
    def variants(self) -> int:
        """Records per accepted sample."""
        return 2 if self.flip else 1


def recipe_of(config: EncodeConfig) -> Recipe:
    """The recipe of a configuration. Raises ConfigError when buckets cannot be formed."""
    return Recipe(
        targets=tuple(
            Target(side, bucket_sizes(side, config.buckets, config.bucket_aspect)) for side in config.resolution
        ),
        crop=config.crop,
        seed=config.seed,
        flip=config.flip,
        caption_key=config.caption_key,
        conditions=config.conditions,
        filters=config.filters,
        limits=config.limits,
    )


def recipe_of_contract(contract: Contract) -> Recipe:
    """The recipe that a cache was made by, without its conditions."""
    return Recipe(
        targets=(Target(contract.resolution, contract.buckets),),
        crop=contract.crop,
        seed=contract.seed,
        flip=contract.flip,
        caption_key=contract.caption_key,
        filters=from_dict(FiltersConfig, contract.filters),
        limits=from_dict(LimitsConfig, contract.limits),
    )


def bucket_sizes(resolution: int, step: int, most_aspect: float) -> tuple[tuple[int, int], ...]:
    """(width, height) of aspect-ratio buckets, from narrow to wide (Podell et al. 2023, section 2.3).

    Sides are multiples of `step`, areas resolution^2 at most and as near to it as the step allows, longer sides at most
    `most_aspect` times the shorter. step 0: the square alone.
    """
    if step == 0:
        return ((resolution, resolution),)
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // short // step * step
        if long >= short and long <= most_aspect * short:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        raise ConfigError(f"buckets={step}: no multiple of it fits resolution={resolution}")
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))
