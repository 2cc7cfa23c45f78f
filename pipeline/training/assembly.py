"""Puts a trainer together from its parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from torch import nn

from pipeline.config import RunConfig
from pipeline.config.loading.merge import to_stored
from pipeline.data.reading.stream import Stream
from pipeline.distributed.world import World
from pipeline.runs.lease import Lease
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.commits import Commits
from pipeline.training.engines.base import Engine
from pipeline.training.engines.choose import make_engine
from pipeline.training.evaluations import Evaluate, Evaluations, Validate
from pipeline.training.inputs import Data
from pipeline.training.objectives.base import Objective
from pipeline.training.recorder import Recorder
from pipeline.training.state import TrainingState
from pipeline.training.trainer import Trainer
from pipeline.training.watch.progress import ProgressWatch


def make_trainer(
    config: RunConfig,
    *,
    world: World,
    engine: Engine,
    stream_from: Callable[[int], Stream],
    objective: Objective,
    run: Storage,
    folder: Path,
    tracker: Tracker,
    manifests: Mapping[str, str],
    mixture: Sequence[int] = (),
    evaluate: Evaluate | None = None,
    validation: Validate | None = None,
    validate_every: int = 0,
    fence: Callable[[], None] | None = None,
) -> Trainer:
    """A trainer of the run in `run`. Collective.

    stream_from: this rank's batches from sample number n on. folder: local folder for files that grow, where the run
    directory is not local. manifests, mixture, fence: as Commits has them. evaluate, validation,
    validate_every: as Evaluations has them.
    """
    state = TrainingState(config, engine, objective)
    stall_s = config.tracking.stall_s if world.rank == 0 else 0.0
    watch = ProgressWatch(config.watchdog_s, stall_s, partial(tracker.alert, "stall"))
    recorder = Recorder(config, world=world, run=run, folder=folder, tracker=tracker)
    commits = Commits(
        config,
        world=world,
        run=run,
        state=state,
        recorder=recorder,
        watch=watch,
        manifests=manifests,
        mixture=mixture,
        fence=fence,
    )
    evaluations = Evaluations(
        config,
        world=world,
        run=run,
        state=state,
        commits=commits,
        tracker=tracker,
        watch=watch,
        evaluate=evaluate,
        validation=validation,
        validate_every=validate_every,
    )
    return Trainer(
        config,
        world=world,
        state=state,
        stream_from=stream_from,
        objective=objective,
        recorder=recorder,
        commits=commits,
        evaluations=evaluations,
        watch=watch,
    )


def train_network(
    config: RunConfig,
    data: Data,
    world: World,
    lease: Lease | None,
    *,
    module: nn.Module,
    evaluation: Callable[[Tracker], AbstractContextManager[Evaluate | None]],
    objective_of: Callable[[Engine], tuple[Objective, Validate | None]],
    validate_every: int = 0,
) -> None:
    """Train a network whose initial weights are there to the run's last sample. Collective.

    lease: the run's, on rank 0; None on other ranks. evaluation: gives the function that evaluates weights, until it is
    left. objective_of: what the network minimizes in an engine, and what measures it on held-out records.
    """
    run = open_storage(config.run)
    engine = make_engine(module, config, world)
    settings = to_stored(config)
    with (
        tempfile.TemporaryDirectory(prefix="latentmill-") as folder,
        Tracker(run, config.tracking, settings=settings, folder=Path(folder), enabled=world.rank == 0) as tracker,
        evaluation(tracker) as evaluate,
    ):
        objective, validation = objective_of(engine)
        trainer = make_trainer(
            config,
            world=world,
            engine=engine,
            stream_from=lambda n: data.stream_from(start_n=n),
            objective=objective,
            run=run,
            folder=Path(folder),
            tracker=tracker,
            manifests=data.manifests,
            mixture=data.mixture,
            evaluate=evaluate,
            validation=validation,
            validate_every=validate_every,
            fence=lease.require_held if lease else None,
        )
        if lease:
            lease.progress = lambda: trainer.n
        try:
            trainer.run()
        finally:
            engine.destroy()
