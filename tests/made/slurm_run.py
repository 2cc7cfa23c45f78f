"""The arguments of a run that a real Slurm trains in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from made.cache import WIDTH
from ranks.faulty_run import BATCH

END = 12 * BATCH
SMALL = ["cluster.gpus=0", "cluster.cpus=1", "cluster.time=10"]
TRAIN = [
    "model.channels=8",
    "model.multipliers=[1]",
    "model.blocks=1",
    "model.attention=[1]",
    "model.heads=2",
    "model.norm_groups=4",
    f"model.context_width={WIDTH}",
    f"optim.batch={BATCH}",
    "optim.warmup=80",
    "deepspeed=zero2",
    f"checkpoint.every={5 * BATCH}",
    "checkpoint.keep=20",
    f"tracking.every={BATCH}",
    "tracking.wandb=offline",
    f"samples={END}",
    "seed=3",
]


def until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not come within {seconds:.0f} s"
        time.sleep(0.05)
