"""A run of ours that trains a step when it is asked to, with all that `latentmill` does around a step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.distributed.world import World
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.assembly import make_trainer
from pipeline.training.engines.base import Engine
from pipeline.training.inputs import Data
from pipeline.training.objectives.base import Objective

FOREVER = 10**12  # samples


class Stepping:
    """A trainer with its stream, engine, averages, ledger, metrics and watchdog. folder: what `close` removes."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        *,
        data: Data,
        engine: Engine,
        objective: Objective,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self._folder, self._engine = folder, engine
        run = open_storage(config.run)
        self._tracker = Tracker(run, config.tracking, folder=Path(folder.name), enabled=world.rank == 0)
        self.trainer = make_trainer(
            config,
            world=world,
            engine=engine,
            stream_from=lambda n: data.stream_from(start_n=n),
            objective=objective,
            run=run,
            folder=Path(folder.name),
            tracker=self._tracker,
            manifests=data.manifests,
            mixture=data.mixture,
        )
        self.trainer.resume()
        self.trainer.watch.stalls.seconds = 0.0
        self._steps: Iterator[int] = self.trainer.steps()  # type: ignore[assignment]

    def step(self) -> None:
        next(self._steps)

    def close(self) -> None:
        self._steps.close()  # type: ignore[attr-defined]
        self.trainer.watch.stop()
        self._tracker.close()
        self._engine.destroy()
        del self.trainer, self._engine
        self._folder.cleanup()
