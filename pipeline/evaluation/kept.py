"""Evaluations of `latentmill eval` in a run directory: their names, and those that can be taken instead of made again.

    evals/000000032000-unipc-8-g2-n512-s0-inception-3f2a91c07d11/

A name begins with what a person looks for: samples seen, sampler, steps, guidance, images, seed, weights, what images
began from or kept, a precision other than fp32, features. It ends in a digest of all that the figures depend on, the
weights, the captions' dataset and the reference among it, so two evaluations that differ in anything lie side by side.
Names of earlier versions have neither features nor digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.config import SamplerConfig
from pipeline.config.values.captions import FIRST
from pipeline.errors import NotFound, ParseError
from pipeline.evaluation.card import Card, parse_card
from pipeline.evaluation.evaluate import Evaluator
from pipeline.runs.directory import evaluation_folder
from pipeline.storage.base import Storage


def short_name(images: int, seed: int, sampler: SamplerConfig, weights: str) -> str:
    """The readable part of a name, which was all of it in earlier versions. weights: as on the card."""
    suffix = "" if weights == "ema" else f"-{weights.replace('=', '')}"
    settings = "".join(f"-{name}{value:g}" for name, value in sampler.guidance_settings.items())
    return f"{sampler.sampler}-{sampler.steps}-g{sampler.guidance:g}{settings}-n{images}-s{seed}{suffix}"


def full_name(evaluator: Evaluator, images: int, sampler: SamplerConfig, weights: str, weights_sha256: str) -> str:
    """The name of an evaluation. weights, weights_sha256: as on the card."""
    reference, features, tower = evaluator.reference, evaluator.features, evaluator.tower
    has_features = reference is not None and features is not None
    facts: dict[str, Any] = {
        "weights": weights_sha256,
        "images": images,
        "seed": evaluator.seed,
        "sampler": {name: value for name, value in asdict(sampler).items() if name != "batch"},
        "diffusion": asdict(evaluator.diffusion),
        "task": evaluator.task,
        "captions": evaluator.validation.digest,
        "autoencoder": evaluator.first_stage.weights_sha256,
        "clip": [tower.weights_sha256, tower.image_sha256] if tower is not None else None,
        "features": [features.name, features.sha256, features.resize] if features and has_features else None,
        "reference": reference.sha256 if reference else None,
    }
    if evaluator.perceptual is not None:  # names of evaluations without it are as they were
        facts["perceptual"] = evaluator.perceptual.sha256
    if evaluator.validation.taken != FIRST:
        facts["caption"] = evaluator.validation.taken
    if evaluator.steering.facts:
        facts["steering"] = evaluator.steering.facts
    if evaluator.tiles:
        facts["tiles"] = evaluator.tiles
    if evaluator.precision:
        facts["precision"] = evaluator.precision
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    name = f"-{features.name}" if features and has_features else ""
    steering = "".join(f"-{key}" for key in readable(evaluator.steering.facts))
    precision = "".join(f"-{key}" for key in rounded(evaluator.precision))
    return f"{short_name(images, evaluator.seed, sampler, weights)}{steering}{precision}{name}-{digest}"


def readable(steering: Mapping[str, Any]) -> list[str]:
    """What images were given besides their conditioning, as parts of a name; texts and lists are in the digest alone.
    steering: as on the card."""
    numbers = {key: value for key, value in steering.items() if isinstance(value, bool | int | float)}
    return [key if value is True else f"{key}{value:g}" for key, value in sorted(numbers.items())]


def rounded(precision: Mapping[str, Any]) -> list[str]:
    """What was not float32, as parts of a name: bf16 (the denoiser), bf16decoder, tf32. precision: as on the card."""
    words = {"denoiser": "bf16", "decoder": "bf16decoder", "tf32": "tf32"}
    return [word for name, word in words.items() if name in precision]


def kept_card(
    run: Storage, n: int, evaluator: Evaluator, images: int, sampler: SamplerConfig, weights: str, weights_sha256: str
) -> Card | None:
    """The card of a complete evaluation at n that is the one asked for, under its name or under that of an earlier
    version; None where there is none."""
    asked = (n, sampler.sampler, sampler.steps, sampler.guidance, sampler.guidance_settings, images, evaluator.seed)
    for name in (
        full_name(evaluator, images, sampler, weights, weights_sha256),
        short_name(images, evaluator.seed, sampler, weights),
    ):
        folder = evaluation_folder(n, name)
        try:
            run.stat(f"{folder}/metrics.json")  # written last
            card = parse_card(run.get(f"{folder}/card.json"))
        except (NotFound, ParseError):  # no card, or a damaged one
            continue
        has = (card.n, card.sampler, card.steps, card.guidance, card.guidance_settings, card.images, card.seed)
        drawn = (card.weights, card.tiles, card.rounded) == (weights, evaluator.tiles, evaluator.precision)
        if has == asked and drawn and not evaluator.differing(card, weights_sha256):
            return card
    return None
