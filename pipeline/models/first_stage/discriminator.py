"""The patch discriminator (Isola et al. 2017, section 3.2): which patches of a picture are real.

Kernels of 4x4 with a margin of 1: `layers` halve the picture and two more keep its size less one, so that with three
layers each number judges a patch of 70x70 pixels. Norms are of groups of channels of one sample in place of the batch:
what a picture is judged as does not depend on the other pictures, the batch or the number of ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.check.first_stage import smallest_judged as smallest
from pipeline.errors import ShapeError

SLOPE = 0.2
"""Of the leaky ReLU for negative numbers."""
SPREAD = 0.02
"""Standard deviation of the convolutions' first weights (Isola et al. 2017, section 6.2)."""
WIDEST = 8
"""Width of the widest layers, as a multiple of the first one's."""


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> (B, 1, H', W') logits, larger for real, in the dtype of the weights.

    channels: width of the first layer. layers: layers that halve the picture. norm_groups: groups of each norm, at
    most; a norm has fewer where they do not divide its width.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm_groups: int = 32) -> None:
        super().__init__()
        widths = [channels * min(2**layer, WIDEST) for layer in range(layers + 1)]
        strides = [2] * layers + [1]
        self.layers = layers
        self.convs = nn.ModuleList(
            nn.Conv2d(in_width, width, 4, stride=stride, padding=1)
            for in_width, width, stride in zip([3, *widths], widths, strides)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups_of(width, norm_groups), width) for width in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        least = smallest(self.layers)
        if min(x_B3HW.shape[2:]) < least:
            height, width = x_B3HW.shape[2:]
            raise ShapeError(
                f"pictures of {width}x{height} pixels are smaller than the {least} that a discriminator with "
                f"gan.layers={self.layers} judges; lower gan.layers, or set gan.weight=0"
            )
        h = F.leaky_relu(self.convs[0](x_B3HW), SLOPE, inplace=True)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), SLOPE, inplace=True)
        return self.conv_out(h)

    def reset_parameters(self, seed: int) -> None:
        """Initialize the weights; one seed gives the same weights on every machine and device."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                values = torch.randn(module.weight.shape, generator=generator).mul_(SPREAD)
                module.weight.data.copy_(values)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()


def groups_of(width: int, most: int) -> int:
    """The largest number of groups up to `most` that divides a width into groups of two channels or more: of one
    channel at one position, a norm leaves nothing."""
    return next(groups for groups in range(min(most, max(1, width // 2)), 0, -1) if width % groups == 0)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (B,) float32 of each pair of pictures: half of mean relu(1 - real) + relu(1 + fake)
    (Lim and Ye 2017; Esser et al. 2021). real, fake: logits (B, 1, H', W')."""
    losses = F.relu(1 - real.float()) + F.relu(1 + fake.float())
    return 0.5 * losses.mean(dim=(1, 2, 3))


def fooled(fake: Tensor) -> Tensor:
    """The generator's loss (B,) float32 of each picture: less the mean of its logits (B, 1, H', W')."""
    return -fake.float().mean(dim=(1, 2, 3))
