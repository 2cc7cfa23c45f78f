"""latentmill eval: a checkpoint's FID, CLIP score and its task's figures, each with a card that says how it was made.

Of an autoencoder's run: how near its reconstructions are (evaluation/reconstruction/). Of a classifier's: how often it
is right, by noise level (evaluation/classifier.py).

With from_card the figures of a card are made again, and compared.
One evaluation for each sampler, number of steps and guidance scale; several draw the curve of FID against CLIP score
into the run's report. Results lie in RUN/evals/, in a folder whose name holds all that they depend on
(evaluation/kept.py): figures that are there are not made again, and others stand beside them.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pipeline.config import AutoencoderConfig, EvalRunConfig, RunConfig, SamplerConfig, TrainConfig
from pipeline.config.loading.merge import to_dict
from pipeline.config.tasks.found import require_perceived
from pipeline.data.format.contract import OF_ANY_SIZE, require_match
from pipeline.data.format.contract_json import contract_from_json
from pipeline.data.format.manifest import load_manifest
from pipeline.diffusion.levels import levels_for
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.signals import SCHEDULER, StopRequest
from pipeline.distributed.world import World, pick_device
from pipeline.errors import ConfigError, NotFound, ParseError, RunError, WeightsError
from pipeline.evaluation import beside, classifier
from pipeline.evaluation.card import Card, parse_card
from pipeline.evaluation.evaluate import Evaluator, in_training
from pipeline.evaluation.features.networks import load_features
from pipeline.evaluation.kept import full_name, kept_card, weights_digest
from pipeline.evaluation.reconstruction import runs as autoencoders
from pipeline.evaluation.reference import fitting
from pipeline.evaluation.reproduced import run_of, verdict
from pipeline.evaluation.steered.asked import asked_of, keys_of
from pipeline.evaluation.steered.guides import RecordGuides, guide_of
from pipeline.evaluation.stored import write
from pipeline.evaluation.tasks.judge import make_judge
from pipeline.evaluation.tiling import tiles_of
from pipeline.evaluation.validation import load_validation
from pipeline.inference.tiles.choice import Tiles
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.inference.trained import Trained, encode_captions, load_trained
from pipeline.log import log, show
from pipeline.models.denoiser import Denoiser
from pipeline.models.perceptual.loaded import FILES, load_perceptual
from pipeline.parsing.text import one_line
from pipeline.report import page
from pipeline.report.publish import require_page
from pipeline.runs.datasets import empty_caption
from pipeline.runs.directory import RunInfo, dataset_digests, load_any_run, load_run
from pipeline.storage.urls import open_storage, split_url
from pipeline.tracking import terminal
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    import torch

GRID = 16  # images in the stored picture


def main(config: EvalRunConfig) -> int:
    """Run the verb."""
    if config.pending:
        return evaluate_pending(config)
    if config.from_card:
        return reproduce(config)
    trained = load_any_run(config.run).config
    if config.guide.weights and not (isinstance(trained, TrainConfig) and trained.task.draws):
        raise ConfigError(f"guide={','.join(config.guide.weights)}: {config.run} draws no pictures: leave guide out")
    if isinstance(trained, AutoencoderConfig):
        measured = autoencoders.evaluate_run(config)
        show(autoencoders.table(measured), end="")
        show(measured.line())
        return 0
    if isinstance(trained, TrainConfig) and not trained.task.draws:
        classified = classifier.evaluate_run(config)
        show(classifier.table(classified), end="")
        show(classified.line())
        return 0
    dest = f"{config.run.rstrip('/')}/{page.DEFAULT_DEST}"
    if len(settings(config)) > 1:
        require_page(dest, page.MARK)  # before hours of work
    cards = evaluate_run(config)
    show(table(cards), end="")
    for card in cards:
        show(card.line())
    if len(cards) > 1:
        page.write([config.run], dest)
        show(f"report: {dest}")
    return 0


def evaluate_run(config: EvalRunConfig) -> list[Card]:
    """Evaluate every sampler, number of steps and guidance scale, store the results in the run directory and return a
    card for each.

    Raises RunError, ContractMismatch for a dataset, reference or encoders that do not fit the run, and ConfigError for
    steps that a sampler cannot take, all before the first image.
    """
    if config.images < 2 or not config.guidance:
        raise ConfigError("images must be 2 or more, and guidance at least one scale")
    trained, evaluator, denoiser, sha256 = prepare(config)
    samplers = settings(config)
    for sampler in samplers:
        levels_for(evaluator.diffusion, sampler.sampler, sampler.steps)
    cards = []
    for i, sampler in enumerate(samplers):
        made_of = (config.images, sampler, trained.weights, sha256)
        card = kept_card(trained.info.storage, trained.n, evaluator, *made_of)
        if card is None:
            name = full_name(evaluator, *made_of)
            if len(samplers) > 1:
                show(f"eval: {i + 1} of {len(samplers)}: {name}")
            result = evaluator(
                denoiser,
                trained.n,
                images=config.images,
                sampler=sampler,
                weights=trained.weights,
                weights_sha256=sha256,
            )
            write(trained.info.storage, result, name)
            card = result.card
        cards.append(card)
    return cards


def prepare(
    config: EvalRunConfig, measured: bool = True, tiles: Tiles | None = None
) -> tuple[Trained, Evaluator, Denoiser | TiledDenoiser, str]:
    """Load what the evaluations of one checkpoint share; last comes the hash of its weights. measured: against the
    reference, where there is one. tiles: those of a card; None = those of config.tile."""
    device, info = pick_device(config.device), load_run(config.run)
    tiles = tiles_of(config, settings(config), device) if tiles is None else tiles
    run, contract = info.config, contract_from_json(info.contract)
    val = config.data.val or run.data.val
    storage = open_storage(val)
    manifest = load_manifest(storage)
    require_match(contract, manifest.contract, f"data.val={val}", OF_ANY_SIZE)
    asked = asked_of(config, manifest.contract, run.task, f"data.val={val}")
    guides = RecordGuides(config.guide, info, manifest.contract, val)
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    if manifest.digest in dataset_digests(info.facts):
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
    reads = dict.fromkeys((*judge.reads, *asked.reads, *guides.reads))
    validation = load_validation(storage, manifest, tuple(reads), max(config.images, GRID), tower)
    steering = (
        *asked.steering(validation, first_stage),
        *guides.steering(first_stage, tower, config.seed, device),
    )
    denoiser = trained.denoiser(empty_LD, device, packed=not any(one.gradients for one in steering))
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
        world=World(device=device),
        steering=steering,
        tiles=tiles.facts,
    )
    return trained, evaluator, tiles.denoiser(denoiser), sha256


def reproduce(config: EvalRunConfig) -> int:
    """Reproduce a card's figures and print how far they differ from it. Returns exit status 1 beyond TOLERANCE.

    Checkpoint, sampler, seeds and numbers are the card's. Raises ContractMismatch when a file here has another hash
    than on the card, ConfigError for a card that cannot be read.
    """
    card = read_card(config.from_card)
    if isinstance(card, autoencoders.Card):
        return autoencoders.reproduce(config, card)
    kind, _, average = card.weights.partition("=")
    weights = cast(Literal["ema", "raw"], kind)
    run = run_of(config.from_card, config.run)
    card_config = replace(
        config, run=run, at=card.n, weights=weights, ema=float(average or 0), images=card.images, seed=card.seed
    )
    card_config = replace(card_config, **keys_of(card.steering))
    if card.features is not None and not config.features:
        card_config = replace(card_config, features=card.features["name"])  # type: ignore[arg-type]
    card_config = replace(card_config, guide=guide_of(card.steering, config.guide))
    if not config.perceptual:
        card_config = replace(card_config, perceptual=perceptual_of(card, run))
    tiles = tiles_of(card_config, settings(card_config), pick_device(config.device), card.tiles)
    trained, evaluator, denoiser, sha256 = prepare(card_config, card.reference is not None, tiles)
    if trained.n != card.n:
        raise RunError(f"{run} has no checkpoint at {card.n} samples, of which the card is")
    evaluator.require(card, sha256)
    sampler = SamplerConfig(
        sampler=card.sampler,  # type: ignore[arg-type]
        steps=card.steps,
        guidance=card.guidance,
        batch=card.batch or config.batch,
        **card.guidance_settings,  # type: ignore[arg-type]
    )
    reproduced = evaluator(denoiser, trained.n, images=card.images, sampler=sampler, weights=card.weights).card
    return verdict(card, reproduced)


def perceptual_of(card: Card, run: str) -> str:
    """The weights of a card's perceptual distance: the run's own where it has some, else those of that name; none where
    the card has no such figure."""
    named, own = str(card.judge.get("perceptual", "none")), load_run(run).config.eval.perceptual
    if named == "none" or own != "none":
        return "none" if named == "none" else own
    return named if named in FILES else "none"


def read_card(url: str) -> Card | autoencoders.Card:
    """Read a card.json. Raises ConfigError."""
    root, key = split_url(url)
    try:
        data = open_storage(root).get(key)
        return autoencoders.parse_card(data) if autoencoders.is_autoencoders(data) else parse_card(data)
    except (NotFound, ParseError) as error:
        raise ConfigError(f"from_card={url}: no card of this version is there ({error})") from None


def evaluate_pending(config: EvalRunConfig) -> int:
    """Evaluate the snapshots that training has written (evaluation/beside.py) as training itself would. Returns the
    exit status.

    A snapshot that is damaged is passed over with a line, and the status is 1 then. Raises RunError, and Interrupted
    after a signal to stop, when the remaining snapshots stay pending."""
    info = load_any_run(config.run)
    run = info.storage
    stop, evaluate, damaged = StopRequest(), None, set[int]()
    with tempfile.TemporaryDirectory(prefix="latentmill-") as folder, stop.listening(SCHEDULER):
        while unevaluated := [n for n in beside.pending(run) if config.at in (0, n) and n not in damaged]:
            n = unevaluated[0]
            if evaluate is None:
                evaluate = _as_training(info, pick_device(config.device))
            try:
                weights = beside.read_snapshot(run, n)
                device = pick_device(config.device)
                on_device = {name: tensor.to(device) for name, tensor in weights.items()}
                metrics = evaluate(on_device, n, lambda: stop.number is not None)
            except NotFound:  # another job has evaluated it
                continue
            except (WeightsError, RunError) as error:
                log.error(f"eval: the snapshot at {n:,} samples is passed over: {one_line(str(error))}")
                damaged.add(n)
                continue
            beside.finish(run, n, partial(_track, info, n, Path(folder)))
            show(f"eval: {n:,} samples: {_figures(metrics)}")
    return 1 if damaged else 0


def _as_training(info: RunInfo[RunConfig], device: torch.device) -> autoencoders.Evaluate:
    """The function by which a run's training evaluates weights, in this process."""
    if device.type == "cpu":
        keep_memory()
    world = World(device=device)
    if isinstance(info.config, AutoencoderConfig):
        return autoencoders.in_training(info.config, info.storage, world)
    assert isinstance(info.config, TrainConfig)
    if not info.config.task.draws:
        return classifier.in_training(info.config, info.storage, world)
    train = info.config.data.train
    cache = open_storage(train)
    manifest = load_manifest(cache)
    require_match(contract_from_json(info.contract), manifest.contract, f"data.train={train}")
    return in_training(info.config, info.storage, world, manifest, empty_caption(cache, manifest))


def _track(info: RunInfo[RunConfig], n: int, folder: Path) -> None:
    """Send figures to the run's tracker after the end of training."""
    with Tracker(info.storage, info.config.tracking, settings=to_dict(info.config), folder=folder) as tracker:
        if n not in tracker.evaluations:
            beside.bring(info.storage, n, tracker)


def _figures(metrics: Mapping[str, Any]) -> str:
    """The figures of an evaluation in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))


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


def table(cards: Sequence[Card]) -> str:
    """A table of the figures with a column for each evaluation."""
    figures = {name: value for card in reversed(cards) for name, value in card.metrics.items()}
    names = [
        name
        for name, value in (cards[0].metrics | figures).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("n", "seconds", "guidance")
    ]
    headings = ["sampler", *(card.sampler for card in cards)]
    rows = [
        ["steps", *(str(card.steps) for card in cards)],
        ["guidance", *(f"{card.guidance:g}" for card in cards)],
    ]
    rows += [[name, *(_shown(card.metrics.get(name)) for card in cards)] for name in names]
    return terminal.table(headings, rows, left=(0,))


def _shown(figure: Any) -> str:
    """A figure in a table; - for one that is missing or no number."""
    return f"{figure:.4g}" if isinstance(figure, int | float) and math.isfinite(figure) else "-"


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["eval", *sys.argv[1:]]))
