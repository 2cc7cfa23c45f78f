"""The guard against jumps of the loss: is this step's loss, or its gradient, far beyond what they were of late?

Asked before the optimizer steps, with figures of the whole global batch, so all ranks come to the same answer. What it
has seen is part of a commit: a run that is gone on with decides as an undisturbed one does.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from pipeline.config import GuardConfig


class Guard:
    """skipped: steps that were dropped in all. row: of them, the last ones in a row."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = 0
        self.row = 0
        self._seen = {name: deque[float](maxlen=config.window) for name in ("loss", "grad_norm")}

    @property
    def on(self) -> bool:
        """Whether anything is to be done about jumps."""
        return self.config.action != "off"

    def jump(self, loss: float, grad_norm: float) -> str:
        """What has jumped, such as "loss is 3.1, 4.2 times its median of 128 steps"; "" when the step may be taken, and
        then its figures are remembered."""
        found = []
        for name, value, factor in (
            ("loss", loss, self.config.loss),
            ("grad_norm", grad_norm, self.config.grad_norm),
        ):
            seen = self._seen[name]
            if factor and len(seen) == self.config.window and value > factor * (usual := statistics.median(seen)):
                found.append(f"{name} is {value:.4g}, {value / usual:.1f} times its median of {len(seen)} steps")
        if found:
            self.skipped += 1
            self.row += 1
            return "; ".join(found)
        self._seen["loss"].append(loss)
        self._seen["grad_norm"].append(grad_norm)
        self.row = 0
        return ""

    def state(self) -> dict[str, Any]:
        """For a commit, as plain data; {} when it is off."""
        if not self.on:
            return {}
        return {"skipped": self.skipped, "row": self.row, **{name: list(seen) for name, seen in self._seen.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a commit's state; from {} as at the beginning."""
        self.skipped, self.row = int(state.get("skipped", 0)), int(state.get("row", 0))
        for name, seen in self._seen.items():
            seen.clear()
            seen.extend(float(value) for value in state.get(name, ()))
