"""The interface of what `sample` gives its batches of images besides their conditioning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Protocol

from pipeline.diffusion.hooks import NO_HOOKS, Hooks


class Steering(Protocol):
    """Makes the hooks of one batch after another. An image's hooks are a function of its number and its row, whatever
    batch it is in."""

    @property
    def gradients(self) -> bool:
        """Whether its hooks follow gradients, so that the denoiser's weights must not be packed."""

    def hooks(self, numbers: Sequence[int], rows: Sequence[int], shape: tuple[int, int, int]) -> Hooks:
        """The hooks of images `numbers` (B) of the picture's rows `rows` (B), whose latents have `shape` (C, h, w)."""


def joined(hooks: Iterable[Hooks]) -> Hooks:
    """All of them together; NO_HOOKS for none."""
    return reduce(or_, hooks, NO_HOOKS)
