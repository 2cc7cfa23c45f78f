"""Ranks of one job on this machine: started together, signalled together, ended together.

A verb that wants several processes calls `run_ranks`, which starts this module once per rank with the resolved
configuration; inside, the environment says which rank it is, as under torchrun, srun or accelerate.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import cli
from pipeline.config import CONFIGS
from pipeline.configload import from_dict, to_dict
from pipeline.errors import Interrupted

GRACE_SECONDS = 10.0
"""What the other ranks get to end by themselves when one has failed."""
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1
LAST_SLURM_STEP = 0xFFFFFFF0
"""Slurm's steps that srun started have numbers below; batch scripts, interactive shells and the like lie above."""
FIRST_PORT, PORTS = 20_000, 12_000
"""Where ranks that srun starts meet: below the ports that systems give to outgoing connections."""


def in_world() -> bool:
    """Whether a launcher has already placed this process as one rank of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@dataclass(frozen=True)
class Place:
    """Where one process stands among those that share some work: rank of world, and the same on its machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def worker_place(environ: Mapping[str, str] = os.environ) -> Place:
    """This process's place among those that share work and exchange nothing, so need no process group.

    Launchers that set RANK and WORLD_SIZE (torchrun, accelerate, run_ranks) come first, then srun's tasks; the tasks of
    a Slurm array multiply either: array task i of n with w processes each holds ranks i w to i w + w - 1 of n w. Where
    an array's numbers have no even step (--array=1,5,9) two of its tasks may get one rank.
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

    There the same variables are set, with rank 0 and the size of the whole allocation.
    """
    if int(environ.get("SLURM_STEP_ID") or LAST_SLURM_STEP) >= LAST_SLURM_STEP:
        return None
    tasks = _tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], int(environ.get("SLURM_NODEID") or 0))
    return Place(int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]), int(environ["SLURM_LOCALID"]), tasks)


def adopt_step(environ: MutableMapping[str, str] = os.environ) -> None:
    """Where srun alone has placed this process among several tasks, say so as torchrun would: RANK and its like.

    The ranks meet on the step's first node, at a port that follows from the numbers of job, step and restart.
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
    """The first of nodes as Slurm writes them: gpu[03-07,9]-a,login -> gpu03-a."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _tasks_on_node(counts: str, node: int) -> int:
    """Tasks on a step's node number `node`; Slurm writes 2, 2, 2, 1 as "2(x3),1"."""
    nodes: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        nodes += [int(tasks)] * int(times or 1)
    return nodes[node]


def run_ranks(verb: str, config: Any, processes: int, threads: int) -> int:
    """Run a verb's main(config) as `processes` ranks of this machine; the job's exit status."""
    return run_local("pipeline.launch", [verb, json.dumps(to_dict(config))], processes, threads)


def run_local(module: str, argv: Sequence[str], processes: int, threads: int = 0) -> int:
    """Run `python -m module argv` as `processes` ranks and wait for them all.

    threads: CPU threads per rank, 0 = this machine's cores / ranks. SIGTERM, SIGUSR1 and SIGINT are passed on; a second
    SIGINT kills. When a rank fails the others are ended. Returns 128 + the signal that has killed a rank, where it was
    not for another's failure (a job then goes back to the queue), else the first failure's status, else 75 if a rank
    was interrupted, else 0.
    """
    command = [sys.executable, "-m", module, *argv]
    received: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        _signal_all(ranks, signal.SIGKILL if again else number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        with reserved_port() as port:
            for rank in range(processes):
                environment = os.environ | rank_environment(rank, processes, port, threads)
                ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0))
            return _wait(ranks, received)
    finally:
        _signal_all(ranks, signal.SIGKILL)
        for process in ranks:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(command: Sequence[str]) -> int:
    """Run a command of ours that shares this terminal, and return its exit status (128 + the signal that ended it).

    Ctrl-C reaches it as it reaches this process, and is left to it: it may have a checkpoint to write. Other signals
    are passed on.
    """
    children: list[subprocess.Popen[bytes]] = []

    def send(number: int) -> None:
        for child in children:
            child.send_signal(number)

    with forwarding(send):
        children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        status = children[0].wait()
    return status if status >= 0 else 128 - status


@contextmanager
def forwarding(send: Callable[[int], None]) -> Iterator[None]:
    """Inside, signals to this process go to `send`, but for Ctrl-C, which reaches all processes of a terminal."""

    def forward(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:
            send(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank_environment(rank: int, world: int, port: int, threads: int) -> dict[str, str]:
    """What torch.distributed and OpenMP read."""
    per_rank = threads_per_rank(threads, world)
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(per_rank),
    }
    if per_rank * world > cores():
        # OpenMP's threads spin while they wait. With more of them than cores that cost 40 times a step's own time.
        environment["OMP_WAIT_POLICY"] = "passive"
    return environment


def threads_per_rank(threads: int, ranks: int) -> int:
    """`threads`, or for 0 this machine's cores shared among its ranks."""
    return threads or max(1, cores() // ranks)


def cores() -> int:
    """Cores that this process may use: its affinity, and its container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def _wait(ranks: list[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait for every rank; on the first failure end the others. Returns the job's exit status."""
    failure, killed = 0, 0  # statuses: of the first rank that failed, and of one that a signal killed
    deadline = float("inf")
    sent: set[int] = set()
    statuses: dict[int, int] = {}
    while len(statuses) < len(ranks):
        for rank, process in enumerate(ranks):
            status = process.poll()
            if rank in statuses or status is None:
                continue
            statuses[rank] = status
            if status in (0, Interrupted.exit_code) or -status in sent:
                continue
            if status < 0:
                killed = killed or 128 - status
                if -status not in received:
                    _tell_killed(rank, -status)
            if not failure:
                failure = status if status > 0 else 128 - status
                deadline = time.monotonic() + GRACE_SECONDS
                sent.add(signal.SIGTERM)
                _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            sent.add(signal.SIGKILL)
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.02)
    return killed or failure or (Interrupted.exit_code if Interrupted.exit_code in statuses.values() else 0)


HINTS = {
    signal.SIGKILL: "; out of memory?",
    signal.SIGALRM: ", as it had made no progress (watchdog_s); its stacks are above",
}


def _tell_killed(rank: int, number: int) -> None:
    """A line for a rank that a signal of somebody else's has killed."""
    name = signal.Signals(number).name
    print(
        f"latentmill: rank {rank} was killed by {name}{HINTS.get(signal.Signals(number), '')}",
        file=sys.stderr,
        flush=True,
    )


def _signal_all(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    """Signal every rank that still runs, and what it started."""
    for process in ranks:
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                pass


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port of the loopback interface that is kept from everyone but the rank that will listen on it.

    Ranks import PyTorch for seconds before one of them listens; a port that was only found to be free can by then be
    the source of somebody's connection. A socket that is bound and does not listen holds it, and lets a listener in
    that sets SO_REUSEADDR as this one does, which torch.distributed's store is.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def die_with_parent() -> None:
    """Have the kernel kill this rank when its launcher is gone, however it went: nothing outlives its job."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """One rank: `python -m pipeline.launch VERB CONFIG_AS_JSON`."""
    die_with_parent()
    verb, text = arguments
    module, _ = cli.VERBS[verb]
    return cli.guarded(
        verb, lambda: importlib.import_module(module).main(from_dict(CONFIGS[verb], json.loads(text))) or 0
    )


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
