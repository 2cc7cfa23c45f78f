"""The evaluation of a classifier of noisy latents: how often it is right, and how sure, by noise level, on all ranks.

Every record is looked at once in each quarter of the noise levels, which training draws equally often, at a time and
with a noise that are functions of its number alone. So the figures of two checkpoints, or of two runs, compare.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import DiffusionConfig, EvalRunConfig, TrainConfig
from pipeline.config.tasks.figures import QUARTERS
from pipeline.config.tasks.found import present
from pipeline.data.format.contract import ENCODER_FACTS, require_match
from pipeline.data.format.manifest import Manifest
from pipeline.data.joined.opening import joined
from pipeline.data.reading.shards import first_records
from pipeline.diffusion.objective import Objective, training_randomness
from pipeline.diffusion.timesteps import quarter_times
from pipeline.distributed.world import World, pick_device
from pipeline.errors import ConfigError, DatasetError, Interrupted
from pipeline.evaluation.card import versions
from pipeline.evaluation.figures import standard_error
from pipeline.evaluation.metrics.error_bars import wilson
from pipeline.evaluation.stored import write
from pipeline.inference.classifier import TrainedClassifier, build_classifier, load_classifier
from pipeline.inference.pictures import frozen
from pipeline.inference.precision import products
from pipeline.log import log
from pipeline.models.classifier import Classifier
from pipeline.models.encoders.latents import Latents
from pipeline.models.weights import weights_digest
from pipeline.runs.datasets import require_arrays, require_conditions, stored_members
from pipeline.runs.directory import RunInfo, dataset_digests, load_classifier_run
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking import terminal

SEED = 0x636C73
"""Seed of the noise. It is not a run's, so that no record gets the noise that it got in training."""
CLASS = "cond.class"
BATCH = 64
"""Records in a batch; figures depend on it by rounding only."""
NONE_OF_IT = (
    *("features", "features_weights", "perceptual", "guidance", "sampler", "steps", "guidance_low"),
    *("guidance_high", "rescale", "strength", "keep", "reference", "encoders", "seed", "caption"),
    *("precision", "tf32"),
)
"""Keys of `latentmill eval` that say how pictures are drawn and judged."""

Evaluate = Callable[[dict[str, Tensor], int, Callable[[], bool]], Mapping[str, Any]]
"""(full weights by parameter name, n, whether this rank was asked to stop) -> metrics."""
Answer = tuple[bool, float]
"""Of one record in one quarter: whether the likeliest class is its own, and the cross-entropy in nats."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A classifier's figures and what they were made from.

    metrics: under the names of metrics.json. images: records looked at. n, weights: samples seen by the weights, and
    their name. pictures: digest of the manifest whose first records they are, and their number. diffusion: the noise
    levels.
    """

    kind: Literal["classifier"] = "classifier"
    metrics: dict[str, Any]
    images: int
    n: int
    weights: str
    weights_sha256: str
    pictures: dict[str, Any]
    diffusion: dict[str, Any]
    device: str
    versions: dict[str, str] = field(default_factory=versions)
    format: int = 1

    def line(self) -> str:
        """The figures and how they were made, in one line for a paper."""
        figures = [
            f"{name} {self.metrics[name]:.{figure.digits}f} {self.error(name)}".rstrip()
            for name, figure in present(self.metrics)
        ]
        made = [
            f"{self.images:,} records of {self.pictures['dataset'][:12]} in each quarter of the noise levels",
            f"most common class {self.metrics['accuracy_baseline']:.3f}, its entropy "
            f"{self.metrics['cross_entropy_baseline']:.3f}",
            f"{self.weights} weights at {self.n:,} samples",
        ]
        return f"{', '.join(figures)}; {'; '.join(made)}; latentmill {self.versions['latentmill']}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; "line" is the one-line form."""
        return asdict(self) | {"line": self.line()}

    def error(self, name: str) -> str:
        """A figure's error bar."""
        low, high, error = (self.metrics.get(f"{name}_{end}") for end in ("low", "high", "error"))
        if low is not None and high is not None:
            return f"[{low:.3f}, {high:.3f}]"
        return "" if error is None else f"+- {error:.2g}"


@dataclass(frozen=True)
class Classified:
    """An evaluation: figures, no picture."""

    n: int
    metrics: dict[str, Any]
    card: Card
    grid: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8))
    captions: list[str] = field(default_factory=list)
    shown: None = None


class Classifying:
    """What the evaluations of one run share: the first `most` records of a cache, or all where it has fewer. members:
    the array of latents and the class. Raises DatasetError for a cache without records, StorageError, ShardCorrupt."""

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        members: Sequence[str],
        most: int,
        diffusion: DiffusionConfig,
        world: World | None = None,
    ) -> None:
        self.manifest, self.diffusion, self.world = manifest, diffusion, world or World()
        self.latents = Latents.of(manifest.contract)
        self.objective = Objective(diffusion, self.world.device)
        records = list(first_records(storage, manifest, most, members))
        if not records:
            raise DatasetError(f"{storage.url} has no records to classify; name another data.val")
        self.arrays = [np.array(record.members[self.latents.member]) for record in records]
        self.classes = np.array([int(record.members[CLASS]) for record in records])

    def __call__(
        self,
        classifier: Classifier,
        n: int,
        *,
        images: int,
        weights: str = "ema",
        weights_sha256: str = "",
        stopped: Callable[[], bool] = lambda: False,
    ) -> Classified:
        """Evaluate a classifier whose weights have seen n samples on the first `images` records, or on all. Collective:
        every rank calls it and gets the result.

        stopped: called before each batch. When it returns True on any rank, all ranks raise Interrupted.
        """
        began = time.monotonic()
        images = min(images, len(self.arrays))
        with products(tf32=False):
            own = self.world.together(lambda: self._measure(classifier, images, stopped))
        answers = {number: answer for part in self.world.gather(own) for number, answer in part.items()}
        metrics: dict[str, Any] = {"n": n, "images": images, "weights": weights}
        metrics |= figures([answers[number] for number in range(images)], self.classes[:images])
        metrics["seconds"] = self.world.first(round(time.monotonic() - began, 2))
        card = Card(
            metrics=metrics,
            images=images,
            n=n,
            weights=weights,
            weights_sha256=weights_sha256,
            pictures={"dataset": self.manifest.digest, "records": images},
            diffusion=asdict(self.diffusion),
            device=self.world.device.type,
        )
        return Classified(n, metrics, card)

    def _measure(
        self, classifier: Classifier, images: int, stopped: Callable[[], bool]
    ) -> dict[int, tuple[Answer, ...]]:
        """What the classifier says of this rank's records, in each quarter of the noise levels."""
        found: dict[int, tuple[Answer, ...]] = {}
        with frozen(classifier):
            for numbers in self._batches(images):
                if stopped():
                    raise Interrupted("the evaluation was stopped; the same command makes it anew")
                by_quarter = self._answers(classifier, numbers)
                found |= {number: tuple(part[i] for part in by_quarter) for i, number in enumerate(numbers)}
        return found

    def _answers(self, classifier: Classifier, numbers: Sequence[int]) -> list[list[Answer]]:
        """Of each quarter, the answers to these records, whose latents are of one size."""
        device = self.world.device
        images = torch.from_numpy(np.stack([self.arrays[number] for number in numbers])).to(device)
        numbers_B = torch.tensor(numbers, device=device)
        classes_B = torch.from_numpy(self.classes[numbers]).to(device)
        draws = training_randomness(SEED, numbers_B, self.latents.shape(images), self.diffusion, 0.0)
        z = self.latents.draw(images, draws.posterior)
        by_quarter = []
        for quarter in range(QUARTERS):
            times = quarter_times(SEED, numbers_B, self.diffusion, quarter, QUARTERS)
            logits = classifier(*self.objective.network_input(z, draws.noise, times)).float()
            right = (logits.argmax(dim=1) == classes_B).tolist()
            by_quarter.append(
                list(zip(right, F.cross_entropy(logits, classes_B, reduction="none").tolist(), strict=True))
            )
        return by_quarter

    def _batches(self, images: int) -> Iterator[list[int]]:
        """This rank's batches of record numbers, each of latents of one size; the same batches in any world."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number in range(images):
            by_size.setdefault(self.arrays[number].shape, []).append(number)
        cuts = [same[i : i + BATCH] for same in by_size.values() for i in range(0, len(same), BATCH)]
        yield from cuts[self.world.rank :: self.world.size]


def figures(answers: Sequence[Sequence[Answer]], classes: np.ndarray) -> dict[str, float]:
    """The figures with their error bars, from each record's answers by quarter. The bound NAME_baseline is what always
    giving the classes' own frequencies comes to: the share of the most common one, and their entropy."""
    metrics: dict[str, float] = {}

    def mean(name: str, values: list[float]) -> None:
        metrics[name], metrics[f"{name}_error"] = sum(values) / len(values), standard_error(values)

    mean("accuracy", [sum(right for right, _ in record) / len(record) for record in answers])
    mean("cross_entropy", [sum(nats for _, nats in record) / len(record) for record in answers])
    for quarter in range(QUARTERS):
        name, right = f"accuracy_q{quarter + 1}", sum(record[quarter][0] for record in answers)
        metrics[name] = right / len(answers)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = wilson(right, len(answers))
        mean(f"cross_entropy_q{quarter + 1}", [record[quarter][1] for record in answers])
    shares = np.unique(classes, return_counts=True)[1] / len(classes)
    metrics["accuracy_baseline"] = float(shares.max())
    metrics["cross_entropy_baseline"] = float(-(shares * np.log(shares)).sum())
    return metrics


def table(card: Card) -> str:
    """The figures for a terminal, a line each with its error bar and its unit."""
    rows = [
        [name, f"{card.metrics[name]:.{figure.digits}f}", card.error(name), figure.unit]
        for name, figure in present(card.metrics)
    ]
    return terminal.table(["figure", "value", "", "unit"], rows, left=(0, 2, 3))


def in_training(config: TrainConfig, run: Storage, world: World) -> Evaluate:
    """A function that evaluates weights at n samples while a run trains, stores the figures under the run's evals/ and
    returns them. It reads the records at once, so that missing files are reported before training begins. The function
    is collective."""
    settings = config.eval
    storage = open_storage(config.data.val)
    manifest = joined(storage, config.data.columns, lenient=True)
    most = max(settings.images, settings.final_images)
    members = stored_members(config.task, manifest.contract)
    classifying = Classifying(storage, manifest, members, most, config.diffusion, world)

    def evaluate(weights: dict[str, Tensor], n: int, stopped: Callable[[], bool]) -> Mapping[str, Any]:
        classifier = build_classifier(config, manifest.contract, weights, world.device)
        images = settings.final_images if n >= config.samples and settings.final_images else settings.images
        result = classifying(classifier, n, images=images, stopped=stopped)
        world.together(lambda: write(run, result), rank=0)
        return result.metrics

    return evaluate


def evaluate_run(config: EvalRunConfig, world: World | None = None) -> Card:
    """Evaluate a checkpoint of a classifier's run, store the figures in the run directory and return their card.
    Collective. Raises RunError, ConfigError, ContractMismatch, all before the first record."""
    ranks = world or World(device=pick_device(config.device))
    info, classifying, trained = ranks.together(lambda: _prepare(config, ranks))
    sha256 = weights_digest(trained.network.state_dict())
    result = classifying(
        trained.network, trained.n, images=config.images, weights=trained.weights, weights_sha256=sha256
    )
    suffix = "" if trained.weights == "ema" else f"-{trained.weights.replace('=', '')}"
    digest = hashlib.sha256(json.dumps([sha256, classifying.manifest.digest]).encode()).hexdigest()[:12]
    name = f"classify-n{result.card.images}{suffix}-{digest}"
    ranks.together(lambda: write(info.storage, result, name), rank=0)
    return result.card


def _prepare(config: EvalRunConfig, world: World) -> tuple[RunInfo[TrainConfig], Classifying, TrainedClassifier]:
    """Load what an evaluation of a checkpoint needs, as one rank, which meets no other here."""
    info = load_classifier_run(config.run)
    default = EvalRunConfig()
    for key in NONE_OF_IT:
        if getattr(config, key) != getattr(default, key):
            raise ConfigError(f"{key}: {config.run} is the run of a classifier, which draws nothing; leave it out")
    run = info.config
    if not (val := config.data.val or run.data.val):
        raise ConfigError(f"{config.run} has no data.val: give the cache whose records are classified, data.val=")
    where, storage = f"data.val={val}", open_storage(val)
    manifest = joined(storage, config.data.columns or run.data.columns, lenient=True)
    trained = load_classifier(config.run, config.at, config.weights, world.device, config.ema)
    facts = tuple(fact for fact in ENCODER_FACTS if not fact.startswith("text"))
    require_match(trained.contract, manifest.contract, where, facts)
    require_arrays(run, manifest.contract, where)
    ours = f"data.train={run.data.train}"
    require_conditions(run.task.conditions, trained.contract, manifest.contract, where, ours)
    if manifest.own.digest in dataset_digests(info.facts):
        log.warning(f"eval: {where} is what {config.run} was trained on: its records are not new to the classifier")
    members = stored_members(run.task, manifest.contract)
    return info, Classifying(storage, manifest, members, config.images, run.diffusion, world), trained
