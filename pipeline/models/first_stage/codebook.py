"""Vector quantisation (van den Oord et al. 2017): each latent becomes the nearest entry of a learned codebook.

    loss = codebook_weight |sg[z] - e|^2 + commitment_weight |z - sg[e]|^2          (their equation 3)

The first term moves the codes to the latents that chose them, the second holds the latents to their codes. Published
code of VQGAN has the commitment's weight at the first term.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = 1 << 24
"""Distances that are in memory at once (64 MB)."""


@dataclass(frozen=True)
class Quantised:
    """What became of latents (B, C, h, w)."""

    latents: Tensor
    """(B, C, h, w) float32: what was quantised, without gradients."""
    z_q: Tensor
    """(B, C, h, w) float32: the codes, through which gradients pass to the latents unchanged (straight-through)."""
    indices: Tensor
    """(B, h, w) int64 in [0, n): which entry of the codebook each is."""
    codebook_loss_B: Tensor
    """(B,) float32: mean squared distance of a number of a sample's codes to its latents; its gradient is of the codes
    alone."""
    commitment_loss_B: Tensor
    """(B,) float32: the same distance; its gradient is of the latents alone."""


def quantise(z_BChw: Tensor, codebook_nC: Tensor) -> Quantised:
    """Quantise latents (B, C, h, w) by a codebook (n, C), in float32 for every dtype and under autocast."""
    with _in_float32(z_BChw.device):
        z = z_BChw.float()
        indices = nearest(z.detach().permute(0, 2, 3, 1), codebook_nC.detach())
        codes = F.embedding(indices, codebook_nC).float().permute(0, 3, 1, 2)
        return Quantised(
            latents=z.detach(),
            z_q=z + (codes - z).detach(),
            indices=indices,
            codebook_loss_B=(codes - z.detach()).square().mean(dim=(1, 2, 3)),
            commitment_loss_B=(z - codes.detach()).square().mean(dim=(1, 2, 3)),
        )


@torch.no_grad()
def nearest(z: Tensor, codebook_nC: Tensor) -> Tensor:
    """Index of the entry of the codebook (n, C) that is nearest to each latent (..., C) -> (...,) int64 in [0, n).

    |z - e|^2 without |z|^2, which all entries share: codes that lie close together far from z stay apart in float32.
    """
    codes = codebook_nC.float()
    squares = codes.square().sum(dim=1)
    pieces = z.float().reshape(-1, codes.shape[1]).split(max(1, DISTANCES // len(codes)))
    with _in_float32(z.device):
        chosen = [torch.addmm(squares, piece, codes.t(), alpha=-2).argmin(dim=1) for piece in pieces]
    return torch.cat(chosen).view(z.shape[:-1])


def _in_float32(device: torch.device) -> AbstractContextManager[object]:
    """No autocast, on devices that have it."""
    has = torch.amp.autocast_mode.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has else nullcontext()


def count(indices: Tensor, codes: int) -> Tensor:
    """How many latents chose each of `codes` entries: (codes,) int64. Counts of many samples add up."""
    return torch.bincount(indices.flatten(), minlength=codes)


def perplexity(counts: Tensor) -> float:
    """The number of codes that would be used as evenly: exp of the entropy of counts (n,), in [1, n]; 0 without any.

    Of a data set it is that of the counts' sum. A batch has fewer latents than a codebook has entries, so that the mean
    over batches says nothing of the codebook.
    """
    total = int(counts.sum())
    if not total:
        return 0.0
    share = counts[counts > 0].double() / total
    return float((-share * share.log()).sum().exp())


def usage(counts: Tensor) -> float:
    """Share of the codes that were used at all, in [0, 1]."""
    return float((counts > 0).double().mean())
