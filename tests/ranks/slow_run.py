"""Replaces python in jobs of the soak test: runs the real verb with steps that take SLOW seconds longer, so that a run
of few steps lasts long enough to be disturbed."""

from __future__ import annotations

import os
import sys
import time

from pipeline import cli
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.exits import leave
from pipeline.training.trainer import Trainer


def main(argv: list[str]) -> int:
    """argv: -P -m pipeline.cli VERB KEY=VALUE ..., or -P -m and another module, which is not slowed down."""
    if argv[2] != "pipeline.cli":
        os.execv(sys.executable, [sys.executable, *argv])
    seconds, next_batch = float(os.environ["SLOW"]), Trainer._next_batch

    def slow(self: Trainer, stream: Stream) -> Batch:
        time.sleep(seconds)
        return next_batch(self, stream)

    Trainer._next_batch = slow  # type: ignore[method-assign]
    return cli.main(argv[3:])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
