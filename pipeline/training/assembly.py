"""Puts a trainer together from its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config.values.steps import profiled_steps
from pipeline.data.reading.stream import Stream
from pipeline.distributed.world import World
from pipeline.runs.directory import COLUMNS, last_sample
from pipeline.storage.base import Storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.commits import Commits
from pipeline.training.engines.base import Engine
from pipeline.training.evaluations import Evaluate, Evaluations, Validate
from pipeline.training.objectives.base import Objective
from pipeline.training.recorder import Recorder
from pipeline.training.state import TrainingState
from pipeline.training.trainer import Trainer
from pipeline.training.watch.garbage import Garbage
from pipeline.training.watch.limit import CollectiveLimit, longest_collective, shorter_collective
from pipeline.training.watch.profile import StepProfile
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
    watch = ProgressWatch(
        config.watchdog_s,
        stall_s,
        partial(tracker.alert, "stall"),
        step_limit_s=config.step_limit_s,
        collectives=CollectiveLimit(
            world, longest_collective(config.watchdog_s), shorter_collective(config.step_limit_s)
        ),
        garbage=Garbage(config.gc_steps),
    )
    columns = manifests.get(COLUMNS, "")
    recorder = Recorder(config, world=world, run=run, folder=folder, tracker=tracker, columns=columns)
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
        profile=StepProfile(
            profiled_steps(config.tracking.profile),
            end=last_sample(config) // config.optim.batch,
            run=run,
            world=world,
            watch=watch,
        ),
    )
