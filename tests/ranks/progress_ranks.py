"""Ranks that share a terminal: `python -m ranks.progress_ranks HOW` starts two of them and waits (HOW=launch), as
torchrun does with HOW=rank. Rank 0 shows a bar; both log, and rank 0 prints a result. HOW=killed: rank 0 is killed
meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import time

from pipeline.distributed.exits import guarded, leave
from pipeline.distributed.ranks import run_local
from pipeline.errors import RunError
from pipeline.log import log, show
from pipeline.tracking.progress import Progress

STEPS = 40


def main(argv: list[str]) -> int:
    how = argv[0]
    rank = int(os.environ.get("RANK", "-1"))
    if rank < 0:
        status = run_local("ranks.progress_ranks", argv, 2, 1)

        def end() -> int:
            raise RunError(f"the job has ended with {status}")

        return guarded("train", end) if status else 0
    with Progress(STEPS, "train", enabled=rank == 0) as progress:
        for step in range(STEPS):
            time.sleep(0.02)
            progress.update(loss=0.5)
            if step == STEPS // 2:
                log.warning(f"half of the steps of rank {rank}")
                if rank == 0:
                    show("a result")
            if how == "killed" and rank == 0 and step == STEPS - 5:
                os.kill(os.getpid(), signal.SIGKILL)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
