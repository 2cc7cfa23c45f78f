"""The guard against jumps of the loss: detects a step whose loss or gradient norm is far above its recent median.

It is asked before the optimizer steps, with figures of the whole global batch, so all ranks get the same answer. The
figures that it remembers are part of a commit: a resumed run decides as an undisturbed one does.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from pipeline.config import GuardConfig


class Guard:
    """skipped: number of jumps so far, whose steps are not taken. row: number of consecutive jumps up to now."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = 0
        self.row = 0
        self._recent = {name: deque[float](maxlen=config.window) for name in ("loss", "grad_norm")}

    @property
    def on(self) -> bool:
        """Whether the configuration asks for any action at a jump."""
        return self.config.action != "off"

    def jump(self, loss: float, grad_norm: float) -> str:
        """What has jumped, such as "loss is 3.1, 4.2 times its median of 128 steps"; "" when the step may be taken. The
        figures of such a step are remembered."""
        jumps = []
        for name, value, factor in (
            ("loss", loss, self.config.loss),
            ("grad_norm", grad_norm, self.config.grad_norm),
        ):
            recent = self._recent[name]
            if factor and len(recent) == self.config.window and value > factor * (median := statistics.median(recent)):
                jumps.append(f"{name} is {value:.4g}, {value / median:.1f} times its median of {len(recent)} steps")
        if jumps:
            self.skipped += 1
            self.row += 1
            return "; ".join(jumps)
        self._recent["loss"].append(loss)
        self._recent["grad_norm"].append(grad_norm)
        self.row = 0
        return ""

    def state(self) -> dict[str, Any]:
        """The state as plain data, for a commit; {} when the guard is off."""
        if not self.on:
            return {}
        figures = {name: list(recent) for name, recent in self._recent.items()}
        return {"skipped": self.skipped, "row": self.row, **figures}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a commit's state. {}: begin anew."""
        self.skipped, self.row = int(state.get("skipped", 0)), int(state.get("row", 0))
        for name, recent in self._recent.items():
            recent.clear()
            recent.extend(float(value) for value in state.get(name, ()))
