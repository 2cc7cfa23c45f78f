"""How pictures are resized for a feature network. The same network gives other figures with another resizing.

Each function maps (B, 3, H, W) float in [0, 255] to (B, 3, 299, 299) in about [-1, 1], as the package of its name does.
Parmar et al. 2022, "On aliased resizing", compare them: the first two alias when they shrink.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tensorflow(x: Tensor, side: int) -> Tensor:
    """Bilinear as in TensorFlow 1, without half-pixel centres: output i is at input i * H / side. FID was defined with
    it (Heusel et al. 2017); torch-fidelity uses it too."""
    x = _along(_along(x, side, 3), side, 2)
    return (x - 128) / 128


def _along(x: Tensor, side: int, dim: int) -> Tensor:
    """Interpolate along one axis between two neighbours in float32. The last pixel is its own right neighbour."""
    size = x.shape[dim]
    position = torch.arange(side, dtype=x.dtype, device=x.device) * torch.tensor(size / side, dtype=torch.float32)
    lower = position.long()
    shape = [1] * x.ndim
    shape[dim] = side
    left, right = x.index_select(dim, lower), x.index_select(dim, (lower + 1).clamp_max(size - 1))
    return left + (right - left) * (position - lower).view(shape)


def pytorch(x: Tensor, side: int) -> Tensor:
    """Bilinear between pixel centres without antialiasing, as in pytorch-fid and clean-fid's legacy_pytorch."""
    return 2 * F.interpolate(x / 255, (side, side), mode="bilinear", align_corners=False) - 1


def clean(x: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing in floating point, as in Pillow and clean-fid."""
    x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return (x - 128) / 128


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {"tensorflow": tensorflow, "pytorch": pytorch, "clean": clean}
