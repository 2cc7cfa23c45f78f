"""Numbers that follow from a UNet's configuration. Imports no torch: the network and what plans it read them here."""

from __future__ import annotations

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError


def depths_of(config: ModelConfig) -> list[int]:
    """Transformer blocks of an attention layer, by level; the middle has the last level's."""
    depth, levels = config.transformer_depth, len(config.multipliers)
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    if len(depths) != levels:
        raise ConfigError(f"model.transformer_depth={depths}: one number for each of the {levels} model.multipliers")
    return depths


def heads_of(config: ModelConfig, width: int) -> int:
    """Number of attention heads in a layer of `width` channels."""
    if (config.heads > 0) == (config.head_width > 0):
        raise ConfigError("model.heads and model.head_width: give one, and 0 for the other")
    divisor = config.heads or config.head_width
    if width % divisor:
        raise ConfigError(f"attention at width {width} does not divide by {divisor} (model.heads or model.head_width)")
    return config.heads or width // config.head_width
