"""Figures of a card that are made again, from the checkpoint, sampler, seeds and numbers that the card says."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from pipeline.config import EvalRunConfig, SamplerConfig
from pipeline.distributed.world import World, pick_device
from pipeline.errors import ConfigError, NotFound, ParseError, RunError
from pipeline.evaluation.card import Card, parse_card
from pipeline.evaluation.reconstruction import runs as autoencoders
from pipeline.evaluation.reproduced import run_of, verdict
from pipeline.evaluation.runs.commits import prepare, settings
from pipeline.evaluation.runs.tiling import tiles_of
from pipeline.evaluation.steered.asked import keys_of
from pipeline.evaluation.steered.guides import guide_of
from pipeline.models.perceptual.loaded import FILES
from pipeline.runs.directory import load_run
from pipeline.storage.urls import open_storage, split_url


def reproduce(config: EvalRunConfig, world: World | None = None) -> int:
    """Reproduce a card's figures and print how far they differ from it. Returns exit status 1 beyond TOLERANCE.
    Collective.

    Checkpoint, sampler, seeds, numbers and precision are the card's. Raises ContractMismatch when a file here has
    another hash than on the card, ConfigError for a card that cannot be read.
    """
    ranks = world or World(device=pick_device(config.device))
    card = ranks.together(lambda: read_card(config.from_card))
    if isinstance(card, autoencoders.Card):
        return autoencoders.reproduce(config, card, ranks)
    card_config = ranks.together(lambda: config_of(config, card))
    tiles = ranks.together(lambda: tiles_of(card_config, settings(card_config), ranks.device, card.tiles))
    prepared = prepare(card_config, card.reference is not None, tiles, ranks)
    trained, evaluator = prepared.trained, prepared.evaluator

    def require() -> None:
        if trained.n != card.n:
            raise RunError(f"{card_config.run} has no checkpoint at {card.n} samples, of which the card is")
        evaluator.require(card, prepared.weights_sha256)

    ranks.together(require)
    sampler = SamplerConfig(
        sampler=card.sampler,  # type: ignore[arg-type]
        steps=card.steps,
        guidance=card.guidance,
        batch=card_config.batch,
        **card.guidance_settings,  # type: ignore[arg-type]
    )
    again = evaluator(prepared.denoiser, trained.n, images=card.images, sampler=sampler, weights=card.weights).card
    return int(ranks.first(ranks.together(lambda: verdict(card, again), rank=0)))


def config_of(config: EvalRunConfig, card: Card) -> EvalRunConfig:
    """The configuration of the evaluation that the card is of; where files are now is config's to say. Raises
    ConfigError, RunError."""
    kind, _, average = card.weights.partition("=")
    run = run_of(config.from_card, config.run)
    config = replace(
        config,
        run=run,
        at=card.n,
        weights=cast(Literal["ema", "raw"], kind),
        ema=float(average or 0),
        images=card.images,
        seed=card.seed,
        batch=card.batch or config.batch,
        tf32=config.tf32 or bool(card.rounded.get("tf32")),
        caption=card.caption,
        **keys_of(card.steering),
    )
    if config.precision == "auto":
        config = replace(config, precision="bf16" if "denoiser" in card.rounded else "fp32")
    if card.features is not None and not config.features:
        config = replace(config, features=card.features["name"])  # type: ignore[arg-type]
    config = replace(config, guide=guide_of(card.steering, config.guide))
    if not config.perceptual:
        config = replace(config, perceptual=perceptual_of(card, run))
    return config


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
