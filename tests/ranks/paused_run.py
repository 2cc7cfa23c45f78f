"""Stands in for python in jobs of `latentmill submit train`: the real verb, which something befalls at a chosen sample.

PAUSES is a JSON object: how often the job has been back in the queue -> [n, what]. what: "wait" at n until asked to
stop, "kill" the last rank with SIGKILL there, "freeze" it with SIGSTOP. PAUSED is a folder in which each rank that has
come there leaves a file RESTART-RANK.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from pipeline import cli
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.exits import leave
from pipeline.training.trainer import Trainer


def main(argv: list[str]) -> int:
    """argv: -m pipeline.cli VERB KEY=VALUE ..., or -m and another module, in which nothing befalls."""
    if argv[1] != "pipeline.cli":
        os.execv(sys.executable, [sys.executable, *argv])
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    n, what = json.loads(os.environ["PAUSES"]).get(restart, [-1, ""])
    next_batch = Trainer._next_batch

    def paused(self: Trainer, stream: Stream) -> Batch:
        if self.n == n:
            Path(os.environ["PAUSED"], f"{restart}-{self.world.rank}").touch()
            last = self.world.rank == self.world.size - 1
            while what == "wait" and self.stop.number is None:
                time.sleep(0.01)
            if what in ("kill", "freeze") and last:
                os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        return next_batch(self, stream)

    Trainer._next_batch = paused  # type: ignore[method-assign]
    return cli.main(argv[2:])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
