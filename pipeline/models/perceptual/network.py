"""The networks of two perceptual distances of two pictures: LPIPS, and st-LPIPS, which a small shift hardly changes.

LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018): the squared
difference of normalised features at five depths of AlexNet or VGG-16, weighted by channel with learned weights,
averaged over positions and added up. st-LPIPS (Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV
2022) is the same with other weights, where what makes a picture smaller moves by one pixel, blurs it, and then takes
every second one, with two reflected pixels around it. Figures of the two do not compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.tasks.figures import Figure, perceived
from pipeline.errors import ShapeError
from pipeline.models.weights import weights_hash

Kind = Literal["alex", "vgg", "lpips-vgg"]
"""The backbone of st-LPIPS, or LPIPS with VGG-16."""
SMALLEST = 32
"""Pixels of a picture's smaller side, at least. VGG makes it 16 times smaller before its last features, so that those
of a smaller picture are mostly of what it is padded with."""
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of each channel of ImageNet's pictures in [-1, 1]: both backbones want it to be 0 and 1."""
BLUR = (0.25, 0.5, 0.25)
"""Weights of the blur along a side."""
PAD = 2
"""Pixels by which a picture is reflected beyond each edge before it is blurred."""
SMALL = 1e-10
"""Added to the norm of a position's features, so that features that are all 0 stay 0."""


@dataclass(frozen=True)
class Stage:
    """Layers between two depths whose features are compared.

    window: side of the largest-of window that comes first; 0 = none. widths: channels of each convolution. blurs:
    whether its convolution's outcome is halved by a blur. step: positions from one window to the next: 1 = a blur that
    halves the picture comes after it, 2 = the windows themselves halve it.
    """

    window: int
    widths: tuple[int, ...]
    kernel: int = 3
    padding: int = 1
    blurs: bool = False
    step: int = 1


STAGES: dict[Kind, tuple[Stage, ...]] = {
    "alex": (
        Stage(0, (64,), kernel=11, padding=2, blurs=True),
        Stage(3, (192,), kernel=5, padding=2),
        Stage(3, (384,)),
        Stage(0, (256,)),
        Stage(0, (256,)),
    ),
    "vgg": (
        Stage(0, (64, 64)),
        Stage(2, (128, 128)),
        Stage(2, (256, 256, 256)),
        Stage(2, (512, 512, 512)),
        Stage(2, (512, 512, 512)),
    ),
    "lpips-vgg": (
        Stage(0, (64, 64)),
        Stage(2, (128, 128), step=2),
        Stage(2, (256, 256, 256), step=2),
        Stage(2, (512, 512, 512), step=2),
        Stage(2, (512, 512, 512), step=2),
    ),
}


class Perceptual(nn.Module):
    """The distance of this kind. Its weights are NaN until they are loaded (perceptual/loaded.py), and are never
    trained: gradients pass through them to the pictures alone.

    As a loss it stays outside the module that an engine wraps, which would cast, shard and save it.
    """

    mean: Tensor
    spread: Tensor
    blur: Tensor

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, self._stages = kind, STAGES[kind]
        self.convolutions, width = nn.ModuleList(), 3
        for stage in self._stages:
            for widened in stage.widths:
                self.convolutions.append(
                    nn.utils.skip_init(nn.Conv2d, width, widened, stage.kernel, padding=stage.padding)
                )
                width = widened
        self.heads = nn.ParameterList([torch.empty(stage.widths[-1]) for stage in self._stages])
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("spread", torch.tensor(SPREAD)[:, None, None], persistent=False)
        self.register_buffer("blur", torch.outer(torch.tensor(BLUR), torch.tensor(BLUR)), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def name(self) -> str:
        """Under which configurations and cards know it: st-alex, st-vgg or lpips-vgg."""
        return self.kind if self.kind == "lpips-vgg" else f"st-{self.kind}"

    @property
    def figure(self) -> Figure:
        """The figure that evaluations have of it."""
        return perceived(self.name)

    @cached_property
    def sha256(self) -> str:
        """Hash of its weights, whatever file they were in."""
        return weights_hash(self.state_dict().items())

    def distance(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """How different two batches of pictures look, (B,) float32, 0 for equal ones; larger is more different.

        Pictures (B, 3, H, W) have values from -1 to 1, not from 0 to 1, and sides of 32 pixels or more. It is
        differentiable in both, in float32 whatever their dtype is and inside autocast, and uses no operation whose
        gradient depends on the order of threads. Raises ShapeError.
        """
        shape = x_B3HW.shape
        if shape != y_B3HW.shape or len(shape) != 4 or shape[1] != 3:
            raise ShapeError(
                f"the perceptual distance compares batches of pictures (B, 3, H, W) of one size; these are "
                f"{tuple(shape)} and {tuple(y_B3HW.shape)}"
            )
        require_side(min(shape[2:]))
        with torch.autocast(x_B3HW.device.type, enabled=False):
            total = x_B3HW.new_zeros(shape[0], dtype=torch.float32)
            for a, b, head in zip(self._features(x_B3HW), self._features(y_B3HW), self.heads):
                total = total + (_unit(a) - _unit(b)).square().mean((2, 3)) @ head
        return total

    def _features(self, x_B3HW: Tensor) -> Iterator[Tensor]:
        """The features at each depth, (B, C, H', W')."""
        x = (x_B3HW.float() - self.mean) / self.spread
        convolutions = iter(self.convolutions)
        for stage in self._stages:
            if stage.window:
                x = _largest(x, stage.window, stage.step)
                x = self._halved(x) if stage.step == 1 else x
            for _ in stage.widths:
                x = next(convolutions)(x)
                x = F.relu(self._halved(x) if stage.blurs else x)
            yield x

    def _halved(self, x_BCHW: Tensor) -> Tensor:
        """Half as large, after a blur."""
        channels = x_BCHW.shape[1]
        padded = _reflected(_reflected(x_BCHW, 2), 3)
        return F.conv2d(padded, self.blur.expand(channels, 1, -1, -1), stride=2, groups=channels)


def require_side(side: int) -> None:
    """Raise ShapeError for pictures whose smaller side, in pixels, is too small to be compared."""
    if side < SMALLEST:
        raise ShapeError(
            f"the perceptual distance compares pictures of {SMALLEST} pixels or more along a side, and these have "
            f"{side}: leave it out (perceptual=none)"
        )


# F.pad's reflection and F.max_pool2d have gradients on GPUs that depend on the order of threads.


def _reflected(x: Tensor, dim: int) -> Tensor:
    """The tensor, longer by PAD at both ends of a dimension, without its edge twice."""
    size = x.shape[dim]
    before = [x.narrow(dim, i, 1) for i in range(PAD, 0, -1)]
    after = [x.narrow(dim, size - 1 - i, 1) for i in range(1, PAD + 1)]
    return torch.cat([*before, x, *after], dim)


def _largest(x: Tensor, window: int, step: int) -> Tensor:
    """The largest value in a square window at every `step`-th of its positions."""
    for dim in (2, 3):
        reach = (x.shape[dim] - window) // step * step + 1  # from the first position to the last
        shifted = [x[(slice(None),) * dim + (slice(i, i + reach, step),)] for i in range(window)]
        x = shifted[0]
        for other in shifted[1:]:
            x = torch.maximum(x, other)
    return x


def _unit(x_BCHW: Tensor) -> Tensor:
    """Features of length 1 at each position. Where all are 0 the root's gradient is infinite, and the ReLU before it
    stops it."""
    return x_BCHW / (x_BCHW.square().sum(1, keepdim=True).sqrt() + SMALL)
