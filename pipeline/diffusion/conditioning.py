"""What a denoiser is given beside the noisy latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is given beside the noisy latent; None = the model has no such input. Rows are samples."""

    context: Tensor | None = None  # (B, L, D) tokens
    context_mask: Tensor | None = None  # (B, L) bool, True where a token may be attended to; None = everywhere
    concat: Tensor | None = None  # (B, C, h, w) channels after the latent's
    vector: Tensor | None = None  # (B, V)
    known: Known | None = None  # of sampling alone: what the UNet has computed of the context before (UNet.forward)

    def where(self, mask_B: Tensor, other: Conditioning) -> Conditioning:
        """The rows of `other` where mask_B (B,) bool is True, and this one's elsewhere."""
        return self._with(
            other, lambda mine, theirs: torch.where(mask_B.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)
        )

    def cat(self, other: Conditioning) -> Conditioning:
        """The rows of both, this one's first."""
        return self._with(other, lambda mine, theirs: torch.cat([mine, theirs]))

    def _with(self, other: Conditioning, combine: Callable[[Tensor, Tensor], Tensor]) -> Conditioning:
        """Field by field; `other` takes this one's dtype and device."""

        def both(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            assert (mine is None) == (theirs is None), "conditionings of different tasks"
            return None if mine is None or theirs is None else combine(mine, theirs.to(mine))

        masks = [self.context_mask, other.context_mask]
        if any(mask is not None for mask in masks):
            masks = [_full_mask(one.context) if one.context_mask is None else one.context_mask for one in (self, other)]
        return Conditioning(
            both(self.context, other.context),
            both(*masks),
            both(self.concat, other.concat),
            both(self.vector, other.vector),
        )


def _full_mask(context_BLD: Tensor | None) -> Tensor:
    assert context_BLD is not None, "a context mask without a context"
    return torch.ones(context_BLD.shape[:2], dtype=torch.bool, device=context_BLD.device)


Known = dict[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values of one context, (B, heads, M, width) each, by the cross-attention that projected them."""
