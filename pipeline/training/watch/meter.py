"""Measures the figures of a row of training metrics: means over the steps since the last row, and each step's time.

A step waits for the data of all ranks, so its time, and its wait, are those of the slowest rank.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.timesteps import BUCKETS
from pipeline.distributed.world import World

KIB = 1024  # unit of ru_maxrss on Linux


class Meter:
    """Accumulates figures since the last row of metrics. peak: TFLOP/s of one device, 0 = not known. notes: figures of
    the last row that the progress bar shows."""

    def __init__(self, world: World, peak: float = 0.0) -> None:
        self._world, self._peak = world, peak
        self.notes: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._loss: Tensor | float = 0.0
        self._buckets: Tensor | None = None  # (2, BUCKETS) sums of losses, and numbers of samples, by noise level
        self._samples = 0
        self._flops = 0.0
        self._norms: list[float] = []  # of the first part's gradient
        self._figures: dict[str, list[Tensor]] = {}
        self._times: list[tuple[float, float]] = []  # of each step: seconds in all, and of them waiting for data

    def add(
        self,
        loss_B: Tensor,
        samples: int,
        seconds: float,
        wait: float,
        *,
        bucket_B: Tensor | None = None,
        flops: float = 0.0,
        norms: Mapping[str, float] = MappingProxyType({"": 0.0}),
        figures: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Add one step. loss_B: (b,) this rank's losses. samples: size of the global batch. seconds: this rank's time.
        wait: seconds of it spent waiting for data. bucket_B: (b,) bucket of each sample's noise level. flops: of the
        global batch. norms: of the gradient of each part, of which the first's largest is shown. figures: further
        means over this rank's samples."""
        loss_B = loss_B.double()
        self._loss = self._loss + loss_B.mean()  # stays on the device until flush
        if bucket_B is not None:
            if self._buckets is None:
                self._buckets = loss_B.new_zeros(2, BUCKETS)
            self._buckets[0].index_add_(0, bucket_B, loss_B)
            self._buckets[1].index_add_(0, bucket_B, torch.ones_like(loss_B))
        self._samples += samples
        self._flops += flops
        self._norms.append(next(iter(norms.values())))
        for name, value in figures.items():
            self._figures.setdefault(name, []).append(torch.as_tensor(value).detach())
        self._times.append((seconds, wait))

    def flush(self) -> dict[str, Any]:
        """The row of metrics, and start anew. Collective.

        loss: mean over ranks and steps. loss_by_noise: the same by the lower end of each fifth of the noise levels, 0.0
        being the least noise. tflops: of one device. memory_gb: peak memory of the rank that uses most: of its device
        where that is a GPU, else of its process.
        """
        steps = len(self._times)
        buckets = self._buckets.flatten().tolist() if self._buckets is not None else []
        names = sorted(self._figures)
        means = [torch.stack(self._figures[name]).double().mean().item() for name in names]
        loss, *sums = self._world.sum([float(self._loss), *means, *buckets])
        bucket_totals = sums[len(names) :]
        by_rank = self._world.gather((self._times, memory_bytes(self._world.device)))
        seconds, waits = np.max([times for times, _ in by_rank], axis=0).T.tolist()
        row = {
            "loss": loss / self._world.size / steps,
            **{name: total / self._world.size for name, total in zip(names, sums)},
            "grad_norm_max": max(self._norms),
            "images_per_s": self._samples / sum(seconds),
            "step_s": sum(seconds) / steps,
            "steps_s": [round(step_seconds, 6) for step_seconds in seconds],
            "data_wait_s": sum(waits) / steps,
            "memory_gb": max(memory for _, memory in by_rank) / 1e9,
        }
        if bucket_totals:
            row["loss_by_noise"] = by_noise(bucket_totals)
        if self._flops:
            row["tflops"] = self._flops / sum(seconds) / self._world.size / 1e12
            if self._peak:
                row["mfu"] = row["tflops"] / self._peak
        self.notes = {"loss": row["loss"]}
        self._reset()
        return row


def by_noise(totals: Sequence[float]) -> dict[str, float]:
    """Mean loss by the lower end of each bucket. totals: BUCKETS sums of losses, then BUCKETS numbers of samples.
    Buckets without samples are omitted."""
    pairs = zip(totals[:BUCKETS], totals[BUCKETS:], strict=True)
    return {f"{i / BUCKETS:.1f}": total / count for i, (total, count) in enumerate(pairs) if count}


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's tensors, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
