"""What a row of training metrics holds: means over the steps since the last one, and the time of each of them.

A step waits for the data of all ranks, so it takes as long as the rank that takes longest, and so does its wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pipeline.training.distributed import World


class Meter:
    """Means over the steps since the last row of metrics."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.notes: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._loss: Tensor | float = 0.0
        self._samples = 0
        self._times: list[tuple[float, float]] = []  # each step's, in all and on data

    def add(self, loss_B: Tensor, samples: int, seconds: float, wait: float) -> None:
        """One step: this rank's losses (b,), the global batch's size, and this rank's time, in all and on data."""
        self._loss = self._loss + loss_B.double().mean()  # stays on the device until flush
        self._samples += samples
        self._times.append((seconds, wait))

    def flush(self) -> dict[str, Any]:
        """The loss's mean over ranks and steps, and the times, as the metrics' names. Collective."""
        steps = len(self._times)
        (loss,) = self._world.sum([float(self._loss)])
        seconds, waits = np.max(self._world.gather(self._times), axis=0).T.tolist()
        row = {
            "loss": loss / self._world.size / steps,
            "images_per_s": self._samples / sum(seconds),
            "step_s": sum(seconds) / steps,
            "steps_s": [round(one, 6) for one in seconds],
            "data_wait_s": sum(waits) / steps,
        }
        self.notes = {"loss": row["loss"]}
        self._reset()
        return row
