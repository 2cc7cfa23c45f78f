"""Puts a trainer together from its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline.config import TrainConfig
from pipeline.diffusion.objective import Objective
from pipeline.distributed.world import World
from pipeline.planning.flops import Flops
from pipeline.storage.base import Storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.commits import Commits
from pipeline.training.engines.base import Engine
from pipeline.training.evaluations import Evaluate, Evaluations
from pipeline.training.inputs import Inputs
from pipeline.training.losses import SampleLosses
from pipeline.training.recorder import Recorder
from pipeline.training.state import TrainingState
from pipeline.training.trainer import Trainer
from pipeline.training.validation import ValidationLoss
from pipeline.training.watch.progress import ProgressWatch


def make_trainer(
    config: TrainConfig,
    *,
    world: World,
    engine: Engine,
    inputs: Inputs,
    run: Storage,
    folder: Path,
    tracker: Tracker,
    manifests: Mapping[str, str],
    mixture: Sequence[int] = (),
    evaluate: Evaluate | None = None,
    validation: ValidationLoss | None = None,
    fence: Callable[[], None] | None = None,
    flops: Flops | None = None,
) -> Trainer:
    """A trainer of the run in `run`. Collective.

    folder: local folder for files that grow, where the run directory is not local. manifests, mixture, fence: as
    Commits has them. evaluate, validation: None for none. flops: None where they are not counted.
    """
    state = TrainingState(config, engine)
    losses = SampleLosses(Objective(config.diffusion, world.device), engine)
    stall_s = config.tracking.stall_s if world.rank == 0 else 0.0
    watch = ProgressWatch(config.watchdog_s, stall_s, partial(tracker.alert, "stall"))
    recorder = Recorder(config, world=world, run=run, folder=folder, tracker=tracker, flops=flops)
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
        losses=losses,
        inputs=inputs,
        evaluate=evaluate,
        validation=validation,
    )
    return Trainer(
        config,
        world=world,
        state=state,
        inputs=inputs,
        losses=losses,
        recorder=recorder,
        commits=commits,
        evaluations=evaluations,
        watch=watch,
    )
