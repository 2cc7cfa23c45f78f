"""The jobs that `latentmill submit` makes of each verb, as batch scripts. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import ClusterConfig
from pipeline.scheduler.script import Script

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Job:
    """scripts: each follows when the one before has ended in any way. run: the run directory that the first one holds;
    "" for none. makes: datasets and runs that will be there when the last has ended well. notes: what was found."""

    scripts: Sequence[Script]
    run: str = ""
    makes: Sequence[str] = ()
    notes: Sequence[str] = ()


def resources(cluster: ClusterConfig, processes: int, nodes: int = 1) -> dict[str, str | None]:
    """Options of sbatch for a job of some processes on each node."""
    return {
        "--partition": cluster.partition,
        "--account": cluster.account,
        "--time": cluster.time,
        "--nodes": str(nodes),
        "--ntasks" if nodes == 1 else "--ntasks-per-node": str(processes),
        "--cpus-per-task": str(cluster.cpus),
        "--mem": cluster.mem,
        "--chdir": os.getcwd(),
    }


def further(cluster: ClusterConfig) -> dict[str, str | None]:
    """The cluster's own options of sbatch, which win over ours."""
    parts = [option.partition("=") for option in cluster.options]
    return {name: value if equals else None for name, equals, value in parts}


def gres(cluster: ClusterConfig) -> str:
    """GPUs of each node; "" for none."""
    count = cluster.gpus * cluster.processes
    return ":".join(filter(None, ["gpu", cluster.gpu_type, str(count)])) if count else ""


def requeueing(cluster: ClusterConfig, name: str = "TERM") -> dict[str, str | None]:
    """Options of sbatch for a task that may come back, and is told to stop before its time limit by the signal `name`
    ("" = not)."""
    return {
        "--open-mode": "append",
        "--requeue" if cluster.requeue else "--no-requeue": None,
        "--signal": f"{name}@{cluster.signal}" if cluster.signal and name else "",
    }


def step(cluster: ClusterConfig, processes: int) -> list[str]:
    """Options of srun. It has not taken cpus-per-task from sbatch since Slurm 22.05."""
    return [f"--ntasks={processes}", f"--cpus-per-task={cluster.cpus}", *(["--label"] if processes > 1 else [])]
