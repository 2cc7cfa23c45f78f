"""Replaces python in jobs of `latentmill submit train`: runs the real verb and disturbs it at a chosen sample.

PAUSES is a JSON object: number of requeues -> [n, what], or [n, what, ending] for runs alone whose paths end so. what:
"wait" waits at n until the job is asked to stop, "kill" sends SIGKILL to the last rank there, "kill first" to rank 0,
"freeze" sends SIGSTOP to the last rank.
PAUSED is a folder in which each rank that has reached n writes a file RESTART-RANK.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from made.plans import plan_shortly
from pipeline import cli
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.exits import leave
from pipeline.training.trainer import Trainer


def main(argv: list[str]) -> int:
    """argv: -P -m pipeline.cli VERB KEY=VALUE ..., or -P -m and another module, which is not disturbed."""
    if argv[2] != "pipeline.cli":
        os.execv(sys.executable, [sys.executable, *argv])
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    n, disturbance, *ending = json.loads(os.environ["PAUSES"]).get(restart, [-1, ""])
    if not all(any(word.startswith("run=") and word.endswith(text) for word in argv) for text in ending):
        n = -1
    plan_shortly()
    next_batch = Trainer._next_batch

    def paused(self: Trainer, stream: Stream) -> Batch:
        if self.n == n:
            Path(os.environ["PAUSED"], f"{restart}-{self.world.rank}").touch()
            is_last = self.world.rank == self.world.size - 1
            while disturbance == "wait" and self.stop.number is None:
                time.sleep(0.01)
            if disturbance == "kill first" and self.world.rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if disturbance in ("kill", "freeze") and is_last:
                os.kill(os.getpid(), signal.SIGKILL if disturbance == "kill" else signal.SIGSTOP)
        return next_batch(self, stream)

    Trainer._next_batch = paused  # type: ignore[method-assign]
    return cli.main(argv[3:])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
