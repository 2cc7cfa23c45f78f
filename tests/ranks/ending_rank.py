"""A rank that ends as it is told: `python -m ranks.ending_rank ENDING...`, one for each rank, and the last one for the
ranks beyond it. An ending is an exit status, with which it ends once its peers have begun, or

error: an error that nobody raised on purpose. again: the same in its first life (LIFE), then 0. kill: by SIGKILL.
wait: runs until it is asked to stop, and ends with 75 COMMITTING seconds later. sleeps: the same at once, as before
the first step. deaf: runs until it is killed.
begins: says nothing of itself and ends with 1, as a module that cannot be imported. late: the same once a peer hears
signals. imports: says nothing of itself for a minute. In the folder BEGUN each makes a file of its number once it hears
signals; one that imports writes its process there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pipeline.distributed.exits import guarded, leave
from pipeline.distributed.signals import StopRequest, stopping_at_once
from pipeline.errors import Interrupted, LatentmillError


def await_begun(ranks: int) -> None:
    """Wait until so many hear signals: the launcher ends those that have not begun, too."""
    while sum(path.name.isdecimal() for path in Path(os.environ["BEGUN"]).iterdir()) < ranks:
        time.sleep(0.01)


def main(arguments: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    arguments = [word for word in arguments if not word.startswith("--local_rank=")]  # deepspeed's
    how = arguments[min(rank, len(arguments) - 1)]
    if how == "late":
        await_begun(1)
    if how in ("begins", "late"):
        raise SystemExit(1)
    if how == "imports":
        Path(os.environ["BEGUN"], str(rank)).write_text(str(os.getpid()))
        time.sleep(60)

    def act() -> int:
        begun = Path(os.environ["BEGUN"], str(rank))
        if how == "wait":
            with StopRequest().listening() as stop:
                begun.touch()
                while stop.number is None:
                    time.sleep(0.01)
                time.sleep(float(os.environ.get("COMMITTING", "0")))
                raise Interrupted(f"stopped by {signal.Signals(stop.number).name}")
        begun.touch()
        if how.isdecimal():
            await_begun(int(os.environ.get("WORLD_SIZE", "1")))
        if how == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        if how in ("deaf", "sleeps"):
            time.sleep(60)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error" or (how, os.environ.get("LIFE")) == ("again", "0"):
            raise RuntimeError("Connection closed by peer")
        if how == "1":
            raise LatentmillError("a mistake")
        return 0 if how == "again" else int(how)

    with stopping_at_once():
        return guarded("train", act)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
