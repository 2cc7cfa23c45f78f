"""The interface of what an evaluation gives its images besides their conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.diffusion.hooks import Hooks
from pipeline.evaluation.tasks.judge import Given


class RecordSteering(Protocol):
    """Makes the hooks of one batch after another. An image's hooks are a function of its number alone, whatever batch
    it is in."""

    @property
    def gradients(self) -> bool:
        """Whether its hooks follow gradients, so that the denoiser's weights must not be packed."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The keys of `latentmill eval` that it was asked by, and hashes of what it reads, for the card. Texts,
        numbers, yes or no, or lists of these, as JSON has them."""

    def hooks(self, numbers: Sequence[int], given: Given) -> Hooks:
        """The hooks of images `numbers` (B). given: what the judge sees of them."""
