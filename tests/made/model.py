"""The configuration of the smallest UNet."""

from __future__ import annotations

from made import cache as small_cache
from pipeline.config import ModelConfig

MODEL = ModelConfig(
    channels=8, multipliers=(1,), blocks=1, attention=(1,), heads=2, context_width=small_cache.WIDTH, norm_groups=4
)
