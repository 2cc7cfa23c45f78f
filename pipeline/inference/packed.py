"""Weights in the order that oneDNN reads fastest, for a network that only predicts, on a CPU in fp32.

PyTorch stores a weight row by row, and oneDNN and MKL reorder it at every call, which takes as long as the arithmetic
for the few pixels of a latent. Here it is reordered once, and the original memory is released.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed.allocator import release_memory
from pipeline.errors import RunError
from pipeline.models.kernels.onednn import available
from pipeline.models.kernels.upsampled import fold, unfold
from pipeline.models.unet.layers import GegluLinear, Upsample

LARGE = 2**18
"""Number of values from which a weight's original memory is released at once: later weights do not fit into it."""


def pack(module: nn.Module) -> None:
    """Put every fp32 linear layer and convolution below `module` on a CPU into oneDNN's order, in place.

    Afterwards the module has no gradients, and raises RunError where they are wanted, and no state dict; it takes as
    much memory as before. Does nothing where oneDNN is not available.
    """
    if not available():
        return
    for parent in list(module.modules()):
        if isinstance(parent, Upsample):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, Upsample) and _fits(child.conv.weight):
                setattr(parent, name, PackedUpsample(child))
            elif isinstance(child, GegluLinear) and _fits(child.weight):
                setattr(parent, name, PackedGeglu(child))
            elif isinstance(child, nn.Linear) and _fits(child.weight):
                setattr(parent, name, PackedLinear(child))
            elif isinstance(child, nn.Conv2d) and _fits(child.weight) and child.groups == 1:
                setattr(parent, name, PackedConv2d(child))


def _fits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer of this weight and bias, without gradients."""
    layer = nn.Linear(weight.shape[1], len(weight), device="meta")
    layer.weight, layer.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return layer


def _require_no_gradient(x: Tensor) -> None:
    """Raise RunError for an input whose gradient is wanted: these operations pass none on, and PyTorch only warns."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RunError(
            "weights that are packed for prediction have no gradients, so nothing can be guided through them"
        )


class PackedLinear(nn.Module):
    """nn.Linear: (..., in_features) -> (..., out_features) float32. Takes the weight out of `linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        size, linear.weight = linear.weight.numel(), cast(nn.Parameter, None)
        if size >= LARGE:
            release_memory()

    def forward(self, x: Tensor) -> Tensor:
        _require_no_gradient(x)
        return torch.ops.mkldnn._linear_pointwise(x.float(), self._packed, self._bias, "none", [], "")


class PackedGeglu(nn.Module):
    """GegluLinear: (..., in_width) -> (..., width) float32, values and gates as two layers. Takes its weight."""

    def __init__(self, layer: GegluLinear) -> None:
        super().__init__()
        weights, biases = layer.weight.detach().chunk(2), layer.bias.detach().chunk(2)
        layer.weight = cast(nn.Parameter, None)
        self.values, self.gates = (PackedLinear(_linear(*half)) for half in zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.gates(x)).mul_(self.values(x))


class PackedConv2d(nn.Module):
    """nn.Conv2d: (B, C, H, W) -> (B, C', H', W') float32. Packed at the first call, in the order that is fastest for
    the size of its input and correct for any other. Takes the weight out of `conv`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._weight: Tensor | None = conv.weight.detach()
        self._packed = torch.empty(0)
        self._padding, self._stride, self._dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
        conv.weight = cast(nn.Parameter, None)

    def forward(self, x: Tensor) -> Tensor:
        _require_no_gradient(x)
        x = x.float()
        if self._weight is not None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self._weight, self._padding, self._stride, self._dilation, 1, list(x.shape)
            )
            size, self._weight = self._weight.numel(), None
            if size >= LARGE:
                release_memory()
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self._bias, self._padding, self._stride, self._dilation, 1, "none", [], ""
        )


class PackedUpsample(nn.Module):
    """Upsample: (B, C, H, W) -> (B, C, 2H, 2W) float32, as a 2x2 convolution. Takes the weight out of its `conv`."""

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        conv = upsample.conv
        folded = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1, device="meta")
        folded.weight = nn.Parameter(fold(conv.weight.detach()), requires_grad=False)
        folded.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)
        conv.weight = cast(nn.Parameter, None)
        self.conv = PackedConv2d(folded)

    def forward(self, x: Tensor) -> Tensor:
        return unfold(self.conv(x))
