"""Batches on their way to the device while the loop is busy: page-locked memory, and a CUDA stream of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.reading.batch import Batch
from pipeline.data.reading.memory import Pool


@dataclass
class Moved:
    """A batch whose tensors are being copied; `arrived` when they are there, None where nothing is to be waited for."""

    batch: Batch
    arrived: torch.cuda.Event | None = None


class Mover:
    """Takes batches to `device`. On a CPU they stay where they are, in memory that is used again."""

    def __init__(self, device: torch.device, pool: Pool) -> None:
        self._device, self._pool = device, pool
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, count: int) -> np.ndarray:
        """Memory to collate into: page-locked where a GPU reads it (PyTorch keeps that, and waits for copies from it
        before it is used again)."""
        if self._stream is None:
            return self._pool.take(count)
        return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()

    def send(self, batch: Batch) -> Moved:
        """Begins the copy; from whatever thread."""
        if self._stream is None:
            return Moved(batch)
        with torch.cuda.stream(self._stream):
            batch.tensors = {name: t.to(self._device, non_blocking=True) for name, t in batch.tensors.items()}
            return Moved(batch, self._stream.record_event())

    def receive(self, moved: Moved) -> Batch:
        """The batch, for work on the current stream."""
        if moved.arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(moved.arrived)
            for tensor in moved.batch.tensors.values():
                tensor.record_stream(current)
        return moved.batch
