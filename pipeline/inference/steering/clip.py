"""The likeness of what is sampled to a caption, by the image and text towers of CLIP (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import philox
from pipeline.diffusion.levels import Level
from pipeline.inference.steering.decoded import Decoded
from pipeline.models.encoders.text import TextTower
from pipeline.philox import Stream

CLIP_SCALE = 100.0
"""By which CLIP multiplies cosines before it compares captions (Radford et al. 2021, section 2.5)."""
SMALLEST = 0.6
"""Side of the smallest cut-out, as a share of the picture's shorter side."""
SHARPNESS = -0.5
"""Parameter a of Keys' cubic, as in Pillow's."""
MOST_STEPS = 1 << 12
"""Predictions of one picture whose cut-outs differ."""


class ClipScore:
    """100 x the cosine between the embeddings of each image's picture and of its caption, the mean over the whole
    picture and cut-outs of it.

    A cut-out is a square whose side and place are drawn for (seed, image number, prediction), so an image's cut-outs
    do not depend on its batch. CLIP alone would be led to patterns that please it at one place and scale.
    """

    def __init__(
        self,
        decoded: Decoded,
        tower: TextTower,
        captions: Sequence[str],
        cutouts: int,
        seed: int,
        numbers: Sequence[int],
    ) -> None:
        """captions: one for each image. numbers: of the images."""
        self._decoded, self._tower, self._cutouts, self._seed = decoded, tower, cutouts, seed
        self._text_BE = F.normalize(tower.pooled(tower.tokenize(captions)), dim=1)
        self._numbers_B = torch.tensor(numbers, dtype=torch.int64)
        self._predictions = 0

    def __call__(self, x0_BCHW: Tensor, x_BCHW: Tensor, level: Level) -> Tensor:
        """(B,) float32."""
        pictures = self._decoded(x0_BCHW)
        views = cut(pictures, self._boxes(*pictures.shape[2:]), self._tower.image_size)  # (B, K, 3, h, w)
        seen_BKE = self._tower.encode_sized(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return CLIP_SCALE * (F.normalize(seen_BKE, dim=2) * self._text_BE[:, None]).sum(2).mean(1)

    def _boxes(self, height: int, width: int) -> Tensor:
        """Top, left, height and width in pixels of what CLIP sees of each image now: (B, 1 + cut-outs, 4) float64. The
        first is the whole, or where the picture is no square the largest in its middle."""
        counter = self._numbers_B * MOST_STEPS + self._predictions % MOST_STEPS
        self._predictions += 1
        side = min(height, width)
        whole = torch.tensor([(height - side) / 2, (width - side) / 2, side, side], dtype=torch.float64)
        boxes = whole.expand(len(counter), 1, 4)
        if not self._cutouts:
            return boxes
        drawn = philox.uniform(self._seed, Stream.CUTOUT, counter, 3 * self._cutouts).unflatten(1, (self._cutouts, 3))
        sides = side * (SMALLEST + (1 - SMALLEST) * drawn[..., 0])
        top, left = (height - sides) * drawn[..., 1], (width - sides) * drawn[..., 2]
        return torch.cat([boxes, torch.stack([top, left, sides, sides], dim=2)], dim=1)


def cut(pictures_BCHW: Tensor, boxes_BK4: Tensor, size: tuple[int, int]) -> Tensor:
    """Parts of pictures (B, C, H, W), each resampled to `size` (height, width) by antialiased bicubic weights:
    (B, K, C, h, w), differentiable in the pictures. boxes: top, left, height, width in pixels, float64."""
    height, width = pictures_BCHW.shape[2:]
    top, left, tall, wide = boxes_BK4.unbind(2)
    rows = _weights(top, tall, height, size[0]).to(pictures_BCHW)
    columns = _weights(left, wide, width, size[1]).to(pictures_BCHW)
    return rows[:, :, None] @ pictures_BCHW[:, None] @ columns[:, :, None].transpose(3, 4)


def _weights(start_BK: Tensor, length_BK: Tensor, old: int, new: int) -> Tensor:
    """What each of `new` pixels takes of a line of `old`, where the new line is the part that begins at `start` and is
    `length` long: (B, K, new, old) float64. Rows sum to 1; what would lie outside of the line is left out."""
    step = length_BK / new  # old pixels for each new one
    centres = start_BK[..., None] + (torch.arange(new, dtype=torch.float64) + 0.5) * step[..., None] - 0.5
    reach = step.clamp(min=1.0)[..., None, None]
    d = (torch.arange(old, dtype=torch.float64) - centres[..., None]).abs() / reach
    a = SHARPNESS
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return weights / weights.sum(3, keepdim=True)
