"""Pictures that `sample` was given: images begin from them, or keep a region of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.conditions.mask import pool
from pipeline.data.format.contract import Contract
from pipeline.diffusion.hooks import Hooks, Keep, Start
from pipeline.inference.pictures import from_uint8
from pipeline.inference.requests.request import Request
from pipeline.inference.steering.per_batch import Steering
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.latents import Latents


class OfImages:
    """The images of all rows begin from their row's picture, keep a region of it, or both.

    strength: as Start's; None = begin from noise. latents: of each row's picture, (C, h, w), scaled. new: of each row
    (1, h, w) float32, 1 where a latent position is made anew, or None for all of them.
    """

    gradients = False

    def __init__(self, strength: float | None, latents: Sequence[Tensor], new: Sequence[Tensor] | None) -> None:
        self._strength, self._latents, self._new = strength, latents, new

    def hooks(self, numbers: Sequence[int], rows: Sequence[int], shape: tuple[int, int, int]) -> Hooks:
        latents = torch.stack([self._latents[row] for row in rows])
        assert latents.shape[1:] == shape, "a picture of another size than its row"
        keep = None if self._new is None else Keep(latents, torch.stack([self._new[row] for row in rows]))
        return Hooks(start=None if self._strength is None else Start(latents, self._strength), keep=keep)


def of_images(
    requests: Sequence[Request], strength: float | None, first_stage: FirstStage, contract: Contract
) -> tuple[Steering, ...]:
    """What the rows' pictures ask for; () where they ask for nothing. Latents are the first stage's means, encoded in
    float32 as those of a cache."""
    if strength is None and all(request.hole is None for request in requests):
        return ()
    exact, scaled = first_stage.float32(), Latents.of(contract)
    latents, new = [], []
    for request in requests:
        assert request.image is not None, "rows that begin from an image have one"
        latents.append(scaled.draw(exact.encode(from_uint8(request.image[None])), None)[0])
        if request.hole is not None:
            new.append(made_anew(torch.from_numpy(request.hole)[None], contract.downsampling).to(latents[-1].device))
    return (OfImages(strength, latents, new or None),)


def made_anew(holes: Tensor, downsampling: int) -> Tensor:
    """Holes (..., H, W) uint8 of 0 and 1 -> (..., h, w) float32: 1 where any pixel of a latent position is in the
    hole."""
    return torch.from_numpy(pool(holes.numpy(), downsampling, "max")).float()
