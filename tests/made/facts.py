"""Facts of a cache that a task depends on, without a cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.data.format.contract import TextFacts

EVERYTHING = Conditions(
    classes=ClassFacts(count=10),
    boxes=BoxFacts(count=25, most=6),
    labels=LabelFacts(count=25, grid=4),
    lowres=LowresFacts(factor=4, degradation="bicubic", variants=2),
    mask=MaskFacts(kinds=("rectangles",), variants=3),
)
"""Every condition; small images and masks in several variants."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """pipeline.config.tasks.base.Cache."""

    latent_shape: tuple[int, int, int] = (4, 8, 8)
    downsampling: int = 8
    scale: float = 1.0
    shift: float = 0.0
    conditions: Conditions = field(default_factory=Conditions)
    text: TextFacts | None = None
    trimmed: bool = False
