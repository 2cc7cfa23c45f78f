"""What a training run evaluates: held-out losses, and figures here and now or in a process beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainConfig
from pipeline.errors import LatentmillError
from pipeline.runs.datasets import stored_members
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training.inputs import Data

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.format.manifest import Manifest
    from pipeline.distributed.world import World
    from pipeline.tracking.tracker import Tracker
    from pipeline.training.trainer import Evaluate
    from pipeline.training.validation import ValidationLoss


def validation_loss(config: TrainConfig, world: World, data: Data) -> ValidationLoss | None:
    """Held-out records whose loss is looked at; None for none. Collective."""
    from pipeline.data.format.manifest import load_manifest
    from pipeline.training.validation import ValidationLoss

    if not (config.data.val and config.eval.loss_images):
        return None
    found, failure = None, None
    try:
        storage = open_storage(config.data.val)
        manifest = load_manifest(storage)
        members = stored_members(data.task.members, manifest.contract)
        batch = (config.optim.micro_batch or config.optim.batch // world.size) * world.size
        found = ValidationLoss.load(storage, manifest, members, config.eval.loss_images, batch, config.diffusion, world)
    except LatentmillError as error:
        failure = error
    world.raise_together(failure)
    return found


@contextmanager
def evaluation(
    config: TrainConfig, run: Storage, world: World, manifest: Manifest, empty: Tensor, tracker: Tracker
) -> Iterator[Evaluate | None]:
    """The function that has weights evaluated at n for the captions of data.val: here and now, or beside training."""
    if not config.data.val:
        yield None
    elif config.eval.where == "job":
        with beside(config, run, world, tracker) as evaluate:
            yield evaluate
    else:
        yield inside(config, run, world, manifest, empty, tracker)


def inside(
    config: TrainConfig, run: Storage, world: World, manifest: Manifest, empty: Tensor, tracker: Tracker
) -> Evaluate:
    """On all ranks, which wait for it."""
    from pipeline.evaluation.beside import show
    from pipeline.evaluation.evaluate import in_training

    measure = in_training(config, run, world, manifest, empty)

    def evaluate(weights: dict[str, Tensor], n: int, stopped: Callable[[], bool]) -> Mapping[str, Any]:
        metrics = measure(weights, n, stopped)
        failure = None
        try:
            if world.rank == 0:
                show(run, n, tracker)
        except LatentmillError as error:
            failure = error
        world.raise_together(failure)
        return metrics

    return evaluate


@contextmanager
def beside(config: TrainConfig, run: Storage, world: World, tracker: Tracker) -> Iterator[Evaluate]:
    """In a process of its own, on a snapshot: nobody waits."""
    from pipeline.evaluation.beside import LOG, Jobs, Starter

    if world.rank:
        yield lambda weights, n, stopped: None
        return
    start = Starter(config.run, config.eval.cluster, config.device, run.local_path(LOG))
    with Jobs(run, tracker, start) as jobs:
        yield lambda weights, n, stopped: jobs.evaluate(n, weights)
