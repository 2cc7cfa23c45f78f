"""The networks beside the one that is trained: an autoencoder's halves, a text tower, and what judges pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import EncodersConfig, FeaturesName
from pipeline.data.format.contract import Contract
from pipeline.planning.cached.encoders import stage_facts, tower_facts
from pipeline.planning.inference import StageShape, stage_shape
from pipeline.planning.parts import Cost, Layer, Part, Piece
from pipeline.planning.rates.stages import decoder_cost, encoder_cost, text_cost

UNKNOWN = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 2, 2, 4, 4)}
"""Widths of the levels of an autoencoder of which only the factor is known, over 128: as in Rombach et al. 2021."""
FEATURES: dict[FeaturesName, tuple[float, float]] = {
    "democlip": (0.06, 0.6),
    "inception": (11.4, 23.8),
    "inception_pytorch": (11.4, 23.8),
    "inception_clean": (11.4, 23.8),
    "clip_b32": (8.8, 87.8),
    "clip_l14": (162.0, 304.0),
    "clip_l14_336": (382.0, 304.3),
    "dinov2_s14": (12.0, 22.1),
    "dinov2_l14": (162.0, 304.4),
}
"""GFLOPs of one picture and millions of parameters of each network of features, by its publication; democlip by its
size."""


@dataclass(frozen=True)
class Encoders:
    """An autoencoder and a text tower, by their configuration files."""

    stage: StageShape | None
    """None for pixels."""
    tower_config: Mapping[str, Any]
    """Of open_clip; {} where captions are not read."""
    tokens: int
    """Tokens of a caption."""

    @classmethod
    def of(cls, config: EncodersConfig, contract: Contract) -> Encoders:
        """Those of a cache. contract: of it, which says what an unknown autoencoder makes. Raises ConfigError."""
        facts = stage_facts(config)
        if contract.stored == "pixels":
            stage = None
        elif (facts.channels, facts.downsampling) == (contract.latent_shape[0], contract.downsampling):
            stage = stage_shape(facts.config)
        else:
            widths = tuple(128 * multiplier for multiplier in UNKNOWN.get(contract.downsampling, UNKNOWN[8]))
            stage = StageShape(widths, 2, contract.latent_shape[0])
        tower = tower_facts(config).config if contract.text is not None else {}
        return cls(stage, tower, contract.text.length if contract.text is not None else 0)

    def encoder(self, contract: Contract, images: int) -> Cost | None:
        """Encoding so many pictures of a cache's size; None of pixels. Of what is stored beside them, masked pictures
        are encoded as well."""
        if self.stage is None:
            return None
        half, mask = encoder_cost(self.stage, images, *_pixels(contract)), contract.conditions.mask
        return half if mask is None else replace(half, parts=half.parts * (1 + mask.variants))

    def decoder(self, contract: Contract, images: int) -> Cost | None:
        """Decoding as many; None of pixels."""
        return None if self.stage is None else decoder_cost(self.stage, images, *_pixels(contract))

    def tower(self, captions: int) -> Cost | None:
        """Encoding so many captions; None where none are read."""
        text = self.tower_config.get("text_cfg")
        if not isinstance(text, Mapping) or not captions:
            return None
        cost = text_cost(self.tower_config, captions, self.tokens)
        words, width = int(text.get("vocab_size", 49_408)), int(text.get("width", 512))
        table = Layer(name="embed", kind="linear", flops=0, parameters=(words + self.tokens) * width)
        return replace(cost, parts=(Part("embed", (Piece(row="none", layers=(table,)),)), *cost.parts))


def _pixels(contract: Contract) -> tuple[int, int]:
    """(height, width) of a square crop."""
    _, height, width = contract.latent_shape
    return height * contract.downsampling, width * contract.downsampling


def features_cost(name: FeaturesName, images: int) -> Cost:
    """A network of features on so many pictures."""
    gflop, millions = FEATURES[name]
    layer = Layer(
        name=name, kind="conv", flops=round(gflop * 1e9 * images), parameters=round(millions * 1e6)
    )
    return Cost((Part(f"features.{name}", (Piece(row="none", layers=(layer,)),)),))
