"""The inputs of a denoiser besides the noisy latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """The inputs of the UNet besides the noisy latent; None = the model has no such input. Rows are samples."""

    context: Tensor | None = None  # (B, L, D) tokens
    context_mask: Tensor | None = None  # (B, L) bool, True where a token may be attended to; None = everywhere
    concat: Tensor | None = None  # (B, C, h, w) channels after the latent's
    vector: Tensor | None = None  # (B, V)
    context_cache: ContextCache | None = None  # only in sampling: projections of the context (UNet.forward)

    def where(self, mask_B: Tensor, other: Conditioning) -> Conditioning:
        """Rows of `other` where mask_B (B,) bool is True, rows of `self` elsewhere."""
        return self._combine(other, lambda a, b: torch.where(mask_B.view(-1, *[1] * (a.ndim - 1)), b, a))

    def cat(self, other: Conditioning) -> Conditioning:
        """Rows of `self`, then rows of `other`."""
        return self._combine(other, lambda a, b: torch.cat([a, b]))

    def _combine(self, other: Conditioning, combine: Callable[[Tensor, Tensor], Tensor]) -> Conditioning:
        """Combine the two field by field; tensors of `other` are first cast to the dtype and device of `self`."""

        def combine_field(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            assert (a is None) == (b is None), "conditionings of different tasks"
            return None if a is None or b is None else combine(a, b.to(a))

        masks = [self.context_mask, other.context_mask]
        if any(mask is not None for mask in masks):
            masks = [_full_mask(c.context) if c.context_mask is None else c.context_mask for c in (self, other)]
        return Conditioning(
            combine_field(self.context, other.context),
            combine_field(*masks),
            combine_field(self.concat, other.concat),
            combine_field(self.vector, other.vector),
        )


def _full_mask(context_BLD: Tensor | None) -> Tensor:
    assert context_BLD is not None, "a context mask without a context"
    return torch.ones(context_BLD.shape[:2], dtype=torch.bool, device=context_BLD.device)


ContextCache = dict[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values of one context, (B, heads, M, width) each, by the cross-attention module that projected them: a
context that stays the same over all sampling steps is projected once."""
