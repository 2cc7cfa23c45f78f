"""What a row of training metrics holds: means over the steps since the last one, and the time of each of them.

A step waits for the data of all ranks, so it takes as long as the rank that takes longest, and so does its wait.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.timesteps import BUCKETS
from pipeline.distributed.world import World

KIB = 1024  # unit of ru_maxrss on Linux


class Meter:
    """Means over the steps since the last row of metrics. peak: TFLOP/s of one device; 0 = not known."""

    def __init__(self, world: World, peak: float = 0.0) -> None:
        self._world, self._peak = world, peak
        self.notes: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._loss: Tensor | float = 0.0
        self._buckets: Tensor | None = None  # sums of losses and their numbers, by noise
        self._samples = 0
        self._flops = 0.0
        self._norms: list[float] = []
        self._times: list[tuple[float, float]] = []  # each step's, in all and on data

    def add(
        self,
        loss_B: Tensor,
        samples: int,
        seconds: float,
        wait: float,
        *,
        bucket_B: Tensor | None = None,
        flops: float = 0.0,
        norm: float = 0.0,
    ) -> None:
        """One step: this rank's losses (b,) and the buckets of their noise levels (b,), the global batch's size, this
        rank's time, in all and on data, the FLOPs of the global batch, and the gradient's norm."""
        loss_B = loss_B.double()
        self._loss = self._loss + loss_B.mean()  # stays on the device until flush
        if bucket_B is not None:
            if self._buckets is None:
                self._buckets = loss_B.new_zeros(2, BUCKETS)
            self._buckets[0].index_add_(0, bucket_B, loss_B)
            self._buckets[1].index_add_(0, bucket_B, torch.ones_like(loss_B))
        self._samples += samples
        self._flops += flops
        self._norms.append(norm)
        self._times.append((seconds, wait))

    def flush(self) -> dict[str, Any]:
        """The loss's mean over ranks and steps, in all and by noise, and the times, as the metrics' names. Collective.

        loss_by_noise: by lower end of fifths of the noise levels, 0.0 being the least noise. tflops: of one device.
        memory_gb: of the rank that takes most: of the device where it is a GPU, else of its process.
        """
        steps = len(self._times)
        buckets = self._buckets.flatten().tolist() if self._buckets is not None else []
        loss, *totals = self._world.sum([float(self._loss), *buckets])
        found = self._world.gather((self._times, memory_bytes(self._world.device)))
        seconds, waits = np.max([times for times, _ in found], axis=0).T.tolist()
        row = {
            "loss": loss / self._world.size / steps,
            "grad_norm_max": max(self._norms),
            "images_per_s": self._samples / sum(seconds),
            "step_s": sum(seconds) / steps,
            "steps_s": [round(one, 6) for one in seconds],
            "data_wait_s": sum(waits) / steps,
            "memory_gb": max(memory for _, memory in found) / 1e9,
        }
        if totals:
            row["loss_by_noise"] = by_noise(totals)
        if self._flops:
            row["tflops"] = self._flops / sum(seconds) / self._world.size / 1e12
            if self._peak:
                row["mfu"] = row["tflops"] / self._peak
        self.notes = {"loss": row["loss"]}
        self._reset()
        return row


def by_noise(totals: Sequence[float]) -> dict[str, float]:
    """Means by lower end of each bucket, from sums and numbers; buckets that no sample fell into are left out."""
    pairs = zip(totals[:BUCKETS], totals[BUCKETS:], strict=True)
    return {f"{i / BUCKETS:.1f}": total / count for i, (total, count) in enumerate(pairs) if count}


def memory_bytes(device: torch.device) -> int:
    """The most that was held at once so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
