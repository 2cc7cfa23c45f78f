"""What a row of training metrics holds: means over the steps since the last one, and the time of each of them."""

from __future__ import annotations

from typing import Any

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
        self._samples, self._wait = 0, 0.0
        self._seconds: list[float] = []

    def add(self, loss_B: Tensor, samples: int, seconds: float, wait: float) -> None:
        """One step: this rank's losses (b,), the global batch's size, and this rank's time, in all and on data."""
        self._loss = self._loss + loss_B.double().mean()  # stays on the device until flush
        self._samples += samples
        self._seconds.append(seconds)
        self._wait += wait

    def flush(self) -> dict[str, Any]:
        """The means over ranks and steps, and every step's mean over ranks, as the metrics' names. Collective."""
        steps = len(self._seconds)
        loss, wait, *seconds = (
            total / self._world.size for total in self._world.sum([float(self._loss), self._wait, *self._seconds])
        )
        row = {
            "loss": loss / steps,
            "images_per_s": self._samples / sum(seconds),
            "step_s": sum(seconds) / steps,
            "steps_s": [round(one, 6) for one in seconds],
            "data_wait_s": wait / steps,
        }
        self.notes = {"loss": row["loss"]}
        self._reset()
        return row
