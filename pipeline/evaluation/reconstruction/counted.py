"""What is counted of reconstructions on each rank, and the figures of what all ranks have counted.

Everything is kept by picture or in whole numbers, so that figures are the same to the bit over any number of ranks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.tasks.figures import FIRST_STAGE, Figure
from pipeline.diffusion.posterior import LOGVAR_RANGE
from pipeline.evaluation.figures import standard_error
from pipeline.evaluation.metrics.error_bars import DRAWS, half_sample_error
from pipeline.evaluation.reconstruction.pairs import Pair
from pipeline.models.first_stage.codebook import perplexity, usage

FEWEST = 4
"""Pictures from which halves have a spread."""
MOST_CHANNELS = 64
"""Channels of a latent whose means and deviations are told one by one."""


@dataclass
class Row:
    """What is counted of one picture, and of its latent before scaling.

    values: figures by name, None where there is nothing to count. count, total, squares: numbers of a channel, and
    their sums (C,) float64. spread: mean standard deviation of the posterior; kl_bits: its divergence from the standard
    normal in bits, for each pixel of the picture. Both 0 without a posterior.
    """

    values: dict[str, float | None]
    count: int
    total: np.ndarray
    squares: np.ndarray
    spread: float = 0.0
    kl_bits: float = 0.0


class Codes:
    """How often each entry of a codebook was chosen: in all, and in the halves of the pictures that error bars are made
    of (the halves of half_sample_error)."""

    def __init__(self, codes: int, images: int) -> None:
        draw = np.random.RandomState(0)
        self._halves = np.zeros((DRAWS, images), bool)
        for half in self._halves:
            half[draw.permutation(images)[: images // 2]] = True
        self.counts = np.zeros((1 + DRAWS, codes), np.int64)

    def add(self, number: int, indices: np.ndarray) -> None:
        """Add the entries (h, w) that picture `number` has."""
        counts = np.bincount(indices.reshape(-1), minlength=self.counts.shape[1])
        self.counts[0] += counts
        self.counts[1:][self._halves[:, number]] += counts

    @classmethod
    def merge(cls, parts: Sequence[Codes]) -> Codes:
        """All ranks' counts together."""
        whole = copy.copy(parts[0])
        whole.counts = np.sum([part.counts for part in parts], axis=0)
        return whole

    def figures(self) -> dict[str, float]:
        """Share of the codebook that is used, and perplexity, each with its error."""
        figures: dict[str, float] = {}
        for name, of in (("codes_used", usage), ("perplexity", perplexity)):
            whole, *halves = (of(torch.from_numpy(counts)) for counts in self.counts)
            figures[name] = whole
            if self._halves.shape[1] >= FEWEST:
                figures[f"{name}_error"] = float(np.std(halves, ddof=1))
        return figures


@dataclass
class Counted:
    """What one rank has counted, or all of them together.

    features: with the numbers of their pictures, (B, E). codes: counts of Codes. pairs: the worst. seconds: encoding
    and decoding of timed_images.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    features: list[tuple[list[int], Tensor]] = field(default_factory=list)
    codes: Codes | None = None
    pairs: list[Pair] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)
    timed_images: int = 0
    not_finite: int = 0

    def keep_worst(self, pairs: Sequence[Pair], most: int) -> None:
        """Add pairs, and keep the worst of all."""
        self.pairs = sorted([*self.pairs, *pairs], key=lambda pair: (pair.psnr, pair.number))[:most]

    @classmethod
    def merge(cls, parts: Sequence[Counted], most: int) -> Counted:
        """All ranks' together. most: pairs."""
        whole = cls()
        for part in parts:
            whole.rows |= part.rows
            whole.features += part.features
            whole.keep_worst(part.pairs, most)
            whole.seconds = (whole.seconds[0] + part.seconds[0], whole.seconds[1] + part.seconds[1])
            whole.timed_images += part.timed_images
            whole.not_finite += part.not_finite
        if codes := [part.codes for part in parts if part.codes is not None]:
            whole.codes = Codes.merge(codes)
        whole.rows = {number: whole.rows[number] for number in sorted(whole.rows)}
        whole.features.sort(key=lambda batch: batch[0])
        return whole

    def figures(self) -> dict[str, Any]:
        """Figures of pictures and latents, with their errors; those of features aside. After `merge`."""
        rows = list(self.rows.values())
        figures: dict[str, Any] = {}
        for figure in FIRST_STAGE:
            figures |= _mean(figure, rows)
        if self.codes is not None:
            figures |= self.codes.figures()
        figures |= _of_latents(rows)
        if any(row.spread for row in rows):
            bits = [row.kl_bits for row in rows]
            figures |= {"kl_bits_per_pixel": sum(bits) / len(bits), "kl_bits_per_pixel_error": standard_error(bits)}
            figures["posterior_std"] = sum(row.spread for row in rows) / len(rows)
        for name, seconds in zip(("encode_images_per_s", "decode_images_per_s"), self.seconds, strict=True):
            if seconds > 0:
                figures[name] = self.timed_images / seconds
        if self.not_finite:
            figures["images_not_finite"] = self.not_finite
        return figures


def latent_rows(stored: str, latents: Tensor, pixels: int) -> list[Row]:
    """Rows of a batch with what is counted of its latents.

    stored: what `latents` are: moments (B, 2C, h, w), latents (B, C, h, w) or pixels (B, 3, H, W) uint8. pixels: of a
    picture.
    """
    values = latents.double() / 127.5 - 1 if stored == "pixels" else latents.double()
    mean, logvar = values.chunk(2, dim=1) if stored == "moments" else (values, None)
    totals = mean.sum(dim=(2, 3)).cpu().numpy()
    squares = mean.square().sum(dim=(2, 3)).cpu().numpy()
    rows = [Row({}, mean[0, 0].numel(), total, square) for total, square in zip(totals, squares, strict=True)]
    if logvar is not None:
        logvar = logvar.clamp(*LOGVAR_RANGE)
        nats = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))
        spreads = (0.5 * logvar).exp().mean(dim=(1, 2, 3))
        for row, kl, spread in zip(rows, nats.tolist(), spreads.tolist(), strict=True):
            row.kl_bits, row.spread = kl / math.log(2) / pixels, spread
    return rows


def _mean(figure: Figure, rows: Sequence[Row]) -> dict[str, float]:
    """The mean of a figure over the pictures that have it, with its standard error; {} where none has."""
    values = [value for row in rows if (value := row.values.get(figure.name)) is not None]
    if not values:
        return {}
    return {figure.name: sum(values) / len(values), f"{figure.name}_error": standard_error(values)}


def _of_latents(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean and standard deviation of the numbers of latents before scaling, over all of them and by channel. The
    reciprocal of latent_std is the scale that makes their deviation 1."""
    counts = np.array([row.count for row in rows], np.float64)
    totals, squares = np.stack([row.total for row in rows]), np.stack([row.squares for row in rows])

    def deviation(numbers: Tensor) -> float:
        chosen = numbers.numpy()
        count = counts[chosen].sum() * totals.shape[1]
        mean = totals[chosen].sum() / count
        return math.sqrt(max(float(squares[chosen].sum() / count - mean**2), 0.0))

    whole = counts.sum()
    means = totals.sum(axis=0) / whole
    deviations = np.sqrt(np.maximum(squares.sum(axis=0) / whole - means**2, 0.0))
    figures: dict[str, Any] = {"latent_mean": float(means.mean()), "latent_std": deviation(torch.arange(len(rows)))}
    if len(rows) >= FEWEST:
        figures["latent_std_error"] = half_sample_error(len(rows), deviation)
    if len(means) <= MOST_CHANNELS:
        for name, values in (("mean", means), ("std", deviations)):
            figures[f"latent_{name}_by_channel"] = {str(i): float(value) for i, value in enumerate(values)}
    return figures
