"""The likeness of what is sampled to a picture that is smaller, masked or grey (Rombach et al. 2021, appendix C)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.conditions.resampling import matrix
from pipeline.diffusion.levels import Level
from pipeline.inference.pictures import from_uint8
from pipeline.inference.shown import PAPER, enlarged
from pipeline.inference.steering.decoded import Decoded

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in brightness (ITU-R BT.601), as in Pillow's mode L."""


@dataclass(frozen=True)
class Target:
    """A picture to be like, (h, w, 3) uint8.

    factor: by which the images are divided before they are compared with it. mask_HW: (h, w) of 0 and 1, 1 where it
    counts; None = everywhere. grey: compare brightness alone.
    """

    picture: np.ndarray
    factor: int
    mask_HW: np.ndarray | None = None
    grey: bool = False

    def shown(self) -> np.ndarray:
        """The picture, as far as it counts, of the size of the images: (H, W, 3) uint8."""
        seen = self.picture
        if self.grey:
            seen = np.repeat(brightness(seen)[..., None], 3, axis=2)
        if self.mask_HW is not None:
            seen = np.where(self.mask_HW[..., None] != 0, seen, np.array(PAPER, np.uint8))
        height, width = seen.shape[:2]
        return enlarged(np.ascontiguousarray(seen), (width * self.factor, height * self.factor))


def brightness(picture: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) uint8, rounded."""
    return np.rint(picture.astype(np.float64) @ np.array(LUMA)).astype(np.uint8)


class ImageScore:
    """-1/2 ||T(D(x_0)) - y||^2 of each image, summed over what counts of its target y, in the range of -1 to 1: the
    log-likelihood of y, were it T(D(x_0)) with noise of variance 1. T makes pictures smaller by antialiased bicubic
    resampling (conditions/resampling.py), and grey where that is asked. D is the decoder, without its clamp."""

    def __init__(self, decoded: Decoded, targets: Sequence[Target], device: torch.device) -> None:
        """targets: one for each image, all of one size and compared in one way."""
        first = targets[0]
        self._decoded, self._grey = decoded, first.grey
        assert all(
            (target.factor, target.grey, target.picture.shape) == (first.factor, first.grey, first.picture.shape)
            for target in targets
        ), "targets of one batch that differ in size"
        height, width = first.picture.shape[:2]
        self._rows, self._columns = (
            torch.from_numpy(matrix(side * first.factor, side, "antialiased")).to(device) for side in (height, width)
        )
        self._luma = torch.tensor(LUMA, device=device).view(1, 3, 1, 1)
        self._target = self._seen(from_uint8(np.stack([target.picture for target in targets])).to(device))
        masks = [np.ones((height, width)) if target.mask_HW is None else target.mask_HW for target in targets]
        self._counts = torch.from_numpy(np.stack(masks)[:, None].astype(np.float32)).to(device)

    def __call__(self, x0_BCHW: Tensor, x_BCHW: Tensor, level: Level) -> Tensor:
        """(B,) float32."""
        small = self._rows @ self._decoded(x0_BCHW) @ self._columns.T
        return -(self._counts * (self._seen(small) - self._target) ** 2).flatten(1).sum(1) / 2

    def _seen(self, x_BCHW: Tensor) -> Tensor:
        """What is compared: the colours, or brightness alone."""
        return (x_BCHW * self._luma).sum(1, keepdim=True) if self._grey else x_BCHW
