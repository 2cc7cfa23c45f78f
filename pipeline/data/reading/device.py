"""Copies batches to the device while the training loop computes: with page-locked memory and a separate CUDA stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.reading.batch import Batch
from pipeline.data.reading.memory import Pool


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU on `device`. A copy to a GPU is made from page-locked memory, and so is only queued:
    from other memory PyTorch waits for all work that the GPU has before it."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class PendingBatch:
    """A batch whose tensors are being copied. copied: the event of the copy's end; None if there is no copy."""

    batch: Batch
    copied: torch.cuda.Event | None = None


class BatchTransfer:
    """Copies batches to `device`. On a CPU they stay where they are, in memory of the pool."""

    def __init__(self, device: torch.device, pool: Pool) -> None:
        self._device, self._pool = device, pool
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, count: int) -> np.ndarray:
        """Memory to collate into: (count,) uint8, page-locked if a GPU reads it. PyTorch reuses page-locked memory only
        after copies from it have ended."""
        if self._stream is None:
            return self._pool.take(count)
        return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()

    def send(self, batch: Batch) -> PendingBatch:
        """Begin the copy of a batch; from any thread."""
        if self._stream is None:
            return PendingBatch(batch)
        with torch.cuda.stream(self._stream):
            batch.tensors = {name: t.to(self._device, non_blocking=True) for name, t in batch.tensors.items()}
            return PendingBatch(batch, self._stream.record_event())

    def receive(self, pending: PendingBatch) -> Batch:
        """The batch, ready for work on the current stream."""
        if pending.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(pending.copied)
            for tensor in pending.batch.tensors.values():
                tensor.record_stream(current)
        return pending.batch
