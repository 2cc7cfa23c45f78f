"""Numbers that follow from a UNet's configuration, for the network and for planning. Imports no torch."""

from __future__ import annotations

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError


def depths_of(config: ModelConfig) -> list[int]:
    """Transformer blocks of an attention layer at each level; the middle block has as many as the last level. Raises
    ConfigError."""
    depth, levels = config.transformer_depth, len(config.multipliers)
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    if len(depths) != levels:
        raise ConfigError(f"model.transformer_depth={depths}: one number for each of the {levels} model.multipliers")
    return depths


def heads_of(config: ModelConfig, width: int) -> int:
    """Number of attention heads in a layer of `width` channels. Raises ConfigError."""
    if (config.heads > 0) == (config.head_width > 0):
        raise ConfigError("model.heads and model.head_width: give one, and 0 for the other")
    divisor = config.heads or config.head_width
    if width % divisor:
        raise ConfigError(f"attention at width {width} does not divide by {divisor} (model.heads or model.head_width)")
    return config.heads or width // config.head_width
