"""The scale of an autoencoder's latents, measured over pictures that it was trained on (Rombach et al. 2021, appendix
G: 1 / standard deviation, one number for all channels and places)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import philox
from pipeline.data.order.mixture import orders_of
from pipeline.data.reading.stream import Stream
from pipeline.diffusion.posterior import sample_posterior
from pipeline.errors import DatasetError, NotFound, RunError
from pipeline.inference.first_stage import TrainedAutoencoder
from pipeline.runs.datasets import dataset_and_order

DIGITS = 5
"""Significant digits that are kept: what machines compute differently is beyond them."""
PIXELS = 1 << 18
"""Pixels that the encoder has at a time."""


@dataclass(frozen=True)
class Scale:
    """factor: 1 / standard deviation of latents, to DIGITS digits. images: pictures over which it was measured, 0 where
    it was not, and is 1."""

    factor: float = 1.0
    images: int = 0

    def words(self) -> str:
        """What the factor is, in a sentence."""
        if not self.images:
            return "scaling_factor is 1: it was not measured (scale_images=0)."
        return (
            f"scaling_factor is {self.factor:g}: 1 / standard deviation of the latents of {self.images:,} pictures "
            "that it was trained on."
        )


def measure(trained: TrainedAutoencoder, images: int) -> Scale:
    """The scale over the first `images` samples of the run's order, or over an epoch where that has fewer: latents
    drawn from the posterior by sample number (kl), or what is quantised (vq).

    Raises RunError where the training data are not there any more, or the latents have no scale.
    """
    if not images:
        return Scale()
    try:
        mean, square, count = _sums(trained, images)
    except (DatasetError, NotFound) as error:
        raise RunError(
            f"the scale of latents is measured on the run's training data, and they cannot be read ({error}): restore "
            "them, or set scale_images=0, which writes scaling_factor 1"
        ) from error
    variance = square - mean**2
    if not (math.isfinite(variance) and variance > 1e-12):
        raise RunError(
            f"{trained.info.storage.url}: the latents of {count:,} pictures have a variance of {variance:.3g}, so that "
            "no scale makes it 1: export another checkpoint (at=), or train anew"
        )
    return Scale(float(f"{variance**-0.5:.{DIGITS}g}"), count)


@torch.no_grad()
def _sums(trained: TrainedAutoencoder, images: int) -> tuple[float, float, int]:
    """(mean of the latents' values, mean of their squares, number of pictures)."""
    config, info = trained.info.config, trained.info
    dataset, order = dataset_and_order(info)
    images = min(images, sum(part.epoch_samples for part in orders_of(order)))
    totals, values, seen = [0.0, 0.0], 0, 0
    with Stream(
        dataset,
        order,
        batch=config.optim.batch,
        members=("pixels",),
        memory_bytes=int(config.data.memory_gb * 1e9),
        workers=config.data.workers,
        prefetch=1,
    ) as stream:
        while seen < images:
            batch = next(stream)
            pixels, numbers = (tensor[: images - seen] for tensor in (batch.tensors["pixels"], batch.numbers))
            at_a_time = max(1, PIXELS // (pixels.shape[-2] * pixels.shape[-1]))
            for few, their in zip(pixels.split(at_a_time), numbers.split(at_a_time), strict=True):
                z = latents(trained.model, pictures(few, config.autoencoder.downsampling), config.seed, their).double()
                totals[0] += float(z.sum())
                totals[1] += float(z.square().sum())
                values += z.numel()
            seen += len(pixels)
    return totals[0] / values, totals[1] / values, seen


def pictures(pixels_B3HW: Tensor, factor: int) -> Tensor:
    """Stored pixels (B, 3, H, W) uint8 -> pictures in [-1, 1] float32, whose sides are cut to multiples of `factor`
    around the middle."""
    height, width = pixels_B3HW.shape[-2:]
    top, left = height % factor // 2, width % factor // 2
    cut = pixels_B3HW[..., top : top + height // factor * factor, left : left + width // factor * factor]
    return cut.float().div(127.5).sub(1)


def latents(model: Any, x_B3HW: Tensor, seed: int, numbers_B: Tensor) -> Tensor:
    """Unscaled latents (B, C, h, w) float32 of pictures: drawn from the posterior as training draws those of the
    samples `numbers`, or what is quantised, which has no variance."""
    h = model.quant_conv(model.encoder(x_B3HW.to(next(model.parameters()).device))).float().cpu()
    if "num_vq_embeddings" in model.config:
        return h
    shape = (h.shape[1] // 2, *h.shape[2:])
    return sample_posterior(h, philox.normal(seed, philox.Stream.POSTERIOR, numbers_B, shape), 1.0, 0.0)
