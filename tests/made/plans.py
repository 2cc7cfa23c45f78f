"""How far ahead streams plan in tests.

A stream locates 2,048 batches before it gives the first. Of the few dozen records that a test trains on, those are
hundreds of epochs, each shuffled anew: half a second for every run. Batches are the same however far a stream plans.
"""

from __future__ import annotations

_PRODUCT: dict[str, float] = {}


def plan_shortly() -> None:
    """From here on, streams of this process plan 64 batches ahead, and end soon."""
    from pipeline.data.reading import stream

    if not _PRODUCT:
        _PRODUCT.update({name: getattr(stream, name) for name in ("PLAN_SAMPLES", "HORIZON_BATCHES", "POLL")})
    stream.PLAN_SAMPLES = stream.HORIZON_BATCHES = 64
    stream.POLL = 0.02


def plan_as_the_product() -> None:
    """From here on, streams of this process plan as far ahead as those of users."""
    from pipeline.data.reading import stream

    for name, value in _PRODUCT.items():
        setattr(stream, name, value)
