"""How pictures are brought to the size that a feature network reads; the same network gives other figures with another.

Each takes (B, 3, H, W) float in [0, 255] and gives (B, 3, 299, 299) in about [-1, 1], as the package of its name does.
Parmar et al. 2022, "On aliased resizing", compare them: the first two alias when they shrink.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tensorflow(x: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 has it, whose pixels have no half: output i is at input i * H / side. With it FID was
    defined (Heusel et al. 2017); torch-fidelity's."""
    x = _along(_along(x, side, 3), side, 2)
    return (x - 128) / 128


def _along(x: Tensor, side: int, dim: int) -> Tensor:
    """One axis of it: between the two neighbours in float32, the last of them being its own neighbour."""
    size = x.shape[dim]
    place = torch.arange(side, dtype=x.dtype, device=x.device) * torch.tensor(size / side, dtype=torch.float32)
    low = place.long()
    shape = [1] * x.ndim
    shape[dim] = side
    here, there = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1))
    return here + (there - here) * (place - low).view(shape)


def pytorch(x: Tensor, side: int) -> Tensor:
    """Bilinear between pixel centres, without antialiasing: pytorch-fid's, and clean-fid's legacy_pytorch."""
    return 2 * F.interpolate(x / 255, (side, side), mode="bilinear", align_corners=False) - 1


def clean(x: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing in floating point, as Pillow does it: clean-fid's."""
    x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return (x - 128) / 128


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {"tensorflow": tensorflow, "pytorch": pytorch, "clean": clean}
