"""The evaluations of an autoencoder's run: inside training, and by `latentmill eval`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pipeline.config import AutoencoderConfig, EvalRunConfig
from pipeline.distributed.world import World, pick_device
from pipeline.errors import ConfigError, RunError
from pipeline.evaluation.features.networks import load_features
from pipeline.evaluation.reconstruction.card import OF_THE_MACHINE
from pipeline.evaluation.reconstruction.card import Card as Card
from pipeline.evaluation.reconstruction.card import is_autoencoders as is_autoencoders
from pipeline.evaluation.reconstruction.card import parse_card as parse_card
from pipeline.evaluation.reconstruction.card import table as table
from pipeline.evaluation.reconstruction.evaluate import Reconstructing
from pipeline.evaluation.reconstruction.kept import full_name, kept_card, require
from pipeline.evaluation.reconstruction.pairs import write_drawn
from pipeline.evaluation.reconstruction.pictures import Pictures
from pipeline.evaluation.reconstruction.stage import stage_of
from pipeline.evaluation.reference import load_reference
from pipeline.evaluation.reproduced import run_of, verdict
from pipeline.evaluation.stored import write_files
from pipeline.log import log
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.first_stage.trainable import AVERAGED
from pipeline.models.perceptual.loaded import FILES, load_perceptual
from pipeline.runs.averages import label, load_average
from pipeline.runs.directory import dataset_digests, evaluation_folder, load_autoencoder_run
from pipeline.storage.base import Storage

OF_DIFFUSION = (
    *("guidance", "sampler", "steps", "guidance_low", "guidance_high", "rescale"),
    *("strength", "keep", "encoders", "seed", "tile", "caption", "precision", "tf32"),
)
"""Keys of `latentmill eval` that say how a diffusion model draws."""
Evaluate = Callable[[dict[str, Tensor], int, Callable[[], bool]], Mapping[str, Any]]
"""(full weights by parameter name, n, whether this rank was asked to stop) -> metrics."""


def load_reconstructing(
    pictures: Pictures,
    device: torch.device,
    *,
    reference: str,
    features: str,
    features_weights: str,
    perceptual: str,
    key: str = "perceptual",
    **settings: Any,
) -> Reconstructing:
    """Everything that evaluations on `pictures` need besides an autoencoder, loaded from where the configuration says.

    key: of `perceptual`, for messages. settings: as Reconstructing has them. Raises DatasetError, WeightsError,
    ContractMismatch, ShapeError.
    """
    seed = pictures.contract.encoder_seed  # of random weights, in tests
    return Reconstructing(
        pictures,
        reference=load_reference(reference) if reference else None,
        features=load_features(features, device, seed, features_weights) if reference else None,
        perceptual=load_perceptual(perceptual, device, key),
        **settings,
    )


def in_training(config: AutoencoderConfig, run: Storage, world: World) -> Evaluate:
    """A function that evaluates weights at n samples while a run trains, stores the result under the run's evals/ and
    returns its metrics. It loads everything at once, so that missing files are reported before training begins. The
    function is collective."""
    settings = config.eval
    reconstructing = load_reconstructing(
        Pictures.at(config.data.val, "data.val"),
        world.device,
        reference=settings.reference,
        features=settings.features,
        features_weights=settings.features_weights,
        perceptual=settings.perceptual,
        key="eval.perceptual",
        batch=settings.batch,
        most_pairs=settings.pairs,
        world=world,
    )
    reconstructing.pictures.require_sizes(config.autoencoder.downsampling)

    def evaluate(weights: dict[str, Tensor], n: int, stopped: Callable[[], bool]) -> Mapping[str, Any]:
        stage = stage_of(config.autoencoder, weights, world.device)
        images = settings.final_images if n >= config.samples and settings.final_images else settings.images
        result = reconstructing(stage, n, images=images, weights="ema", stopped=stopped)

        def write() -> None:
            write_drawn(run, f"{evaluation_folder(n)}/", result.pairs)
            write_files(run, f"{evaluation_folder(n)}/", result)

        world.together(write, rank=0)
        return result.metrics

    return evaluate


@dataclass(frozen=True)
class _Prepared:
    """run: its storage. n: samples seen by the weights. weights: their name."""

    run: Storage
    stage: FirstStage
    reconstructing: Reconstructing
    n: int
    weights: str


def evaluate_run(config: EvalRunConfig, world: World | None = None) -> Card:
    """Evaluate a checkpoint of an autoencoder's run, store the result in the run directory and return its card, or that
    of the same evaluation where it is there. Collective. Raises RunError, ConfigError, ContractMismatch, all before the
    first picture."""
    ranks = world or World(device=pick_device(config.device))
    prepared = ranks.together(lambda: _prepare(config, ranks))
    run, stage, reconstructing = prepared.run, prepared.stage, prepared.reconstructing
    images = min(config.images, len(reconstructing.pictures))
    folder = evaluation_folder(prepared.n, full_name(reconstructing, stage, images, prepared.weights))
    kept = ranks.together(lambda: kept_card(run, f"{folder}/", reconstructing, stage, images), rank=0)
    card: Card | None = ranks.first(kept)
    if card is not None and (card.n, card.weights) == (prepared.n, prepared.weights):
        return card
    result = reconstructing(stage, prepared.n, images=images, weights=prepared.weights)

    def write() -> None:
        write_drawn(run, f"{folder}/", result.pairs)
        write_files(run, f"{folder}/", result)

    ranks.together(write, rank=0)
    return result.card


def reproduce(config: EvalRunConfig, card: Card, world: World | None = None) -> int:
    """Make a card's figures again and print how far they differ. Returns the exit status. Collective. Raises
    ContractMismatch when a file here has another hash than on the card."""
    ranks = world or World(device=pick_device(config.device))
    prepared = ranks.together(lambda: _prepare_again(config, card, ranks))
    again = prepared.reconstructing(prepared.stage, card.n, images=card.images, weights=card.weights)
    return int(ranks.first(ranks.together(lambda: verdict(card, again.card, OF_THE_MACHINE), rank=0)))


def _prepare_again(config: EvalRunConfig, card: Card, world: World) -> _Prepared:
    """Load what the evaluation of a card needs. Raises ConfigError, RunError, ContractMismatch."""
    kind, _, average = card.weights.partition("=")
    if kind not in ("ema", "raw"):
        raise ConfigError(
            f"from_card={config.from_card} is of no run's autoencoder: the same latentmill reconstruct makes it again"
        )
    run = run_of(config.from_card, config.run)
    own = load_autoencoder_run(run).config.eval.perceptual
    named = card.perceptual.get("name", "none")
    perceptual = config.perceptual or (own if named == "none" or own != "none" else named)
    prepared = _prepare(
        replace(
            config,
            run=run,
            at=card.n,
            weights=cast(Literal["ema", "raw"], kind),
            ema=float(average or 0),
            batch=card.batch,
            features=config.features or (card.features or {}).get("name", ""),  # type: ignore[arg-type]
            perceptual=perceptual if named != "none" and (perceptual != named or named in FILES) else "none",
        ),
        world,
        measured=card.reference is not None,
    )
    if prepared.n != card.n:
        raise RunError(f"{run} has no checkpoint at {card.n} samples, of which the card is")
    require(card, prepared.reconstructing, prepared.stage)
    return prepared


def _prepare(config: EvalRunConfig, world: World, measured: bool = True) -> _Prepared:
    """Load what an evaluation of a checkpoint needs, as one rank, which meets no other here. measured: against the
    reference, where there is one."""
    info = load_autoencoder_run(config.run)
    refuse_of_diffusion(config)
    run = info.config
    val = config.data.val or run.data.val
    if not val:
        raise ConfigError(f"{config.run} has no data.val: give the cache whose pictures are reconstructed, data.val=")
    device = world.device
    pictures = Pictures.at(val, "data.val")
    if pictures.manifest.digest in dataset_digests(info.facts):
        log.warning(f"eval: data.val={val} is what {config.run} was trained on: its pictures are not new to the model")
    pictures.require_sizes(run.autoencoder.downsampling)
    features = config.features or run.eval.features
    reconstructing = load_reconstructing(
        pictures,
        device,
        reference=(config.reference or run.eval.reference) if measured else "",
        features=features,
        features_weights=config.features_weights
        or (run.eval.features_weights if features == run.eval.features else ""),
        perceptual=config.perceptual or run.eval.perceptual,
        batch=config.batch,
        most_pairs=run.eval.pairs,
        world=world,
    )
    n, state = load_average(info.storage, config.at, config.weights, config.ema, AVERAGED)
    stage = stage_of(run.autoencoder, state, device)
    return _Prepared(info.storage, stage, reconstructing, n, label(config.weights, config.ema))


def refuse_of_diffusion(config: EvalRunConfig) -> None:
    """Raise ConfigError for keys that an autoencoder's evaluation has no use for."""
    default = EvalRunConfig()
    for key in OF_DIFFUSION:
        if getattr(config, key) != getattr(default, key):
            raise ConfigError(f"{key}: {config.run} is the run of an autoencoder, which draws nothing; leave it out")
