"""The evaluation of an autoencoder: reconstruct held-out pictures and measure how near they come, on all ranks.

A picture is encoded, the mean of its posterior is decoded (of a codebook's autoencoder, the nearest codes), and both
are compared as 8-bit pictures. Batches do not depend on the number of ranks; each rank takes whole ones.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.distributed.world import World
from pipeline.errors import Interrupted
from pipeline.evaluation.features.networks import Features
from pipeline.evaluation.metrics.distance import distances
from pipeline.evaluation.metrics.error_bars import FrechetTo, half_sample_error
from pipeline.evaluation.metrics.fid import RankDeficient, Statistics, fid
from pipeline.evaluation.metrics.restoration import psnr, squared_error, ssim
from pipeline.evaluation.reconstruction.card import GIVEN, Card
from pipeline.evaluation.reconstruction.counted import FEWEST, Codes, Counted, Row, latent_rows
from pipeline.evaluation.reconstruction.pairs import Pair, of_one_size
from pipeline.evaluation.reconstruction.pictures import Batch, Pictures
from pipeline.evaluation.reference import Reference
from pipeline.inference.pictures import from_uint8, to_uint8
from pipeline.inference.precision import products
from pipeline.log import log
from pipeline.models.encoders.first_stage import FirstStage, NetworkStage, VQStage
from pipeline.models.encoders.latents import Latents
from pipeline.models.perceptual.network import Perceptual, require_side

T = TypeVar("T")
FLOAT16_BITS, LEVEL_BITS = 16, 8
"""Bits of a number of a latent, and of a pixel, in a cache."""


@dataclass(frozen=True)
class Reconstructions:
    """An evaluation's figures and pairs.

    n: samples seen by the weights. metrics: plain data, as in metrics.json. pairs: the worst first.
    """

    n: int
    metrics: dict[str, Any]
    card: Card
    pairs: list[Pair]

    @property
    def grid(self) -> np.ndarray:
        """The reconstructions of the pairs, (K, H, W, 3) uint8 of one size."""
        return of_one_size([pair.reconstruction for pair in self.pairs])

    @property
    def shown(self) -> np.ndarray | None:
        """The pictures of the pairs, as `grid`."""
        return of_one_size([pair.picture for pair in self.pairs])

    @property
    def captions(self) -> list[str]:
        """Record and PSNR of each pair."""
        return [pair.words for pair in self.pairs]


class Reconstructing:
    """What the evaluations of autoencoders on the same pictures share, loaded once.

    batch: pictures at once. most_pairs: pairs that are kept. reference, features: for rFID, or None. perceptual: the
    distance, or None. Raises ContractMismatch where the reference is of other pictures, ShapeError where pictures are
    too small for the distance.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        batch: int = 32,
        most_pairs: int = 16,
        reference: Reference | None = None,
        features: Features | None = None,
        perceptual: Perceptual | None = None,
        world: World | None = None,
    ) -> None:
        self.pictures, self.batch, self.most_pairs = pictures, batch, most_pairs
        self.reference, self.features, self.perceptual = reference, features, perceptual
        self.world = world or World()
        if reference is not None:
            assert features is not None, "a reference needs its feature network"
            reference.require(pictures.contract, features, "the reference", floors=False)
        if perceptual is not None:
            require_side(pictures.smallest)

    def __call__(
        self,
        stage: FirstStage,
        n: int = 0,
        *,
        images: int,
        weights: str = GIVEN,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Reconstructions:
        """Evaluate a first stage whose weights have seen n samples on the first `images` pictures, or on all where
        there are fewer. Collective: every rank calls it and gets the result.

        weights: their name on the card. stopped: called before each batch. When it returns True on any rank, all ranks
        raise Interrupted. Raises ContractMismatch for pictures that the autoencoder cannot take.
        """
        began = time.monotonic()
        self.pictures.require_sizes(stage.downsampling)
        images = min(images, len(self.pictures))
        self._warn_of_overlap(images)
        with products(tf32=False):
            part = self.world.together(lambda: self._measure(stage, images, stopped))
        whole = Counted.merge(self.world.gather(part), self.most_pairs)
        figures = self.world.together(lambda: whole.figures() | self._rfid(whole) | costs(stage), rank=0)
        metrics: dict[str, Any] = {"n": n, "images": images, "weights": weights, **self.world.first(figures)}
        metrics["seconds"] = round(time.monotonic() - began, 2)
        return Reconstructions(n, metrics, self._card(stage, n, metrics, images, weights), whole.pairs)

    def _measure(self, stage: FirstStage, images: int, stopped: Callable[[], bool]) -> Counted:
        """Reconstruct and judge this rank's batches."""
        counted = Counted(codes=Codes(len(stage.codebook), images) if isinstance(stage, VQStage) else None)
        own = self.pictures.cuts(images, self.batch)[self.world.rank :: self.world.size]
        for place, batch in enumerate(self.pictures.read(own)):
            if stopped():
                raise Interrupted("the evaluation was stopped; the same command makes it anew")
            self._add(counted, stage, batch, timed=place > 0 or len(own) == 1)
        return counted

    def _add(self, counted: Counted, stage: FirstStage, batch: Batch, timed: bool) -> None:
        """Count one batch. timed: whether its times count; a network's first call is slow."""
        x = from_uint8(batch.pictures)
        stored, encoding = self._timed(lambda: stage.encode(x))
        latents = Latents(stage.stored, stage.scale, stage.shift).draw(stored, None)
        y, decoding = self._timed(lambda: stage.decode(latents))
        if timed:
            counted.seconds = (counted.seconds[0] + encoding, counted.seconds[1] + decoding)
            counted.timed_images += len(batch.numbers)
        counted.not_finite += int((~torch.isfinite(latents).flatten(1).all(1)).sum())
        drawn = to_uint8(y)
        rows = latent_rows(stage.stored, stored, math.prod(batch.pictures.shape[1:3]))
        far = distances(self.perceptual, drawn, batch.pictures)
        pairs: list[Pair] = []
        for i, (number, row) in enumerate(zip(batch.numbers, rows, strict=True)):
            row.values |= far[i] | _near(batch.pictures[i], drawn[i])
            counted.rows[number] = row
            pairs.append(_pair(row, number, batch.keys[i], batch.pictures[i], drawn[i]))
        counted.keep_worst(pairs, self.most_pairs)
        if counted.codes is not None:
            assert isinstance(stage, VQStage)
            for number, indices in zip(batch.numbers, stage.nearest(stored).cpu().numpy(), strict=True):
                counted.codes.add(number, indices)
        if self.reference is not None and self.features is not None:
            counted.features.append((batch.numbers, self.features(drawn)))

    def _timed(self, action: Callable[[], T]) -> tuple[T, float]:
        """What an action gives, and its seconds on the device."""
        self._synchronize()
        began = time.perf_counter()
        value = action()
        self._synchronize()
        return value, time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def _rfid(self, whole: Counted) -> dict[str, float]:
        """FID of the reconstructions against the reference, with its error, and that of as many real images."""
        if self.reference is None or self.features is None:
            return {}
        features_NE, name = torch.cat([features for _, features in whole.features]), f"rfid_{self.features.name}"
        images = len(features_NE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankDeficient)  # the card reports it
            figures = {name: fid(Statistics.of(features_NE).gaussian(), self.reference.gaussian)}
        if images >= FEWEST:
            distance = FrechetTo(self.reference.gaussian)

            def of(numbers: Tensor) -> float:
                return distance(features_NE[numbers])

            figures[f"{name}_error"] = half_sample_error(images, of)
        floors = self.reference.floors(images)
        return figures | {f"{name}_floor_{kind}": floors[kind] for kind in ("real", "images")}

    def _warn_of_overlap(self, images: int) -> None:
        """Say that pictures which are reconstructed are in the reference, too."""
        facts = self.reference.facts if self.reference is not None and self.world.rank == 0 else None
        if facts is not None and facts.dataset == self.pictures.manifest.digest and images > facts.held:
            log.warning(
                f"eval: the reference was made from {self.pictures.key} itself and holds out its first {facts.held:,} "
                f"pictures: rFID of {images:,} is too good; images={facts.held} is fair"
            )

    def _card(self, stage: FirstStage, n: int, metrics: dict[str, Any], images: int, weights: str) -> Card:
        features, reference, network = self.features, self.reference, self.perceptual
        facts = asdict(reference.facts) if reference is not None else {}
        kept_facts = ("dataset", "images", "resolution", "crop", "resize")
        return Card(
            metrics=metrics,
            images=images,
            n=n,
            weights=weights,
            autoencoder=described(stage),
            vae_sha256=stage.weights_sha256,
            pictures={
                "dataset": self.pictures.manifest.digest,
                "records": images,
                "resolution": self.pictures.contract.resolution,
            },
            batch=self.batch,
            features={name: getattr(features, name) for name in ("name", "sha256", "resize")} if reference else None,
            reference={"sha256": reference.sha256} | {name: facts[name] for name in kept_facts} if reference else None,
            rank_deficient=bool(features and reference and min(images, reference.facts.images) <= features.width),
            perceptual={"name": network.name, "sha256": network.sha256} if network is not None else {},
            device=self.world.device.type,
        )


def described(stage: FirstStage) -> dict[str, Any]:
    """What a first stage is, as a card says it."""
    facts: dict[str, Any] = {
        "architecture": stage.architecture if isinstance(stage, NetworkStage) else stage.stored,
        "downsampling": stage.downsampling,
        "channels": stage.latent_channels,
        "dtype": str(stage.dtype).removeprefix("torch."),
    }
    return facts | ({"codes": len(stage.codebook)} if isinstance(stage, VQStage) else {})


def costs(stage: FirstStage) -> dict[str, float]:
    """Bits for each pixel of a picture that follow from the architecture: those of codes, and those of what a cache
    stores, which is the latents before quantisation, or mean and log-variance, in float16, or 8-bit pixels."""
    positions = 1 / stage.downsampling**2  # to a pixel
    numbers = stage.latent_channels * (2 if stage.stored == "moments" else 1)
    bits = LEVEL_BITS if stage.stored == "pixels" else FLOAT16_BITS
    figures = {"stored_bits_per_pixel": bits * numbers * positions}
    if isinstance(stage, VQStage):
        figures["bits_per_pixel"] = math.log2(len(stage.codebook)) * positions
    return figures


def _near(picture: np.ndarray, drawn: np.ndarray) -> dict[str, float | None]:
    """PSNR and SSIM of two pictures (H, W, 3) uint8."""
    return {"psnr": psnr(*squared_error(drawn, picture)), "ssim": ssim(drawn, picture)}


def _pair(row: Row, number: int, key: str, picture: np.ndarray, drawn: np.ndarray) -> Pair:
    value = row.values["psnr"]
    assert value is not None, "a picture without pixels"
    return Pair(value, number, key, picture, drawn)
