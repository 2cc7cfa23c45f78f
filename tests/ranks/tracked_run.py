"""A run that TensorBoard tracks: `python -m ranks.tracked_run FOLDER NAME [WHEN]`. WHEN=committed: it is killed
(SIGKILL) when the commit at EVERY is there and in metrics.jsonl, and before TensorBoard has been told. WHEN=training:
before a step after the next commit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline import train
from pipeline.config import TrackingConfig
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.exits import guarded, leave
from pipeline.tracking.event_files import EventFiles
from pipeline.training.trainer import Trainer
from ranks.faulty_run import BATCH, EVERY, config_of


def main(argv: list[str]) -> int:
    folder, name, *when = argv
    tracking = TrackingConfig(to=("tensorboard",), every=BATCH)
    config = config_of(f"{folder}/{name}", f"{folder}/cache", tracking=tracking)
    write_row, next_batch = EventFiles.row, Trainer._next_batch

    def killed_at_row(self: EventFiles, row: Mapping[str, Any]) -> None:
        if when == ["committed"] and (row["kind"], row["n"]) == ("checkpoint", EVERY):
            os.kill(os.getpid(), signal.SIGKILL)
        write_row(self, row)

    def killed_at_step(self: Trainer, stream: Stream) -> Batch:
        if when == ["training"] and self.n == 2 * EVERY + 2 * BATCH:
            self.commits.settle()
            os.kill(os.getpid(), signal.SIGKILL)
        return next_batch(self, stream)

    EventFiles.row = killed_at_row  # type: ignore[method-assign]
    Trainer._next_batch = killed_at_step  # type: ignore[method-assign]
    return guarded("train", partial(train.main, config))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
