"""The interface of objectives: from a batch of records to what is backpropagated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from pipeline.data.reading.batch import Batch


@dataclass
class Prepared:
    """One rank's samples on its device, with everything random that they get.

    images: (b, ...) what is looked at where a loss is not finite. digest: the draws whose hash the ledger holds, each
    (b, ...). bucket_B: (b,) the fifth of the noise levels that each sample is in; None without noise levels. what: what
    an image is called in messages.
    """

    what: ClassVar[str] = "latent"

    batch: Batch
    images: Tensor
    digest: Sequence[Tensor]
    bucket_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class StepLoss:
    """The loss of some samples. loss_B: (b,) each one's, which is recorded and guarded. total: scalar, whose gradient
    is taken. figures: scalars, means over these samples, that a row of metrics shows beside the loss."""

    loss_B: Tensor
    total: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """What a run minimizes. Everything that it draws is a function of (seed, sample number)."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Prepared:
        """A batch on the device, with its draws."""

    @abstractmethod
    def losses(self, prepared: Prepared, rows: slice) -> StepLoss:
        """The loss of the samples in these rows. Every rank calls it as often; it may be collective."""

    def flops(self, prepared: Prepared) -> float:
        """FLOPs of a training step of one image; 0 where they are not counted."""
        return 0.0

    def after_step(self, n: int) -> Mapping[str, Tensor]:
        """Called on every rank when the optimizer has stepped, at n samples seen. Returns figures for the next row of
        metrics. Collective."""
        return {}

    def row(self, n: int) -> Mapping[str, float]:
        """Figures of all samples since the last call, for the row of metrics at n samples. Collective."""
        return {}

    def warning(self, n: int) -> str:
        """What somebody should know after the row at n, in one sentence; "" for nothing. The same on every rank."""
        return ""

    def state(self) -> dict[str, Any]:
        """The objective's own state as plain data, which commits hold; {} where it has none."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a commit."""
        assert not state, "a commit of an objective that remembers more"
