"""Reads event files as TensorBoard does, and says what it should find in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tracking.drawn import drawn

Points = Counter[tuple[str, int, float]]
"""How often each (name, n, value) is there; values in fp32, as TensorBoard keeps them."""


def accumulated(run: Path) -> Any:
    """TensorBoard's EventAccumulator of a run, which has read everything and thinned out nothing."""
    from tensorboard.backend.event_processing import event_accumulator

    guidance = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    found = event_accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance=guidance)
    return found.Reload()


def points(run: Path) -> Points:
    """The scalars that TensorBoard shows of a run."""
    found = accumulated(run)
    return Counter((tag, one.step, one.value) for tag in found.Tags()["scalars"] for one in found.Scalars(tag))


def points_of(rows: Iterable[Mapping[str, Any]]) -> Points:
    """The scalars that rows of metrics.jsonl hold."""
    return Counter((name, row["n"], float(np.float32(value))) for row in rows for name, value in drawn(row).items())
