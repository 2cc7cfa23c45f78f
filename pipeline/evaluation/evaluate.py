"""Evaluation: sample images for held-out records and measure them, on all ranks, without touching training's state.

Image i is sampled from the noise of (seed, i) for what record i was given, in batches that do not depend on the number
of ranks. Each rank takes whole batches. So every world size samples the same images, and figures differ at most by
float64's rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, SamplerConfig
from pipeline.config.tasks.figures import CLIP_SCORE
from pipeline.distributed.world import World
from pipeline.errors import ContractMismatch, Interrupted
from pipeline.evaluation.card import Card
from pipeline.evaluation.features.networks import Features
from pipeline.evaluation.figures import figures_of, standard_error
from pipeline.evaluation.judging import Judging, Rows
from pipeline.evaluation.measure import clip_identity, clip_scores
from pipeline.evaluation.metrics.fid import Statistics
from pipeline.evaluation.records import Records
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.steering import RecordSteering, Together
from pipeline.evaluation.tasks.judge import Judge
from pipeline.evaluation.validation import Share, Validation
from pipeline.inference.pictures import conditionings, draw
from pipeline.inference.precision import FP32, Precision, products
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.report.parsed import said


@dataclass(frozen=True)
class EvalResult:
    """An evaluation's figures and picture.

    metrics: plain data, as in metrics.json. grid: the first images (K, H, W, 3) uint8. captions: what they were given,
    in words. shown: the same as pictures (K, H, W, 3) uint8, or None where that is none.
    """

    n: int
    metrics: dict[str, Any]
    card: Card
    grid: np.ndarray
    captions: list[str]
    shown: np.ndarray | None = None


@dataclass
class _Part:
    """One rank's measurements of its share of the images."""

    statistics: Statistics | None
    features: list[tuple[list[int], Tensor]]
    similarities: dict[int, float]
    rows: Rows
    steering: list[Rows]
    pictures: dict[int, tuple[np.ndarray, str, np.ndarray | None]]
    not_finite: int


class Evaluator:
    """What the evaluations of one run share, loaded once.

    validation: what is sampled for. judge: what measures it, besides features and CLIP. tower: for the CLIP score of a
    task that reads captions, or None. reference, features: for FID, or None. grid: number of images in the picture.
    thorough: compute FID-infinity too, which costs about 170 times as much as FID. steering: what images are given
    besides their conditioning. tiles: sides of the tiles in which `first_stage` and the denoiser work, for the card.
    precision: in which the denoisers that it is called with predict, for the card, and whether images may be drawn with
    TF32; all else is measured without.
    """

    def __init__(
        self,
        *,
        validation: Validation,
        first_stage: FirstStage,
        tower: TextTower | None,
        diffusion: DiffusionConfig,
        judge: Judge,
        reference: Reference | None = None,
        features: Features | None = None,
        grid: int = 16,
        seed: int = 0,
        thorough: bool = False,
        world: World | None = None,
        steering: Sequence[RecordSteering] = (),
        tiles: Mapping[str, int] | None = None,
        precision: Precision = FP32,
    ) -> None:
        self.validation, self.first_stage = validation, first_stage
        self.diffusion, self.task = diffusion, judge.task.name
        self.tower = tower if judge.task.takes_text else None
        records = Records(validation, first_stage)
        self.judging = Judging(judge, records, seed)
        self.steering = Together(steering, lambda own: Judging(own, records, seed))
        self.reference, self.features, self.perceptual = reference, features, judge.perceptual
        self.tiles, self.precision, self._tf32 = dict(tiles or {}), precision.facts(first_stage), precision.tf32
        self.grid, self.seed, self.thorough, self.world = grid, seed, thorough, world or World()
        if reference is not None:
            assert features is not None, "a reference needs its feature network"
            reference.require(validation.contract, features, "the reference")

    def __call__(
        self,
        denoiser: Denoiser | TiledDenoiser,
        n: int,
        *,
        images: int,
        sampler: SamplerConfig,
        weights: str = "ema",
        weights_sha256: str = "",
        stopped: Callable[[], bool] = lambda: False,
    ) -> EvalResult:
        """Evaluate a denoiser whose weights have seen n samples. Collective: every rank calls it and gets the result.

        weights, weights_sha256: their name and their hash on the card. stopped: called before each batch. When it
        returns True on any rank, all ranks raise Interrupted, and nothing is stored.
        """
        began = time.monotonic()
        with products(tf32=False):
            part = self.world.together(lambda: self._measure(denoiser, images, sampler, stopped))
        parts: list[_Part] = self.world.gather(part)
        pictures = {i: image for rank_part in parts for i, image in rank_part.pictures.items()}
        metrics = self.world.first(self.world.together(lambda: self._merge(parts, images), rank=0))
        metrics = {"n": n, "images": images, "guidance": sampler.guidance, "weights": weights} | metrics
        metrics["seconds"] = round(time.monotonic() - began, 2)
        shown = [pictures[i][2] for i in sorted(pictures)]
        return EvalResult(
            n=n,
            metrics=metrics,
            card=replace(self._card(n, metrics, images, sampler, weights), weights_sha256=weights_sha256),
            grid=np.stack([pictures[i][0] for i in sorted(pictures)]),
            captions=[pictures[i][1] or f"image {i}" for i in sorted(pictures)],
            shown=np.stack([picture for picture in shown if picture is not None])
            if all(p is not None for p in shown)
            else None,
        )

    def differing(self, card: Card, weights_sha256: str = "") -> list[str]:
        """Differences between what a card's figures were made from and what is loaded here, one line each.

        weights_sha256: of the weights here; they are compared where the card has a hash of its own."""
        reference, features, perceptual = self.reference, self.features, self.perceptual
        pairs = {
            "reference": ((card.reference or {}).get("sha256", ""), reference.sha256 if reference else ""),
            "features": ((card.features or {}).get("sha256", ""), features.sha256 if features and reference else ""),
            "resize": ((card.features or {}).get("resize", ""), features.resize if features and reference else ""),
            "captions": (card.captions["dataset"], self.validation.digest),
            "caption": (card.caption, self.validation.taken),
            "autoencoder": (card.vae_sha256, self.first_stage.weights_sha256),
            "perceptual": (str(card.judge.get("perceptual_sha256", "")), perceptual.sha256 if perceptual else ""),
            "CLIP": (card.clip.get("image_sha256", ""), self.tower.image_sha256 if self.tower else ""),
            "weights": (card.weights_sha256, weights_sha256 if card.weights_sha256 else ""),
            "steering": (said(card.steering), said(self.steering.facts)),
            "decoder": (_decoder(card.rounded), _decoder({} if card.precision is None else self.precision)),
        }
        return [
            f"{name}: {_short(name, on_card)} on the card, {_short(name, loaded)} here"
            for name, (on_card, loaded) in pairs.items()
            if on_card != loaded
        ]

    def require(self, card: Card, weights_sha256: str) -> None:
        """Raise ContractMismatch, naming every difference, unless the card's figures can be reproduced here."""
        if differing := self.differing(card, weights_sha256):
            raise ContractMismatch(f"the card's figures cannot be made again from these: {'; '.join(differing)}")

    def _measure(
        self,
        denoiser: Denoiser | TiledDenoiser,
        images: int,
        sampler: SamplerConfig,
        stopped: Callable[[], bool],
    ) -> _Part:
        """Sample and judge this rank's batches."""
        judging, judge, steering, device = self.judging, self.judging.judge, self.steering, self.world.device
        statistics = None if self.features is None else Statistics.empty(self.features.width)
        part = _Part(statistics, [], {}, Rows(), steering.rows(), {}, 0)
        for numbers in Share(sampler.batch, self.world.rank, self.world.size).batches(images):
            if stopped():
                raise Interrupted("the evaluation was stopped; the same command makes it anew")
            given = judging.given(numbers, images)
            steered = steering.given(numbers, given, images)
            shape = self.validation.contract.latent_shape  # which may be larger than in training
            given_B = judging.batch(numbers, images, device)
            numbers_B = torch.tensor(numbers, device=device)
            batch = denoiser.task.prepare(given_B, self.seed, numbers_B, sides=shape[1:], training=False)
            hooks = steering.hooks(numbers, steered)
            with products(self._tf32):
                conditioning, null = conditionings(denoiser, batch, sampler)
                drawn, not_finite = draw(
                    denoiser,
                    self.first_stage,
                    self.diffusion,
                    sampler,
                    conditioning,
                    numbers,
                    self.seed,
                    shape,
                    device,
                    null,
                    hooks,
                )
            part.not_finite += not_finite
            drawn = steering.finish(part.steering, numbers, drawn, steered, images)
            judging.add(part.rows, numbers, drawn, given, images)
            pictures = judge.finish(drawn, given)
            for row, i in enumerate(numbers):
                if i < self.grid:
                    described = steering.described(steered, row, judge.words(given, row), judge.show(given, row))
                    part.pictures[i] = (pictures[row], *described)
            if part.statistics is not None and self.features is not None:
                features = self.features(pictures)
                part.statistics.add(features)
                part.features.append((numbers, features))
            if self.tower is not None:
                scores = clip_scores(self.tower, pictures, given.captions)
                part.similarities |= dict(zip(numbers, scores.tolist(), strict=True))
        return part

    def _merge(self, parts: Sequence[_Part], images: int) -> dict[str, Any]:
        """Figures of all ranks' images, each with its floors. Called on rank 0 only."""
        metrics: dict[str, Any] = {}
        scores = self.reference.facts.scores if self.reference is not None else {}
        if self.reference is not None and self.features is not None:
            statistics = Statistics.merge([part.statistics for part in parts if part.statistics is not None])
            batches = sorted((batch for part in parts for batch in part.features), key=lambda batch: batch[0])
            features = torch.cat([features for _, features in batches])
            metrics |= figures_of(features, statistics, self.features, self.reference, self.thorough)
        similarities = {i: score for part in parts for i, score in part.similarities.items()}
        if in_order := [similarities[i] for i in sorted(similarities)]:
            metrics["clip_score"] = sum(in_order) / len(in_order)
            metrics["clip_score_error"] = standard_error(in_order)
        rows = Rows()
        for part in parts:
            rows.merge(part.rows)
        metrics |= self.judging.figures(rows) | self.steering.figures([part.steering for part in parts])
        same_clip = (
            self.reference is not None
            and self.tower is not None
            and self.reference.facts.clip_sha256 == clip_identity(self.tower)
        )
        for figure in (*((CLIP_SCORE,) if same_clip else ()), *self.judging.judge.figures):
            if figure.name in metrics:
                metrics |= {key: value for key, value in scores.items() if key.startswith(f"{figure.name}_")}
        if not_finite := sum(part.not_finite for part in parts):
            metrics["images_not_finite"] = not_finite
        return metrics

    def _card(self, n: int, metrics: dict[str, Any], images: int, sampler: SamplerConfig, weights: str) -> Card:
        features, reference = self.features, self.reference
        facts = asdict(reference.facts) if reference is not None else {}
        kept_facts = ("dataset", "images", "resolution", "crop", "resize")
        return Card(
            metrics=metrics,
            images=images,
            n=n,
            weights=weights,
            sampler=sampler.sampler,
            steps=sampler.steps,
            batch=sampler.batch,
            guidance=sampler.guidance,
            guidance_settings=sampler.guidance_settings,
            seed=self.seed,
            task=self.task,
            captions=self.validation.facts(images),
            vae_sha256=self.first_stage.weights_sha256,
            clip={
                "name": str(self.validation.contract.encoders.get("text", "")),
                "text_sha256": self.tower.weights_sha256,
                "image_sha256": self.tower.image_sha256,
            }
            if self.tower is not None
            else {},
            features={name: getattr(features, name) for name in ("name", "sha256", "resize")} if reference else None,
            reference={"sha256": reference.sha256} | {name: facts[name] for name in kept_facts} if reference else None,
            rank_deficient=bool(features and reference and min(images, reference.facts.images) <= features.width),
            device=self.world.device.type,
            tiles=self.tiles,
            precision=self.precision,
            judge=self.judging.facts(images),
            steering=self.steering.facts,
        )


def _decoder(precision: Mapping[str, Any]) -> str:
    """The decoder's dtype. precision: as on a card."""
    return str(precision.get("decoder", "fp32"))


def _short(name: str, value: str) -> str:
    """A hash's first digits, or how images were steered; "none" for none."""
    return (value if name == "steering" else value[:12]) or "none"
