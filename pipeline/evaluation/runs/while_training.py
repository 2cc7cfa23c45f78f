"""Evaluations while a run trains, of weights that are in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.joined.opening import joined
from pipeline.distributed.world import World
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.features.networks import load_features
from pipeline.evaluation.reference import load_reference
from pipeline.evaluation.stored import write
from pipeline.evaluation.tasks.judge import make_judge
from pipeline.evaluation.validation import Share, load_validation
from pipeline.inference.packed import pack
from pipeline.inference.precision import precision_of
from pipeline.inference.trained import build_denoiser, load_encoders
from pipeline.models.perceptual.loaded import load_perceptual
from pipeline.models.tasks.choose import make_task
from pipeline.runs.directory import dataset_urls
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage


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
    precision = precision_of(config.eval.precision, config.eval.tf32, world.device)
    beside = (*dataset_urls(config.data), config.data.val)
    first_stage, tower = load_encoders(contract, world.device, config.encoders, beside=beside)
    evaluator = Evaluator(
        validation=load_validation(
            storage,
            validation_manifest,
            judge.reads,
            most_images,
            tower,
            caption,
            config.seed,
            Share(config.eval.sampler.batch, world.rank, world.size),
        ),
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
        precision=precision,
    )

    def evaluate(weights: dict[str, Tensor], n: int, stopped: Callable[[], bool]) -> Mapping[str, Any]:
        denoiser = build_denoiser(config.model, task, weights, world.device, precision.dtype)
        pack(denoiser.unet)
        images = config.eval.final_images if n >= config.samples and config.eval.final_images else config.eval.images
        result = evaluator(denoiser, n, images=images, sampler=config.eval.sampler, stopped=stopped)
        world.together(lambda: write(run, result), rank=0)
        return result.metrics

    return evaluate
