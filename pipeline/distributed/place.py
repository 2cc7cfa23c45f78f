"""Which rank of how many this process is, according to its environment: the one reader of what launchers set there.

Launchers (torchrun, accelerate, deepspeed, `launch.processes=N`) set RANK and WORLD_SIZE, srun sets SLURM_* variables.
A shell may hold some of them from earlier. What is half set, no number, out of range or contradicts the rest is refused
in a line before anything waits for ranks that never come.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, OverrideError
from pipeline.log import log

LAST_SLURM_STEP = 0xFFFFFFF0
"""Steps that srun started have smaller numbers; batch scripts, interactive shells and the like have this or larger."""
LARGEST = 0xFFFFFFFF
"""Largest number that a variable may hold: Slurm's are of 32 bits."""
RANKS = 1 << 20
"""Largest world that is believed."""

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables in which launchers tell a rank its place."""
ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "COUNT", "STEP"))
"""Variables in which Slurm tells a task of an array its place."""
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which MPI's launchers tell a process how many there are; accelerate calls one for --mpirun_hostfile."""


@dataclass(frozen=True)
class Place:
    """One process's place among those that share some work: its rank, and how many there are; and both on its own
    machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def in_world(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has already made this process a rank of a world. Raises ConfigError."""
    return launcher_place(environ) is not None


def require_place(processes: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where the environment's place of this process is no place, or contradicts launch.processes.

    What is set beside it and means nothing is told in a warning.
    """
    place, said = launcher_place(environ), "RANK and WORLD_SIZE"
    array_place(environ)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        whole(environ, name)
    if place is None:
        task = step_place(environ)
        if task is None:
            only_place(environ)
        _tell_left_over(environ)
        if task is not None and task.world > 1:
            place, said = task, "SLURM_PROCID and SLURM_NTASKS"
    if place is not None and processes > 1 and processes != place.world:
        raise ConfigError(
            f"launch.processes={processes}, but {said} in the environment say that a launcher has already made this "
            f"process rank {place.rank} of {place.world}: leave launch.processes out, or {_unset()}"
        )


def worker_place(environ: Mapping[str, str] = os.environ) -> Place:
    """This process's place among those that share work without exchanging anything, and so need no process group.

    RANK and WORLD_SIZE as launchers set them (torchrun, accelerate, run_ranks) take precedence over srun's tasks. The
    tasks of a Slurm array multiply either: array task i of n, with w processes each, holds ranks i w to i w + w - 1 of
    n w. If an array's numbers have no even step (--array=1,5,9), two of its tasks may get the same rank. Raises
    ConfigError.
    """
    place = launcher_place(environ) or step_place(environ) or only_place(environ)
    task = array_place(environ)
    if task is None:
        return place
    number, count = task
    return Place(number * place.world + place.rank, count * place.world, place.local_rank, place.local_world)


def only_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of a process to which neither a launcher nor srun has given one: rank 0 of 1. Raises ConfigError where
    MPI has started several, of which each would believe to be the only one."""
    for name in MPI:
        if (world := whole(environ, name) or 1) > 1:
            raise ConfigError(
                f"{name}={world}: MPI has started {world} processes, and RANK and WORLD_SIZE do not say which of them "
                f"this is: start them by torchrun, accelerate launch --multi_gpu or srun; {_unset(name)}"
            )
    return Place(0, 1, 0, 1)


def launcher_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place that RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE give; None where neither of the first two is
    set. Raises ConfigError where only one is, and where they are no place."""
    rank, world = whole(environ, "RANK", high=RANKS), whole(environ, "WORLD_SIZE", 1, RANKS)
    if rank is None and world is None:
        return None
    if rank is None or world is None:
        step = step_place(environ)
        missing, given = ("RANK", "WORLD_SIZE") if rank is None else ("WORLD_SIZE", "RANK")
        if step is not None and step.world > 1:  # a batch script exports one of them, and srun says both
            value, expected = (world, step.world) if rank is None else (rank, step.rank)
            if value == expected:
                return None
            raise ConfigError(f"{given}={value}, but for srun this process has {given} {expected}: unset {given}")
        raise ConfigError(
            f"{given}={environ[given].strip()} is set, and {missing} is {_lack(environ, missing)}: a launcher sets "
            f"both; {_unset()}"
        )
    if rank >= world:
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={world}: ranks are 0 to {world - 1}; {_unset()}")
    try:
        step = step_place(environ)
    except ConfigError:  # a container passes some of Slurm's variables on; the launcher's are whole
        step = None
    if step is not None and step.world > world:
        raise ConfigError(
            f"WORLD_SIZE={world}, but srun has started {step.world} tasks of this step (SLURM_NTASKS): {_unset()}"
        )
    # deepspeed's launcher says LOCAL_SIZE.
    local_world = whole(environ, "LOCAL_WORLD_SIZE", 1, world) or whole(environ, "LOCAL_SIZE", 1, world) or world
    local_rank = whole(environ, "LOCAL_RANK", 0, local_world - 1)
    if local_rank is None:
        if rank >= local_world:
            raise ConfigError(
                f"LOCAL_RANK is {_lack(environ, 'LOCAL_RANK')}: RANK={rank} lies beyond LOCAL_WORLD_SIZE={local_world}"
            )
        local_rank = rank
    return Place(rank, world, local_rank, local_world)


def step_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among the tasks that one srun has started; None outside of a step. Raises ConfigError where
    Slurm's variables are half set, or are no place.

    Outside of a step Slurm sets the same variables, to rank 0 and the size of the whole allocation.
    """
    step = whole(environ, "SLURM_STEP_ID")
    if step is None or step >= LAST_SLURM_STEP:
        return None
    world = _needed(environ, "SLURM_NTASKS", 1, RANKS)
    rank = _needed(environ, "SLURM_PROCID", 0, world - 1)
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE", "").strip()
    if not counts:
        raise _half_set(environ, "SLURM_STEP_TASKS_PER_NODE")
    tasks_by_node = _tasks_by_node(counts)
    if sum(tasks_by_node) != world and "SLURM_HET_SIZE" not in environ:
        raise ConfigError(
            f"SLURM_NTASKS={world}, but SLURM_STEP_TASKS_PER_NODE={counts[:40]} are {sum(tasks_by_node)} tasks: "
            f"{_unset('SLURM_STEP_ID')}"
        )
    is_one_node = len(tasks_by_node) == 1 and not environ.get("SLURM_NODEID", "").strip()
    node = 0 if is_one_node else _needed(environ, "SLURM_NODEID", 0, len(tasks_by_node) - 1)
    local_world = tasks_by_node[node]
    return Place(rank, world, _needed(environ, "SLURM_LOCALID", 0, local_world - 1), local_world)


def array_place(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """(number, count) of this task among those of a Slurm array; None outside of one. Raises ConfigError where Slurm's
    variables are half set, or are no place."""
    if not any(environ.get(name, "").strip() for name in ARRAY):
        return None
    number = _needed(environ, ARRAY[0])
    first = _needed(environ, ARRAY[1], 0, number)
    count, step = _needed(environ, ARRAY[2], 1), _needed(environ, ARRAY[3], 1)
    return (number - first) // step % count, count


def adopt_step(environ: MutableMapping[str, str] = os.environ) -> None:
    """If srun alone has made this process one of several tasks, set the variables that torchrun would: RANK and so on.
    Where the ranks meet is said by meeting.py. Raises ConfigError."""
    place = step_place(environ)
    if place is None or place.world == 1 or launcher_place(environ) is not None:
        return
    environ["RANK"], environ["WORLD_SIZE"] = str(place.rank), str(place.world)
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(place.local_rank), str(place.local_world)


def take_local_rank(words: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """The words without `--local_rank=N` or `--local-rank N`, which deepspeed's launcher and torch.distributed.launch
    add; LOCAL_RANK is set where it is not. Raises OverrideError for what is no number, or another than LOCAL_RANK."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
            continue
        value = value if equals else next(rest, "")
        if not (value.isascii() and value.isdecimal() and len(value) < 8):
            raise OverrideError(f"{name}={value[:40]}: a launcher gives each rank its number on the machine here")
        if environ.setdefault("LOCAL_RANK", value).strip() not in ("", value):
            raise OverrideError(f"{word}: LOCAL_RANK={environ['LOCAL_RANK'][:40]} in the environment says otherwise")
    return kept


def whole(environ: Mapping[str, str], name: str, low: int = 0, high: int = LARGEST) -> int | None:
    """The whole number that a variable holds; None where it is not set, or empty. Raises ConfigError where it holds
    something else, or a number outside of low to high."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    if text.isascii() and text.isdecimal() and len(text) <= len(str(LARGEST)) and low <= int(text) <= high:
        return int(text)
    raise ConfigError(
        f"{name}={text[:40]} in the environment: a whole number from {low} to {high} is wanted; {_unset(name)}"
    )


def _needed(environ: Mapping[str, str], name: str, low: int = 0, high: int = LARGEST) -> int:
    """The number in a variable of Slurm's. Raises ConfigError where it is missing."""
    value = whole(environ, name, low, high)
    if value is None:
        raise _half_set(environ, name)
    return value


def _half_set(environ: Mapping[str, str], name: str) -> ConfigError:
    kind = "SLURM_ARRAY_TASK_ID" if name in ARRAY else "SLURM_STEP_ID"
    others = [one for one in ARRAY if environ.get(one, "").strip()] if name in ARRAY else ["SLURM_STEP_ID"]
    return ConfigError(
        f"{name} is {_lack(environ, name)}, and {', '.join(others)} {'is' if len(others) == 1 else 'are'} set: Slurm "
        f"sets all of them together; {_unset(*(others if name in ARRAY else [kind]))}"
    )


def _lack(environ: Mapping[str, str], name: str) -> str:
    return "empty" if name in environ else "not set"


def _unset(*names: str) -> str:
    """The advice to remove variables that are left over."""
    return f"if they are left over in this shell: unset {' '.join(names or LAUNCHER)}"


def _tell_left_over(environ: Mapping[str, str]) -> None:
    """Warn of variables that mean nothing without the others."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if environ.get(name, "").strip() not in ("", "-1", "0"):
            log.warning(f"{name}={environ[name][:40]} is passed over: RANK and WORLD_SIZE are not set")
    if environ.get("SLURM_STEP_NUM_TASKS", "").strip() and not environ.get("SLURM_STEP_ID", "").strip():
        log.warning("SLURM_STEP_NUM_TASKS is passed over: SLURM_STEP_ID is not set, so this is the only process")
    if environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and environ.get("MASTER_PORT", "").strip():
        # What accelerate sets where it was told of several and starts one; the port may be of this shell, too.
        log.warning(
            "accelerate launch --cpu has started one process, and may have been told of several (--num_processes): for "
            "several ranks on CPUs tell it --multi_gpu, and the run device=cpu"
        )


def _tasks_by_node(counts: str) -> Sequence[int]:
    """Number of tasks on each of a step's nodes. counts: as Slurm writes it, 2, 2, 2, 1 as "2(x3),1". Raises
    ConfigError."""
    tasks_by_node: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:\(x(\d{1,7})\))?", part, re.ASCII)
        times = int(match[2] or 1) if match else 0
        if match is None or len(tasks_by_node) + times > RANKS or int(match[1]) == 0 or times == 0:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE={counts[:40]} in the environment is not as Slurm writes it, such as "
                f"2(x3),1; {_unset('SLURM_STEP_ID')}"
            )
        tasks_by_node += [int(match[1])] * times
    return tasks_by_node


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
