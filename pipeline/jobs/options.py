"""What the jobs of all verbs share: their description, and options of sbatch and srun. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import ClusterConfig
from pipeline.scheduler.script import Script


@dataclass(frozen=True)
class Job:
    """The batch scripts of one verb. scripts: each starts when the one before has ended, in whatever way. run: the run
    directory whose lease the first one gets; "" for none. makes: datasets and runs that exist when the last has
    succeeded. notes: lines to print about the job."""

    scripts: Sequence[Script]
    run: str = ""
    makes: Sequence[str] = ()
    notes: Sequence[str] = ()


def resources(cluster: ClusterConfig, processes: int, nodes: int = 1) -> dict[str, str | None]:
    """Options of sbatch for a job with `processes` processes on each of its nodes."""
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
    """The further options of sbatch that the cluster's description gives; they replace ours."""
    parts = [option.partition("=") for option in cluster.options]
    return {name: value if equals else None for name, equals, value in parts}


def gres(cluster: ClusterConfig) -> str:
    """The value of --gres: the GPUs of each node; "" for none."""
    count = cluster.gpus * cluster.processes
    return ":".join(filter(None, ["gpu", cluster.gpu_type, str(count)])) if count else ""


def requeueing(cluster: ClusterConfig, name: str = "TERM") -> dict[str, str | None]:
    """Options of sbatch for a task that may go back to the queue. name: the signal that tells it to stop before its
    time limit; "" = none."""
    return {
        "--open-mode": "append",
        "--requeue" if cluster.requeue else "--no-requeue": None,
        "--signal": f"{name}@{cluster.signal}" if cluster.signal and name else "",
    }


def step(cluster: ClusterConfig, processes: int) -> list[str]:
    """Options of srun, which since Slurm 22.05 does not inherit cpus-per-task from sbatch."""
    return [f"--ntasks={processes}", f"--cpus-per-task={cluster.cpus}", *(["--label"] if processes > 1 else [])]
