"""The guides of `latentmill eval`: each image is led to its record's own picture, caption or class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.config import GuideConfig, TrainConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract
from pipeline.data.format.contract_json import contract_from_json
from pipeline.diffusion.hooks import Hooks
from pipeline.errors import ConfigError, ContractMismatch
from pipeline.evaluation.measure import clip_identity
from pipeline.evaluation.steered.judges import CaptionJudge, LedClassJudge, LikenessJudge
from pipeline.evaluation.steering import RecordSteering
from pipeline.evaluation.tasks.judge import Given, Judge
from pipeline.inference.classifier import load_classifier
from pipeline.inference.steering.guide import Guide, classifier_contract, make_guides, require_clip
from pipeline.inference.steering.rows import read_mask
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.models.weights import weights_digest
from pipeline.runs.directory import RunInfo

DIGITS = 16
"""Hexadecimal digits of a hash on a card's line."""


ON_CARDS = ("image", "clip", "classifier", "factor", "grey", "cutouts")
"""Keys of a guide that cards hold."""


class RecordGuide(RecordSteering):
    """One guide. wanted: what it leads the images of a batch to."""

    def __init__(
        self, guide: Guide, judge: Judge, wanted: Callable[[Given], Sequence[Any]], facts: Mapping[str, Any]
    ) -> None:
        self.judge, self._judge, self._guide, self._wanted = judge, judge, guide, wanted
        self.gradients = guide.reads_network and guide.weight != 0
        self._facts = {f"guide.{guide.name}": guide.weight} | {f"guide.{name}": fact for name, fact in facts.items()}

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def hooks(self, numbers: Sequence[int], given: Given) -> Hooks:
        return self._guide.hooks(numbers, self._wanted(given))

    def words(self, given: Given, i: int) -> str:
        return self._judge.words(given, i)

    def show(self, given: Given, i: int) -> np.ndarray | None:
        return self._judge.show(given, i)


class RecordGuides:
    """The guides that are asked for, and what judges them. Made without networks, so that what is wrong is refused
    before they are loaded."""

    def __init__(self, config: GuideConfig, run: RunInfo[TrainConfig], contract: Contract, val: str) -> None:
        """run: whose pictures are guided. contract: of the cache `val` whose records are sampled for. Raises
        ConfigError, RunError, ContractMismatch."""
        self._config, self._contract = config, contract
        self._facts: dict[str, dict[str, Any]] = {}
        self._judges: dict[str, Judge] = {}
        self._wanted: dict[str, Callable[[Given], Sequence[Any]]] = {}
        if "image" in config.weights:
            self._of_pictures(val)
        if "clip" in config.weights:
            require_clip(contract_from_json(run.contract), run.storage.url)
            if contract.text is None:
                raise ConfigError(f"guide=clip: data.val={val} has no captions; give a cache that has them")
            of_captions = CaptionJudge(contract)
            self._judges["clip"], self._wanted["clip"] = of_captions, of_captions.wanted
            self._facts["clip"] = {"cutouts": config.cutouts}
        if "classifier" in config.weights:
            self._of_classes(run, val)

    @property
    def reads(self) -> tuple[str, ...]:
        """Arrays of a record that the judges read."""
        return tuple(dict.fromkeys(name for judge in self._judges.values() for name in judge.reads))

    def steering(
        self, first_stage: FirstStage, tower: TextTower | None, seed: int, device: torch.device
    ) -> tuple[RecordSteering, ...]:
        """What makes the hooks of an evaluation's images."""
        classifier = None
        if "classifier" in self._judges:
            classifier = load_classifier(self._config.run, at=self._config.at, device=device)
            sha256 = weights_digest(classifier.network.state_dict())
            self._facts["classifier"]["classifier_sha256"] = sha256[:DIGITS]
        if "clip" in self._judges and tower is not None:
            self._facts["clip"]["clip_sha256"] = hashlib.sha256(clip_identity(tower).encode()).hexdigest()[:DIGITS]
        guides = make_guides(self._config, first_stage, tower, classifier, seed, device)
        return tuple(
            RecordGuide(guide, self._judges[name], self._wanted[name], self._facts[name])
            for name, guide in guides.items()
        )

    def _of_pictures(self, val: str) -> None:
        config, (_, height, width) = self._config, self._contract.latent_shape
        height, width = (side * self._contract.downsampling for side in (height, width))
        if height % config.factor or width % config.factor:
            raise ConfigError(
                f"guide.factor={config.factor} does not divide the {width} x {height} pixels of data.val={val}: give "
                "a factor that does"
            )
        facts: dict[str, Any] = {"factor": config.factor} | ({"grey": True} if config.grey else {})
        mask = None
        if config.mask:
            mask, data = read_mask(config.mask, (width // config.factor, height // config.factor))
            facts["mask_sha256"] = hashlib.sha256(data).hexdigest()[:DIGITS]
        likeness = LikenessJudge(self._contract, config.factor, mask, config.grey)
        self._judges["image"], self._wanted["image"], self._facts["image"] = likeness, likeness.targets, facts

    def _of_classes(self, run: RunInfo[TrainConfig], val: str) -> None:
        known = classifier_contract(self._config, run.config.diffusion, contract_from_json(run.contract))
        classes = self._contract.conditions.classes
        if classes is None:
            raise ConfigError(
                f"guide=classifier: data.val={val} has no classes; encode it with conditions=[class], or give another"
            )
        if (expected := known.conditions.classes) is not None and classes.count != expected.count:
            raise ContractMismatch(
                f"guide.run={self._config.run} knows {expected.count} classes, and data.val={val} has {classes.count}"
            )
        judge = LedClassJudge(self._contract)
        self._judges["classifier"], self._wanted["classifier"] = judge, judge.wanted
        self._facts["classifier"] = {}


def guide_of(facts: Mapping[str, Any], here: GuideConfig) -> GuideConfig:
    """The guides of a card whose `steering` is `facts`. here: where their files are now, which no card knows. Raises
    ConfigError for facts that are no guide's, and for a classifier or a mask that is not given."""
    names = {name.removeprefix("guide."): fact for name, fact in facts.items() if name.startswith("guide.")}
    for name, key in (("classifier", "run"), ("mask_sha256", "mask")):
        if name in names and not getattr(here, key):
            raise ConfigError(f"the card's pictures were guided with guide.{key}: say with guide.{key}= where it is")
    settings = {name: fact for name, fact in names.items() if not name.endswith("_sha256")}
    if unknown := [f"guide.{name}" for name in settings if name not in ON_CARDS]:
        raise ConfigError(f"the card names {', '.join(unknown)}, which is no setting of a guide")
    weights = {name: settings[name] for name in ("image", "clip", "classifier") if name in settings}
    if weights and not any(weights.values()):  # pictures without the guide, measured as guided ones are
        settings |= dict.fromkeys(weights, 1.0) | {"weight": 0.0}
    guide = from_dict(GuideConfig, settings, "guide.")
    return replace(guide, run=here.run, at=here.at, mask=here.mask)
