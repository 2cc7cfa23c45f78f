"""Which rank of how many this process is, according to its environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

LAST_SLURM_STEP = 0xFFFFFFF0
"""Steps that srun started have smaller numbers; batch scripts, interactive shells and the like have this or larger."""


FIRST_PORT, PORTS = 20_000, 12_000
"""Ports at which ranks that srun starts meet: below those that systems give to outgoing connections."""


def in_world() -> bool:
    """Whether a launcher has already made this process a rank of a world."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@dataclass(frozen=True)
class Place:
    """One process's place among those that share some work: its rank, and how many there are; and both on its own
    machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def worker_place(environ: Mapping[str, str] = os.environ) -> Place:
    """This process's place among those that share work without exchanging anything, and so need no process group.

    RANK and WORLD_SIZE as launchers set them (torchrun, accelerate, run_ranks) take precedence over srun's tasks. The
    tasks of a Slurm array multiply either: array task i of n, with w processes each, holds ranks i w to i w + w - 1 of
    n w. If an array's numbers have no even step (--array=1,5,9), two of its tasks may get the same rank.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank = int(environ.get("LOCAL_RANK") or rank)
        local_world = int(environ.get("LOCAL_WORLD_SIZE") or world)
    elif (place := step_place(environ)) is not None:
        rank, world, local_rank, local_world = place.rank, place.world, place.local_rank, place.local_world
    else:
        rank, world, local_rank, local_world = 0, 1, 0, 1
    if "SLURM_ARRAY_TASK_ID" in environ:
        number, first, count, step = (
            int(environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT", "STEP")
        )
        rank, world = (number - first) // step % count * world + rank, count * world
    return Place(rank, world, local_rank, local_world)


def step_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among the tasks that one srun has started; None outside of a step.

    Outside of a step Slurm sets the same variables, to rank 0 and the size of the whole allocation.
    """
    if int(environ.get("SLURM_STEP_ID") or LAST_SLURM_STEP) >= LAST_SLURM_STEP:
        return None
    tasks = _tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], int(environ.get("SLURM_NODEID") or 0))
    return Place(int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]), int(environ["SLURM_LOCALID"]), tasks)


def adopt_step(environ: MutableMapping[str, str] = os.environ) -> None:
    """If srun alone has made this process one of several tasks, set the variables that torchrun would: RANK and so on.

    The ranks meet on the step's first node, at a port computed from the numbers of job, step and restart.
    """
    place = step_place(environ)
    if place is None or place.world == 1 or ("RANK" in environ and "WORLD_SIZE" in environ):
        return
    job, step, restart = (int(environ.get(f"SLURM_{name}") or 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    environ["RANK"], environ["WORLD_SIZE"] = str(place.rank), str(place.world)
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(place.local_rank), str(place.local_world)
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    environ.setdefault("MASTER_PORT", str(FIRST_PORT + (job + 7 * step + 1009 * restart) % PORTS))


def first_host(nodes: str) -> str:
    """The first host of a node list as Slurm writes it: gpu[03-07,9]-a,login -> gpu03-a."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _tasks_on_node(counts: str, node: int) -> int:
    """Number of tasks on a step's node number `node`. counts: as Slurm writes it, 2, 2, 2, 1 as "2(x3),1"."""
    tasks_by_node: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks_by_node += [int(tasks)] * int(times or 1)
    return tasks_by_node[node]


def threads_per_rank(threads: int, ranks: int) -> int:
    """`threads`, or if that is 0, an equal share of this machine's cores for each of its ranks."""
    return threads or max(1, cores() // ranks)


def cores() -> int:
    """Number of cores that this process may use, by its affinity and its container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
