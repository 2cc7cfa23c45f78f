"""Runs that end without a word before a step, as a machine leaves them that is gone."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.world import World
from pipeline.training.trainer import Trainer


class Lost(Exception):
    """A run that is left."""


def lose(at: Callable[[Trainer], int | None], killed: Callable[[Trainer], bool]) -> None:
    """From here on this process leaves a run before the step at n = at(trainer), or is killed there with its peers
    where killed(trainer)."""
    next_batch = Trainer._next_batch

    def lost(self: Trainer, stream: Stream) -> Batch:
        if self.n == at(self):
            self.commits.settle()  # what is on its way in the background comes before the loss, however slow it is
            if killed(self):
                self.world.barrier()  # no rank is within a step any more
                os.kill(os.getpid(), signal.SIGKILL)
            raise Lost
        return next_batch(self, stream)

    Trainer._next_batch = lost  # type: ignore[method-assign]


def train_until_lost(train: Callable[[Any, World], None], config: Any, world: World) -> None:
    """Train as a rank of a world that lives on, unless it is killed."""
    try:
        train(config, world)
    except Lost as error:
        traceback.clear_frames(error.__traceback__)  # the frames hold the engine
