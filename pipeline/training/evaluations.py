"""What a training run evaluates: held-out losses, and figures here and now or in a process beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.config import AutoencoderConfig, RunConfig, TrainConfig
from pipeline.config.loading.references import references_of
from pipeline.runs.datasets import stored_members
from pipeline.runs.directory import is_evaluated, last_sample
from pipeline.runs.profiles import OWN
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training.commits import Commits
from pipeline.training.inputs import Inputs
from pipeline.training.schedule import due
from pipeline.training.state import TrainingState
from pipeline.training.watch.progress import ProgressWatch

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.format.manifest import Manifest
    from pipeline.distributed.world import World
    from pipeline.tracking.tracker import Tracker
    from pipeline.training.objectives.diffusion import DiffusionObjective

Evaluate = Callable[[dict[str, "Tensor"], int, Callable[[], bool]], Mapping[str, Any] | None]
"""(full EMA weights by parameter name, n, whether this rank was asked to stop) -> metrics to log; called on every rank.
Raises Interrupted, on all of them, when it has left because one was."""
Validate = Callable[[], Mapping[str, Any]]
"""Metrics of held-out records, of the weights themselves; called on every rank."""


def validation_loss(config: TrainConfig, objective: DiffusionObjective, inputs: Inputs) -> Validate | None:
    """Measures the loss of held-out records; None where none are looked at. Collective."""
    from pipeline.data.joined.opening import joined
    from pipeline.training.validation import ValidationLoss

    if not (config.data.val and config.eval.loss_images):
        return None
    world = objective.engine.world

    def load() -> ValidationLoss:
        storage = open_storage(config.data.val)
        manifest = joined(storage, config.data.columns)
        members = stored_members(config.task, manifest.contract)
        batch = (config.optim.micro_batch or config.optim.batch // world.size) * world.size
        images, caption = config.eval.loss_images, config.eval.caption
        return ValidationLoss.load(storage, manifest, members, images, batch, config.diffusion, world, caption)

    validation = world.together(load)
    return lambda: validation(objective.sample_losses, inputs.latents, inputs.conditions)


@contextmanager
def evaluation(
    config: TrainConfig, run: Storage, world: World, manifest: Manifest, empty: Tensor | None, tracker: Tracker
) -> Iterator[Evaluate | None]:
    """The function that has weights evaluated at n for the captions of data.val: here and now, or beside training."""

    def load() -> Evaluate:
        from pipeline.evaluation.runs.while_training import in_training

        return in_training(config, run, world, manifest, empty)

    with _where_it_is(config, run, world, tracker, load) as evaluate:
        yield evaluate


@contextmanager
def first_stage_evaluation(
    config: AutoencoderConfig, run: Storage, world: World, tracker: Tracker
) -> Iterator[Evaluate | None]:
    """The function that has an autoencoder's weights evaluated at n on the pictures of data.val, as `evaluation`."""

    def load() -> Evaluate:
        from pipeline.evaluation.reconstruction.runs import in_training

        return world.together(lambda: in_training(config, run, world))

    with _where_it_is(config, run, world, tracker, load) as evaluate:
        yield evaluate


@contextmanager
def classifier_evaluation(
    config: TrainConfig, run: Storage, world: World, tracker: Tracker
) -> Iterator[Evaluate | None]:
    """The function that has a classifier's weights evaluated at n on the records of data.val, as `evaluation`."""

    def load() -> Evaluate:
        from pipeline.evaluation.classifier import in_training

        return world.together(lambda: in_training(config, run, world))

    with _where_it_is(config, run, world, tracker, load) as evaluate:
        yield evaluate


@contextmanager
def _where_it_is(
    config: RunConfig, run: Storage, world: World, tracker: Tracker, load: Callable[[], Evaluate]
) -> Iterator[Evaluate | None]:
    """load: loads what measures weights here and stores the figures."""
    if not config.data.val:
        yield None
    elif config.eval.where == "job":
        with beside(config, run, world, tracker) as evaluate:
            yield evaluate
    else:
        yield inside(run, world, tracker, load())


def inside(run: Storage, world: World, tracker: Tracker, measure: Evaluate) -> Evaluate:
    """On all ranks, which wait for it."""
    from pipeline.evaluation.beside import show

    def evaluate(weights: dict[str, Tensor], n: int, stopped: Callable[[], bool]) -> Mapping[str, Any] | None:
        metrics = measure(weights, n, stopped)
        world.together(lambda: show(run, n, tracker), rank=0)
        return metrics

    return evaluate


@contextmanager
def beside(config: RunConfig, run: Storage, world: World, tracker: Tracker) -> Iterator[Evaluate]:
    """In a process of its own, on a snapshot: nobody waits."""
    from pipeline.evaluation.beside import LOG, Jobs, Starter

    if world.rank:
        yield lambda weights, n, stopped: None
        return
    start = Starter(
        references_of(config).get("run", config.run), config.eval.cluster, config.device, run.local_path(LOG)
    )
    with Jobs(run, tracker, start) as jobs:
        yield lambda weights, n, stopped: jobs.evaluate(n, weights)


class Evaluations:
    """Looks at the weights before, while and after training. evaluate, validation: None for none. validate_every:
    samples between validations; 0 = with every commit."""

    def __init__(
        self,
        config: RunConfig,
        *,
        world: World,
        run: Storage,
        state: TrainingState,
        commits: Commits,
        tracker: Tracker,
        watch: ProgressWatch,
        evaluate: Evaluate | None = None,
        validation: Validate | None = None,
        validate_every: int = 0,
    ) -> None:
        self.config, self.world, self.run, self.state = config, world, run, state
        self.commits, self.tracker, self.watch = commits, tracker, watch
        self.evaluate, self.validation = evaluate, validation
        self.validate_every = validate_every or config.checkpoint.every
        self.end = last_sample(config)

    def validate_if_due(self) -> None:
        """The loss of held-out records, of the weights themselves. Collective."""
        n = self.state.n
        if self.validation is None or not (due(n, self.validate_every, self.state.batch) or n == self.end):
            return
        with self.watch.paused():
            row = self.validation()
        self.tracker.log(n, row, kind="val")

    def evaluate_if_due(self, stopped: Callable[[], bool]) -> None:
        """Evaluate the EMA weights before, while and after training; never twice at one n, over restarts too.

        stopped: whether this rank was asked to stop. Collective. Raises Interrupted, on every rank, where one was.
        """
        n = self.state.n
        if self.evaluate is None:
            return
        if not (n in (0, self.end) or due(n, self.config.eval.every, self.state.batch)):
            return
        if self.world.first(is_evaluated(self.run, n)):
            return
        if n > 0 and self.commits.newest != n and self.config.eval.where == "train":
            self.commits.save()  # an evaluation is long, and may be killed
        with self.watch.paused():
            weights = self.state.engine.gather(self.state.averages()[OWN])
            metrics = self.evaluate(weights, n, stopped)
        if metrics:
            self.tracker.log(n, metrics, kind="eval")
