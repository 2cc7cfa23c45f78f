"""Starts, signals and ends the ranks of one job on this machine together.

A verb that needs several processes calls `run_ranks`, which starts rank.py once per rank and hands the resolved
configuration over as standard input. The environment tells each process its rank, as under torchrun, srun or
accelerate.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.config.loading.stored import pack
from pipeline.distributed.children import handed_over, own_command, own_environment
from pipeline.distributed.meeting import TOKEN
from pipeline.distributed.place import cores, threads_per_rank
from pipeline.distributed.signals import HINTS, INTERRUPTED_BY_KEYBOARD, STOP, forwarding, handled
from pipeline.errors import Interrupted
from pipeline.log import log

GRACE_SECONDS = 10.0
"""Time that the other ranks have to end by themselves when one has failed."""


def run_ranks(verb: str, config: Any, processes: int, threads: int) -> int:
    """Run a verb's main(config) as `processes` ranks of this machine. Returns the job's exit status, as run_local."""
    order = {"verb": verb, "launcher": os.getpid(), "config": pack(config)}
    return run_local("pipeline.distributed.rank", [verb], processes, threads, json.dumps(order).encode())


def run_local(module: str, argv: Sequence[str], processes: int, threads: int = 0, order: bytes = b"") -> int:
    """Run `python -m module argv` as `processes` ranks and wait for all of them.

    threads: CPU threads per rank, 0 = this machine's cores / ranks. order: what each rank finds as its standard input.
    SIGTERM, SIGUSR1 and SIGINT are passed on to the ranks; a second SIGINT kills them. When a rank fails, the others
    are ended. Returns the first of these that applies: 130 after a second SIGINT; 128 + the signal that killed a rank,
    unless it was sent because another rank had failed (a job then goes back to the queue); the status of the first rank
    that failed; 75 if a rank was interrupted; 0.
    """
    command = own_command(module, *argv)
    received: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        second_interrupt = number == signal.SIGINT and number in received
        received.append(signal.SIGKILL if second_interrupt else number)
        _signal_all(ranks, received[-1])

    with handled(STOP, forward):
        try:
            with reserved_port() as port, handed_over(order) as descriptor:
                token = secrets.token_hex(8)
                for rank in range(processes):
                    environment = own_environment() | rank_environment(rank, processes, port, threads)
                    environment[TOKEN] = token
                    ranks.append(subprocess.Popen(command, env=environment, stdin=descriptor, process_group=0))
                    if received:  # it has come too late to get the signal from the handler
                        _signal_all(ranks[-1:], received[-1])
                return _wait(ranks, received)
        finally:
            _signal_all(ranks, signal.SIGKILL)
            for process in ranks:
                process.wait()


def run_command(command: Sequence[str], order: bytes = b"") -> int:
    """Run a latentmill command that shares this terminal. Returns its exit status, 128 + the signal that ended it.

    order: what it finds as its standard input. Ctrl-C reaches the command from the terminal, as it reaches this
    process, which ignores it: the command may have a checkpoint to write. Other signals are passed on.
    """
    children: list[subprocess.Popen[bytes]] = []

    def send(number: int) -> None:
        for child in children:
            child.send_signal(number)

    with forwarding(send), handed_over(order) as descriptor:
        children.append(subprocess.Popen(command, env=own_environment(), stdin=descriptor))
        status = children[0].wait()
    return status if status >= 0 else 128 - status


def rank_environment(rank: int, world: int, port: int, threads: int) -> dict[str, str]:
    """The environment variables of a rank that torch.distributed and OpenMP read."""
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
        # OpenMP's threads spin while they wait. With more threads than cores, that took 40 times a step's own time.
        environment["OMP_WAIT_POLICY"] = "passive"
    return environment


def _wait(ranks: list[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait for every rank, and end the others when one fails. Returns the job's exit status. received: the signals
    passed on so far, of which SIGKILL stands for a second Ctrl-C."""
    failure, killed = 0, 0  # exit statuses of the first rank that failed, and of the first that a signal killed
    deadline = float("inf")
    sent: set[int] = set()  # signals that ended ranks because another failed
    statuses: dict[int, int] = {}
    while len(statuses) < len(ranks):
        for rank, process in enumerate(ranks):
            status = process.poll()
            if rank in statuses or status is None:
                continue
            statuses[rank] = status
            if signal.SIGKILL in received:  # a second Ctrl-C, which forward() has turned into this
                continue
            if status in (0, Interrupted.exit_code) or -status in sent:
                continue
            if status < 0:
                killed = killed or 128 - status
                if -status not in received:
                    _log_killed(rank, -status)
            if not failure:
                failure = status if status > 0 else 128 - status
                deadline = time.monotonic() + GRACE_SECONDS
                sent.add(signal.SIGTERM)
                _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            sent.add(signal.SIGKILL)
            _signal_all(ranks, signal.SIGKILL)
        time.sleep(0.02)
    if signal.SIGKILL in received:
        log.warning("a second Ctrl-C has killed the ranks; the same command goes on from the last commit")
        return INTERRUPTED_BY_KEYBOARD
    return killed or failure or (Interrupted.exit_code if Interrupted.exit_code in statuses.values() else 0)


def _log_killed(rank: int, number: int) -> None:
    """Log that a rank was killed by a signal that this process has not sent."""
    name = signal.Signals(number).name
    log.error(f"rank {rank} was killed by {name}{HINTS.get(signal.Signals(number), '')}")


def _signal_all(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to every rank that still runs, and to the processes that it started."""
    for process in ranks:
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                pass


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port of the loopback interface, reserved for the rank that will listen on it.

    Ranks import PyTorch for seconds before one of them listens. By then a port that was only found to be free may have
    become the source port of another process's connection. A socket that is bound without listening reserves the port,
    yet allows a listener that sets SO_REUSEADDR too, as torch.distributed's store does.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]
