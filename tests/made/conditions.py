"""Contracts of caches with conditions, with the arrays that their facts call for."""

from __future__ import annotations

import dataclasses
from typing import Any

from made.cache import contract
from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.data.format.contract import Contract, TextFacts
from pipeline.data.format.members import arrays_of

ALL = Conditions(
    classes=ClassFacts(count=3, key="json:kind", names=("cat", "dog", "owl")),
    boxes=BoxFacts(count=5, most=4, min_area=0.01),
    labels=LabelFacts(count=7, grid=4, offset=1),
    lowres=LowresFacts(factor=4, degradation="bsr", variants=3),
    mask=MaskFacts(
        kinds=("thin", "rectangles"), variants=2, hole="black", pooling="nearest", order="masked_mask", low=-1
    ),
    pixels=True,
)
WITHOUT_TEXT: dict[str, Any] = {"text": None, "text_sha256": "", "caption_key": ""}
BUCKETS: dict[str, Any] = {"buckets": ((16, 16), (24, 8), (8, 24))}
PIXELS: dict[str, Any] = {"stored": "pixels", "latent_shape": (3, 16, 16), "downsampling": 1, "vae_sha256": ""}
TRIMMED = TextFacts(storage="trimmed", layer="last", length=3, width=8, pad=0, eot=5, vocabulary=50, start=4)


def with_arrays(**changes: Any) -> Contract:
    """The contract of made.cache with changes, and the arrays that its facts call for."""
    changed = contract(**{"conditions": Conditions(), **changes})
    return dataclasses.replace(changed, members=arrays_of(changed))


CONTRACTS: dict[str, Contract] = {
    "text": with_arrays(),
    "trimmed": with_arrays(text=TRIMMED),
    "tokens": with_arrays(text=dataclasses.replace(TRIMMED, storage="tokens")),
    "every condition": with_arrays(conditions=ALL),
    "every condition in buckets": with_arrays(conditions=ALL, **BUCKETS),
    "no text": with_arrays(**WITHOUT_TEXT),
    "classes alone": with_arrays(**WITHOUT_TEXT, conditions=Conditions(classes=ClassFacts(count=1000))),
    "latents": with_arrays(stored="latents", conditions=ALL, **WITHOUT_TEXT),
    "pixels": with_arrays(**PIXELS, **WITHOUT_TEXT),
    "pixels in buckets": with_arrays(**PIXELS, **BUCKETS, conditions=ALL),
    "pixels as PNGs": with_arrays(**PIXELS, **WITHOUT_TEXT, pixels="png"),
    "pixels as PNGs in buckets": with_arrays(**PIXELS, **BUCKETS, pixels="png", conditions=ALL),
}
"""Of every kind."""
