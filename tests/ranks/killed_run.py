"""A rank of a run on two ranks that is killed, frozen or undisturbed: `python -m ranks.killed_run FOLDER WHAT N`.

WHAT happens to the last rank before the step at N: kill (SIGKILL) or freeze (SIGSTOP). With "finish" nothing happens,
and an undisturbed run of the same kind follows in the same processes.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from functools import partial

from made.plans import plan_shortly
from pipeline import train
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import guarded, leave
from pipeline.training.trainer import Trainer
from ranks.faulty_run import attempt, config_of

WATCHDOG_SECONDS = 6.0
SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


def main(argv: list[str]) -> int:
    folder, what, n = argv
    plan_shortly()
    config = config_of(f"{folder}/run", f"{folder}/cache", world=2)
    if what == "finish":
        world = distributed.start("cpu", threads=1)
        for run in (config, replace(config, run=f"{folder}/undisturbed")):
            attempt(run, world)
        distributed.stop(world)
        return 0
    next_batch = Trainer._next_batch

    def struck(self: Trainer, stream: Stream) -> Batch:
        if self.n == int(n) and self.world.rank == 1:
            os.kill(os.getpid(), SIGNALS[what])
        return next_batch(self, stream)

    Trainer._next_batch = struck  # type: ignore[method-assign]
    limited = replace(config, step_limit_s=WATCHDOG_SECONDS)  # the first step may take longer on a busy machine
    return guarded("train", partial(train.main, limited))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
