"""Stands in for torchrun where its own start would take the time: `python -m ranks.launcher N MODULE WORD...` starts N
ranks, each in a session of its own, gives those that are left SIGTERM when one fails or SIGTERM comes, kills them GRACE
seconds later, and ends with 1 whatever they ended with. RESTARTS: how often it starts them anew first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType


def main(arguments: list[str]) -> int:
    count, module, *words = arguments
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, ask)
    for life in range(int(os.environ.get("RESTARTS", "0")) + 1):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "LIFE": str(life)},
                start_new_session=True,
            )
            for rank in range(int(count))
        ]
        while not asked and all(rank.poll() in (None, 0) for rank in ranks):
            if all(rank.poll() == 0 for rank in ranks):
                return 0
            time.sleep(0.02)
        for rank in ranks:
            rank.terminate()
        deadline = time.monotonic() + float(os.environ.get("GRACE", "1"))
        while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
            time.sleep(0.02)
        for rank in ranks:
            rank.kill()
            rank.wait()
        if asked:
            break
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
