"""Evaluation: sample images for held-out records and measure them, on all ranks, without touching training's state.

Image i is sampled from the noise of (seed, i) for what record i was given, in batches that do not depend on the number
of ranks. Each rank takes whole batches. So every world size samples the same images, and figures differ at most by
float64's rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, SamplerConfig, TrainConfig
from pipeline.config.tasks.figures import CLIP_SCORE
from pipeline.data.format.manifest import Manifest
from pipeline.data.joined.opening import joined
from pipeline.distributed.world import World
from pipeline.errors import ContractMismatch, Interrupted
from pipeline.evaluation.card import Card
from pipeline.evaluation.features.networks import Features, load_features
from pipeline.evaluation.figures import figures_of, standard_error
from pipeline.evaluation.judging import Judging, Rows
from pipeline.evaluation.measure import clip_identity, clip_scores
from pipeline.evaluation.metrics.fid import Statistics
from pipeline.evaluation.records import Records
from pipeline.evaluation.reference import Reference, load_reference
from pipeline.evaluation.steering import RecordSteering, Together
from pipeline.evaluation.stored import write
from pipeline.evaluation.tasks.judge import Judge, make_judge
from pipeline.evaluation.validation import Validation, load_validation
from pipeline.inference.packed import pack
from pipeline.inference.pictures import conditionings, draw
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.inference.trained import build_denoiser, load_encoders
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.models.perceptual.loaded import load_perceptual
from pipeline.models.tasks.choose import make_task
from pipeline.report.parsed import said
from pipeline.runs.directory import dataset_urls
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage


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
    ) -> None:
        self.validation, self.first_stage = validation, first_stage
        self.diffusion, self.task = diffusion, judge.task.name
        self.tower = tower if judge.task.takes_text else None
        records = Records(validation, first_stage)
        self.judging = Judging(judge, records, seed)
        self.steering = Together(steering, lambda own: Judging(own, records, seed))
        self.reference, self.features, self.perceptual = reference, features, judge.perceptual
        self.tiles = dict(tiles or {})
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
        part = self.world.together(lambda: self._measure(denoiser, images, sampler, stopped))
        parts: list[_Part] = self.world.gather(part)
        pictures = {i: image for rank_part in parts for i, image in rank_part.pictures.items()}
        metrics = self.world.first(self._merge(parts, images) if self.world.rank == 0 else None)
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
        for numbers in self._batches(images, sampler.batch):
            if stopped():
                raise Interrupted("the evaluation was stopped; the same command makes it anew")
            given = judging.given(numbers, images)
            steered = steering.given(numbers, given, images)
            shape = self.validation.contract.latent_shape  # which may be larger than in training
            given_B = judging.batch(numbers, images, device)
            numbers_B = torch.tensor(numbers, device=device)
            batch = denoiser.task.prepare(given_B, self.seed, numbers_B, sides=shape[1:], training=False)
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
                steering.hooks(numbers, steered),
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

    def _batches(self, images: int, size: int) -> Iterator[list[int]]:
        """This rank's batches of image numbers: every size-th batch, so that batches are the same in any world."""
        for first in range(0, images, size)[self.world.rank :: self.world.size]:
            yield list(range(first, min(first + size, images)))

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
            judge=self.judging.facts(images),
            steering=self.steering.facts,
        )


def _short(name: str, value: str) -> str:
    """A hash's first digits, or how images were steered; "none" for none."""
    return (value if name == "steering" else value[:12]) or "none"


def in_training(
    config: TrainConfig, run: Storage, world: World, manifest: Manifest, empty_LD: Tensor | None
) -> Callable[[dict[str, Tensor], int, Callable[[], bool]], Mapping[str, Any]]:
    """A function that evaluates weights at n samples while a run trains, stores the result under the run's evals/ and
    returns its metrics. It loads everything at once, so that missing files are reported before training begins.

    manifest: of the training cache. empty_LD: its encoded empty caption. Both functions are collective.
    """
    storage = open_storage(config.data.val)
    validation_manifest = joined(storage, config.data.columns, lenient=True)
    contract = manifest.contract
    task = make_task(config.task, config.model, contract, empty_LD).to(world.device)
    most_images, caption = max(config.eval.images, config.eval.final_images, config.eval.grid), config.eval.caption
    perceptual = load_perceptual(config.eval.perceptual, world.device, "eval.perceptual")
    judge = make_judge(validation_manifest.contract, config.task, perceptual)
    beside = (*dataset_urls(config.data), config.data.val)
    first_stage, tower = load_encoders(contract, world.device, config.encoders, beside=beside)
    evaluator = Evaluator(
        validation=load_validation(storage, validation_manifest, judge.reads, most_images, tower, caption, config.seed),
        first_stage=first_stage,
        tower=tower,
        diffusion=config.diffusion,
        judge=judge,
        reference=load_reference(config.eval.reference) if config.eval.reference else None,
        features=(
            load_features(config.eval.features, world.device, contract.encoder_seed, config.eval.features_weights)
            if config.eval.reference
            else None
        ),
        grid=config.eval.grid,
        seed=config.seed,
        world=world,
    )

    def evaluate(weights: dict[str, Tensor], n: int, stopped: Callable[[], bool]) -> Mapping[str, Any]:
        denoiser = build_denoiser(config.model, task, weights, world.device)
        pack(denoiser.unet)
        images = config.eval.final_images if n >= config.samples and config.eval.final_images else config.eval.images
        result = evaluator(denoiser, n, images=images, sampler=config.eval.sampler, stopped=stopped)
        world.together(lambda: write(run, result), rank=0)
        return result.metrics

    return evaluate
