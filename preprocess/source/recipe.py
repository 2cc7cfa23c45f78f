"""The recipe: how every sample is processed before the encoders. A decoding worker needs to know nothing else.

`encode` takes it from its configuration; `verify` and `reference`, which read the source again, take it from the
cache's contract.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.conditions.facts import Conditions
from pipeline.config import EncodeConfig, FiltersConfig, LimitsConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract
from pipeline.data.format.crops import bucket_sizes as bucket_sizes
from pipeline.data.format.crops import nearest
from pipeline.models.encoders.tokenizer import picture_size
from preprocess.source.facts import conditions_of

NEW_COLOUR: Literal["srgb"] = "srgb"
"""What is done with colour profiles in a new cache, unless something else is asked for."""


@dataclass(frozen=True)
class Target:
    """One dataset that a pass over the source makes.

    resolution: side in pixels of a square whose area no crop exceeds. sizes: (width, height) of the crops in pixels.
    """

    resolution: int
    sizes: tuple[tuple[int, int], ...]

    def nearest(self, width: int, height: int) -> int:
        """Index of the size whose aspect ratio is nearest to that of an image on a logarithmic scale; the first of
        equals."""
        return nearest(self.sizes, width, height)


@dataclass(frozen=True)
class Recipe:
    """Targets, crop policy, filters and limits. The fields are those of EncodeConfig, but for `conditions`, which are
    the facts of what is made beside the image; caption_keys and captions: where captions are read, () for nowhere, and
    how many at most; lists: whether one place may hold several; `png`: whether crops are packed as PNGs (a contract's
    recipe does not, for nothing is compared with them); and `whole`: (width, height) in pixels of the picture that the
    CLIP score is of, (0, 0) without that filter."""

    targets: tuple[Target, ...]
    crop: str = "centre"
    seed: int = 0
    flip: bool = False
    caption_keys: tuple[str, ...] = ("txt",)
    captions: int = 1
    lists: bool = False
    conditions: Conditions = field(default_factory=Conditions)
    png: bool = False
    colour: str = "as_stored"
    whole: tuple[int, int] = (0, 0)
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    @property
    def caption_key(self) -> str:
        """Where captions are read first, "" for nowhere."""
        return self.caption_keys[0] if self.caption_keys else ""

    @property
    def reads_columns(self) -> bool:
        """Whether a condition is read from the json."""
        classes = self.conditions.classes
        return self.conditions.boxes is not None or (classes is not None and classes.key not in ("cls", "folder"))

    @property
    def variants(self) -> int:
        """Number of records per accepted sample."""
        return 2 if self.flip else 1


def recipe_of(config: EncodeConfig) -> Recipe:
    """The recipe that a configuration asks for. Raises ConfigError when there are no buckets of its step, or a
    condition is not told enough."""
    return Recipe(
        targets=tuple(
            Target(side, bucket_sizes(side, config.buckets, config.bucket_aspect)) for side in config.resolution
        ),
        crop=config.crop,
        seed=config.seed,
        flip=config.flip,
        caption_keys=config.caption_places,
        captions=config.captions,
        lists=config.captions_most > 0,
        conditions=conditions_of(config),
        png=config.pixels == "png",
        colour=config.colour or NEW_COLOUR,
        whole=picture_size(config.encoders) if config.filters.clip_score else (0, 0),
        filters=config.filters,
        limits=config.limits,
    )


def recipe_of_contract(contract: Contract) -> Recipe:
    """The recipe that a cache was made by."""
    text = contract.text
    return Recipe(
        targets=(Target(contract.resolution, contract.buckets),),
        crop=contract.crop,
        seed=contract.seed,
        flip=contract.flip,
        caption_keys=(text.keys or (contract.caption_key,)) if text else (),
        captions=text.captions if text else 0,
        lists=text is not None and text.captions > 1,
        conditions=contract.conditions,
        colour=contract.colour,
        filters=from_dict(FiltersConfig, contract.filters),
        limits=from_dict(LimitsConfig, contract.limits),
    )
