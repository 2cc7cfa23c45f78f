"""Evaluations of a run's commits: everything that those of one commit share, and what each of them is asked."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.config import EvalRunConfig, SamplerConfig
from pipeline.config.tasks.found import require_perceived
from pipeline.data.format.contract import OF_ANY_SIZE, require_match
from pipeline.data.format.contract_json import contract_from_json
from pipeline.data.joined.opening import joined
from pipeline.distributed.world import World, pick_device
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.features.networks import load_features
from pipeline.evaluation.reference import fitting
from pipeline.evaluation.runs.tiling import tiles_of
from pipeline.evaluation.steered.asked import asked_of
from pipeline.evaluation.steered.guides import RecordGuides
from pipeline.evaluation.tasks.judge import make_judge
from pipeline.evaluation.validation import Share, load_validation
from pipeline.inference.precision import precision_of
from pipeline.inference.tiles.choice import Tiles
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.inference.trained import Trained, encode_captions, load_trained
from pipeline.log import log
from pipeline.models.denoiser import Denoiser
from pipeline.models.perceptual.loaded import load_perceptual
from pipeline.models.weights import weights_digest
from pipeline.runs.directory import dataset_digests, load_run
from pipeline.storage.urls import open_storage

GRID = 16  # images in the stored picture


class Prepared(NamedTuple):
    """What the evaluations of one commit share. weights_sha256: hash of its weights."""

    trained: Trained
    evaluator: Evaluator
    denoiser: Denoiser | TiledDenoiser
    weights_sha256: str


def prepare(
    config: EvalRunConfig, measured: bool = True, tiles: Tiles | None = None, world: World | None = None
) -> Prepared:
    """Load what the evaluations of a commit share. Collective. measured: against the reference, where there is one.
    tiles: those of a card; None = those of config.tile, which depend on the memory that rank 0 finds free."""
    ranks = world or World(device=pick_device(config.device))
    chosen: Tiles | None = tiles
    if tiles is None:
        chosen = ranks.together(lambda: tiles_of(config, settings(config), ranks.device), rank=0)
    given: Tiles = ranks.first(chosen)
    return ranks.together(lambda: _load(config, measured, given, ranks))


def _load(config: EvalRunConfig, measured: bool, tiles: Tiles, world: World) -> Prepared:
    """As one rank, which meets no other here."""
    device, info = world.device, load_run(config.run)
    run, contract = info.config, contract_from_json(info.contract)
    val = config.data.val or run.data.val
    storage = open_storage(val)
    manifest = joined(storage, config.data.columns or run.data.columns, lenient=True)
    require_match(contract, manifest.contract, f"data.val={val}", OF_ANY_SIZE)
    asked = asked_of(config, manifest.contract, run.task, f"data.val={val}")
    guides = RecordGuides(config.guide, info, manifest.contract, val)
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    if manifest.own.digest in dataset_digests(info.facts):
        log.warning(f"eval: data.val={val} is what {config.run} was trained on: its records are not new to the model")
    first_stage, tower = trained.encoders(device, config.encoders, (val,))
    first_stage = tiles.stage(first_stage)
    empty_LD = None
    if tower is not None and "text" in run.task.members:
        empty_LD = encode_captions(tower, [""], trimmed=trained.contract.trimmed)[0].to(device)
    sha256 = weights_digest(trained.state)
    reference = fitting(config.reference, run.eval.reference, val, manifest.contract) if measured else None
    features = config.features or run.eval.features
    weights = config.features_weights or (run.eval.features_weights if features == run.eval.features else "")
    seed = trained.contract.encoder_seed
    perceptual = config.perceptual or run.eval.perceptual
    require_perceived(run.task, perceptual, "perceptual")
    judge = make_judge(manifest.contract, run.task, load_perceptual(perceptual, device))
    reads = tuple(dict.fromkeys((*judge.reads, *asked.reads, *guides.reads)))
    images, caption = max(config.images, GRID), config.caption or run.eval.caption
    share = Share(config.batch, world.rank, world.size) if world.size > 1 else None
    validation = load_validation(storage, manifest, reads, images, tower, caption, config.seed, share)
    steering = (
        *asked.steering(validation, first_stage),
        *guides.steering(first_stage, tower, config.seed, device),
    )
    precision = precision_of(config.precision, config.tf32, device)
    packed = not any(one.gradients for one in steering)
    denoiser = trained.denoiser(empty_LD, device, packed=packed, dtype=precision.dtype)
    evaluator = Evaluator(
        validation=validation,
        first_stage=first_stage,
        tower=tower,
        diffusion=run.diffusion,
        judge=judge,
        reference=reference,
        features=load_features(features, device, seed, weights) if reference is not None else None,
        grid=GRID,
        seed=config.seed,
        thorough=True,
        world=world,
        steering=steering,
        tiles=tiles.facts,
        precision=precision,
    )
    return Prepared(trained, evaluator, tiles.denoiser(denoiser), sha256)


def settings(config: EvalRunConfig) -> list[SamplerConfig]:
    """Every combination of sampler, number of steps and guidance scale."""
    return [
        SamplerConfig(
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_low=config.guidance_low,
            guidance_high=config.guidance_high,
            rescale=config.rescale,
            batch=config.batch,
        )
        for sampler in config.sampler
        for steps in config.steps
        for guidance in config.guidance
    ]
