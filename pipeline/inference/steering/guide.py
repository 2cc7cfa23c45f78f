"""Guides: the scores that `sample` and `eval` can follow, made of a run's own encoders or of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import DiffusionConfig, GuideConfig
from pipeline.data.format.contract import Contract, require_match
from pipeline.data.format.contract_json import contract_from_json
from pipeline.diffusion.hooks import NO_HOOKS, Hooks, Score, Steer
from pipeline.diffusion.process import noise_facts
from pipeline.errors import ConfigError, ContractMismatch
from pipeline.inference.steering.classifier import Classifier, ClassifierScore
from pipeline.inference.steering.clip import ClipScore
from pipeline.inference.steering.decoded import Decoded
from pipeline.inference.steering.image import ImageScore
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.runs.directory import load_classifier_run

LATENT_FACTS = ("vae_sha256", "latent_shape", "downsampling", "scale", "shift", "stored")
"""Facts of a cache that a classifier must share with a run whose latents it reads."""


@dataclass(frozen=True)
class Guide:
    """A score and its weight.

    score(numbers, wanted): the score of a batch whose images have these numbers; `wanted` says for each what it is led
    to: a Target (image), a caption (clip), a class (classifier). reads_network: whether the score reads what the
    network predicts.
    """

    name: str
    weight: float
    score: Callable[[Sequence[int], Sequence[Any]], Score]
    reads_network: bool = True

    def hooks(self, numbers: Sequence[int], wanted: Sequence[Any]) -> Hooks:
        """The hooks of a batch; none where the weight is 0."""
        if not self.weight:
            return NO_HOOKS
        return Hooks(steer=(Steer(self.score(numbers, wanted), self.weight, self.name, self.reads_network),))


def make_guides(
    config: GuideConfig,
    first_stage: FirstStage,
    tower: TextTower | None,
    classifier: Classifier | None,
    seed: int,
    device: torch.device,
) -> dict[str, Guide]:
    """The guides that are chosen, by their names, in the order in which their scores are taken. tower, classifier:
    None where no guide needs one."""
    decoded = Decoded(first_stage)

    def of_classes(numbers: Sequence[int], classes: Sequence[int]) -> Score:
        assert classifier is not None, "a guide by a classifier without one"
        return ClassifierScore(classifier, classes, device)

    def of_captions(numbers: Sequence[int], captions: Sequence[str]) -> Score:
        assert tower is not None, "a guide by CLIP without a tower"
        return ClipScore(decoded, tower, captions, config.cutouts, seed, numbers)

    makers: dict[str, Callable[[Sequence[int], Sequence[Any]], Score]] = {
        "classifier": of_classes,
        "image": lambda numbers, targets: ImageScore(decoded, targets, device),
        "clip": of_captions,
    }
    return {name: Guide(name, weight, makers[name], name != "classifier") for name, weight in config.weights.items()}


# --------------------------------------------------------------------------------------------------------------------
# What is known before networks are loaded


def require_clip(contract: Contract, run: str) -> None:
    """Raise ConfigError for a run whose cache was made without CLIP, so that none is loaded with its encoders."""
    if contract.text is None:
        raise ConfigError(
            f"guide=clip: {run} was trained on a cache without captions, so it has no CLIP; guide it by a picture or a "
            "classifier, or encode its cache with captions (encode caption_key=txt)"
        )


def classifier_contract(config: GuideConfig, diffusion: DiffusionConfig, contract: Contract) -> Contract:
    """The contract of the cache of guide.run, by its files without weights.

    Raises RunError for what is no run of a classifier, ContractMismatch for one of other latents or noise levels than
    a run of `diffusion` on a cache of `contract`.
    """
    info, what = load_classifier_run(config.run), f"guide.run={config.run}"
    theirs = contract_from_json(info.contract)
    require_match(contract, theirs, what, LATENT_FACTS)
    mine, others = noise_facts(diffusion), noise_facts(info.config.diffusion)
    differing = [
        f"{name}: {others.get(name)}, not {value}" for name, value in mine.items() if others.get(name) != value
    ]
    if differing:
        raise ContractMismatch(
            f"{what} was trained on other noise levels: {'; '.join(differing)}. Train a classifier with the "
            "diffusion.* of the run"
        )
    known, classes = contract.conditions.classes, theirs.conditions.classes
    if classes is None:
        raise ContractMismatch(f"{what} was trained on a cache without classes")
    if known is not None and (known.count, known.names) != (classes.count, classes.names):
        raise ContractMismatch(
            f"{what} knows other classes than the run's cache: {classes.count}, not {known.count}, or by other names"
        )
    return theirs
