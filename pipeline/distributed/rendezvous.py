"""How the ranks of a world find one another: by a store that rank 0 keeps, and that all others connect to.

PyTorch's own rendezvous waits in C++, without a word and deaf to signals. Here Python waits: it says who is missing,
hears signals, has a limit, and tells rank 0 from strangers that listen on its port.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from pipeline.distributed.meeting import Meeting
from pipeline.errors import ConfigError, Interrupted, RunError
from pipeline.log import log

T = TypeVar("T")

FIRST_LINE, LINES = 10.0, 30.0
"""Seconds after which the first line says who is missing, and between the lines after that."""
ANSWER_SECONDS = 10.0
"""Time in which a store must answer; what takes longer is no store of ours."""
LOOK_SECONDS = 0.25
"""Longest pause between two looks at who is there."""
NAMED = 8
"""Number of missing ranks that a line names."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def meet(meeting: Meeting, rank: int, size: int, seconds: float) -> dist.Store:
    """Wait until all ranks of a world are there. Returns the store by which they make their process group.

    Raises Interrupted (exit status 75, which requeues) where rank 0's port is in use, ConfigError where two processes
    have the same rank or other sizes of the world, and RunError after `seconds`, or where rank 0 has gone. Under
    torchrun all but other sizes are Interrupted: machines of a cluster come and go.
    """
    wait = _Wait(meeting, rank, size, seconds)
    store = wait.listen() if rank == 0 and not meeting.shared_store else wait.connect()
    try:
        wait.gather(store)
    except dist.DistError as error:
        kind = Interrupted if meeting.shared_store else RunError
        raise kind(
            f"rank 0 at {wait.where} has gone while the ranks waited for one another, and its own log says why "
            f"({_first(error)})"
        ) from None
    store.set_timeout(timedelta(seconds=seconds))
    return dist.PrefixStore(f"{wait.prefix}/world", store)


class _Wait:
    """One rank's waiting for the others."""

    def __init__(self, meeting: Meeting, rank: int, size: int, seconds: float) -> None:
        self.meeting, self.rank, self.size, self.seconds = meeting, rank, size, seconds
        self.began = time.monotonic()
        self._next_line = FIRST_LINE
        self._strangers: dict[int, float] = {}  # port of something that is no store -> when to look again
        self.prefix = f"latentmill/{meeting.name}"
        self.where = f"{meeting.host}:{' or '.join(map(str, meeting.ports))}"

    def listen(self) -> dist.TCPStore:
        """Rank 0's store, on the first port that is free."""
        for port in self.meeting.ports:
            try:
                listener = _listener(self.meeting.host, port)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                reason = (error.strerror or str(error)).partition(" (while")[0]
                raise RunError(f"rank 0 cannot listen at {self.meeting.host}:{port}: {reason}") from None
            self.where = f"{self.meeting.host}:{port}"
            store = self._store(port, listener)
            if store is None:
                raise RunError(
                    f"rank 0 does not reach itself at {self.where}: MASTER_ADDR must name the machine of rank 0, and "
                    f"this is {socket.gethostname()}"
                )
            return store
        raise Interrupted(
            f"rank 0 cannot listen at {self.where}, which another process uses: end that, or give another MASTER_PORT; "
            "the same command then goes on"
        )

    def connect(self) -> dist.TCPStore:
        """The store of rank 0, which may start later than this rank."""
        while True:
            reasons = []
            for port in self.meeting.ports:
                reason = "something else listens there"
                if time.monotonic() < self._strangers.get(port, 0.0):
                    reasons.append(reason)
                    continue
                reason = _unreachable(self.meeting.host, port)
                if not reason:
                    store = self._store(port)
                    if store is not None and (len(self.meeting.ports) == 1 or self._is_ours(store)):
                        self.where = f"{self.meeting.host}:{port}"
                        return store
                    if store is None:  # C++ has said much about it
                        self._strangers[port] = time.monotonic() + LINES
                    reason = "something else listens there" if store is None else "others meet there"
                reasons.append(reason)
            self._say(["0"], f" ({'; '.join(dict.fromkeys(reasons))})")
            time.sleep(LOOK_SECONDS)

    def gather(self, store: dist.Store) -> None:
        """Register this rank, and wait until all have done so. Raises dist.DistError where the store is gone."""
        size = _put_first(store, f"{self.prefix}/size", str(self.size))
        if size != str(self.size):
            raise ConfigError(f"WORLD_SIZE={self.size}, but another rank at {self.where} has WORLD_SIZE={size}")
        own = f"process {os.getpid()} on {socket.gethostname()}"
        ticket = f"{own}\n{secrets.token_hex(8)}"  # a container may have the name and the number of its predecessor
        first = _put_first(store, self._key(self.rank), ticket)
        if first != ticket:
            other = first.partition("\n")[0]
            what = f"RANK={self.rank} is both {own} and {other}"
            if self.meeting.shared_store:
                self._outlast(store, other)
                raise Interrupted(f"{what}, still there after {self.seconds:.0f} s: the same command tries again")
            raise ConfigError(f"{what}: each process needs a rank of its own")
        store.add(f"{self.prefix}/there", 1)
        pause = 0.01
        while (missing := self.size - store.add(f"{self.prefix}/there", 0)) > 0:
            if self._is_due():
                ranks = [str(rank) for rank in range(self.size) if not store.check([self._key(rank)])]
                if ranks:
                    self._say(ranks[: max(missing, 1)], "")
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS)

    def _outlast(self, store: dist.Store, other: str) -> None:
        """Wait while torchrun's store is that of an earlier start, which other machines have not yet left: this one has
        come back sooner. Raises dist.DistError once they have, and returns where they do not."""
        log.info(f"rank {self.rank} has already been {other} for {self.where}: waiting for the ranks there to end")
        while time.monotonic() < self.began + self.seconds:
            store.check([self._key(self.rank)])
            time.sleep(LOOK_SECONDS)

    def _key(self, rank: int) -> str:
        return f"{self.prefix}/rank/{rank}"

    def _is_ours(self, store: dist.Store) -> bool:
        """Whether a store is that of this world's rank 0, and not of another job's that has met a busy port too."""
        with suppress(dist.DistError):
            return store.check([self._key(0)])
        return False

    def _store(self, port: int, listener: socket.socket | None = None) -> dist.TCPStore | None:
        """A store at this port; None where it does not answer as one. listener: rank 0's."""
        limit = timedelta(seconds=ANSWER_SECONDS)
        host, size = self.meeting.host, self.size

        def make() -> dist.TCPStore:
            if listener is None:
                return dist.TCPStore(host, port, size, False, limit, wait_for_workers=False)
            descriptor = listener.detach()
            return dist.TCPStore(host, port, size, True, limit, wait_for_workers=False, master_listen_fd=descriptor)

        return _in_time(make, ANSWER_SECONDS + 1)

    def _is_due(self) -> bool:
        """Whether something is to be said."""
        return time.monotonic() - self.began >= min(self._next_line, self.seconds)

    def _say(self, missing: Sequence[str], reason: str) -> None:
        """Say who is missing where that is due. Raises RunError after the limit; under torchrun Interrupted."""
        if not self._is_due():
            return
        waited = time.monotonic() - self.began
        names = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        noun = "rank" if len(missing) == 1 else "ranks"
        if waited >= self.seconds:
            kind = Interrupted if self.meeting.shared_store else RunError
            raise kind(
                f"{noun} {names} of {self.size} did not come to {self.where} within {self.seconds:.0f} s{reason}: were "
                "they started, and can they reach that host? RANK and WORLD_SIZE of an earlier launch may be left over "
                "in this shell, or srun --pty has started several tasks"
            )
        who = f"{len(missing)} of {self.size} ranks at {self.where}"
        log.info(f"waiting for {who} for {waited:.0f} s; missing: {noun} {names}{reason}")
        self._next_line = LINES * (waited // LINES + 1)


def _put_first(store: dist.Store, key: str, value: str) -> str:
    """The value under a key, which is `value` where this process was the first to put one there."""
    return bytes(store.compare_set(key, "", value)).decode(errors="replace")


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket: of this machine alone where rank 0 is met at a loopback address. Raises OSError."""
    if host in LOOPBACK:
        family = socket.AF_INET6 if host == "::1" else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _unreachable(host: str, port: int) -> str:
    """Why nothing answers at a port; "" where something does."""
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except socket.gaierror as error:
        return f"{host} is no known host: {error.strerror or error}"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _in_time(make: Callable[[], T], seconds: float) -> T | None:
    """The value of make(); None where it fails or takes longer. It runs in a thread, so that this one hears signals."""
    made: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):
            made.append(make())

    thread = threading.Thread(target=run, name="latentmill-meeting", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.05)
    return made[0] if made else None


def _first(error: BaseException) -> str:
    """The first sentence of an error of PyTorch's."""
    return " ".join(str(error).split()).partition(". ")[0][:200]
