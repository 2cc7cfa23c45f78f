"""Runs a launcher that keeps its ranks' exit statuses to itself, passes signals on to the ranks, and ends as they do.

    python -m pipeline.distributed.under torchrun --nproc-per-node 8 -m pipeline.train KEY=VALUE ...

torchrun and accelerate end with 1 whatever their ranks end with, do not know SIGUSR1, and kill ranks that take longer
than 30 s over a commit. deepspeed's launcher dies of the signal itself, and its ranks run on. What ranks say of
themselves is in endings.py. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from pipeline.distributed.children import own_environment
from pipeline.distributed.endings import FOLDER, UNEXPECTED, endings
from pipeline.distributed.exits import guarded, leave
from pipeline.distributed.rank import die_with_parent
from pipeline.distributed.signals import HINTS, INTERRUPTED_BY_KEYBOARD, STOP, handled
from pipeline.errors import ConfigError, Interrupted, OverrideError
from pipeline.log import log, show

POLL_SECONDS = 0.1
LINGER_SECONDS = 2.0
"""Time in which a launcher without ranks must end by itself once it was asked to stop; then it gets SIGTERM."""
COMMIT_SECONDS = 300
"""Longest time that ranks which were asked to stop may take for a commit, before what is above them kills them."""
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Variable with the seconds that torchrun and accelerate give their ranks between SIGTERM and SIGKILL: 30 by itself."""
USAGE = "usage: python -m pipeline.distributed.under LAUNCHER WORD ... -m pipeline.train KEY=VALUE ..."


def main(arguments: Sequence[str]) -> int:
    """Run a launcher. Returns its ranks' exit status: that of the first rank that a signal killed or that failed, else
    75 where a rank was stopped, else 0.

    A rank that ends without a word was killed by a signal: the one that it got from here, or else SIGKILL (137). What
    ends with a traceback, and a launcher that fails before all its ranks have begun, is 70. A second Ctrl-C kills all:
    130.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        show(f"{USAGE}\n\nRuns a launcher, passes signals on to its ranks, and ends with the ranks' exit status.")
        return 0 if arguments else OverrideError.exit_code
    return guarded("under", lambda: run(arguments))


def run(command: Sequence[str]) -> int:
    """As main. Raises ConfigError where there is no such launcher."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number  # its terminal has gone
        received.append(signal.SIGKILL if number == signal.SIGINT and number in received else number)

    hears = STOP if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*STOP, signal.SIGHUP)  # nohup ignores it
    launcher: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory(prefix="latentmill-", ignore_cleanup_errors=True) as folder, handled(hears, note):
        ranks = Ranks(Path(folder))
        environment = {SHUTDOWN: str(COMMIT_SECONDS)} | own_environment() | {FOLDER: folder}
        try:
            launcher = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=environment,
                process_group=0,
                preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),  # noqa: PLW1509  (here is one thread)
            )
            _wait(launcher, ranks, received)
        finally:
            ranks.signal(signal.SIGKILL)
            if launcher is not None and launcher.poll() is None:
                _kill(launcher)
        return _status(launcher.returncode, ranks, received)


def program(name: str) -> str:
    """The path of a launcher: beside this interpreter, where a virtual environment has its own, or else on PATH.
    Raises ConfigError."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=beside)
    if found is None:
        raise ConfigError(f"{name[:80]}: no such program, neither beside {sys.executable} nor on PATH")
    return found


@dataclass
class Rank:
    """A process that has begun. number: "" where it is the only one. sent: signals that it got from here. status: how
    it has ended; None while it runs."""

    number: str
    sent: list[int] = field(default_factory=list)
    status: int | None = None


class Ranks:
    """The ranks that have begun under a launcher, by what they say in a folder. ended: processes in the order in which
    they were seen to have ended. wanted: the number of ranks on this machine; 0 where no rank has said it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun: dict[int, Rank] = {}
        self.ended: list[int] = []
        self.wanted = 0

    def look(self) -> None:
        """See which have begun, and which have ended: first those that were killed, for their peers fail with them."""
        gone = {process for process in self.running() if not is_running(process)}
        said = {ending.process: ending for ending in endings(self.folder)}  # read later: what is gone has said all
        for process, ending in said.items():
            self.begun.setdefault(process, Rank(ending.rank))
            self.wanted = max(self.wanted, ending.ranks)
        silent, speaking = list[int](), list[int]()
        for process in self.running():
            rank = self.begun[process]
            rank.status = said[process].status
            if rank.status is not None:
                speaking.append(process)
            elif process in gone:
                rank.status = 128 + (rank.sent or [signal.SIGKILL])[-1]
                silent.append(process)
        self.ended += silent + speaking

    def running(self) -> list[int]:
        """Processes that have said nothing of an end."""
        return [process for process, rank in self.begun.items() if rank.status is None]

    def lacking(self) -> bool:
        """Whether some ranks have begun, and others never have."""
        return len({rank.number for rank in self.begun.values()}) < self.wanted

    def signal(self, number: int) -> None:
        """Send a signal to each rank that runs and has not had it."""
        for process in self.running():
            rank = self.begun[process]
            if number not in rank.sent and is_running(process):
                rank.sent.append(number)
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    pass

    def statuses(self) -> list[int]:
        """How the ranks have ended, in that order. Of a rank that its launcher has started again, the last life."""
        last = {rank.number or str(process): process for process, rank in self.begun.items()}
        return [self.begun[process].status or 0 for process in self.ended if process in last.values()]


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie, which has ended and waits for its parent to notice."""
    try:
        state = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state not in (b"Z", b"X")


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and all that it has started: also ranks that have not begun, in sessions of their own."""
    os.killpg(launcher.pid, signal.SIGSTOP)  # it starts nothing more
    below = list[psutil.Process]()
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(launcher.pid).children(recursive=True)
    os.killpg(launcher.pid, signal.SIGKILL)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()


def _wait(launcher: subprocess.Popen[bytes], ranks: Ranks, received: list[int]) -> None:
    """Wait for the launcher and for all ranks. received: signals to this process so far."""
    idle_since, orphaned_since = None, None  # without ranks after a signal; without a launcher
    told = False
    while True:
        ended = launcher.poll() is not None  # before the look: what began before the launcher's end has said so
        ranks.look()
        now = time.monotonic()
        for number in list(received):
            ranks.signal(number)
        if signal.SIGKILL in received:
            return
        if ended:
            if not ranks.running():
                return
            ranks.signal(signal.SIGTERM)  # nobody would end them any more
            orphaned_since = orphaned_since or now
            if now > orphaned_since + COMMIT_SECONDS:
                return
        elif received and not ranks.running():
            idle_since = idle_since or now
            if not told and now > idle_since + LINGER_SECONDS:
                told = True
                launcher.terminate()
        else:
            idle_since = None
        time.sleep(POLL_SECONDS)


def _status(launched: int, ranks: Ranks, received: Sequence[int]) -> int:
    """The exit status. launched: the launcher's, negative for a signal that killed it."""
    if signal.SIGKILL in received:
        log.warning("a second Ctrl-C has killed the ranks; the same command goes on from the last commit")
        return INTERRUPTED_BY_KEYBOARD
    stopped = Interrupted.exit_code
    statuses = ranks.statuses()
    for status in statuses:
        if status not in (0, stopped):
            _tell(status, ranks)
            return status
    if launched and not received and ranks.lacking():
        log.error(f"the launcher has ended with {launched}, and a rank before it had begun: the lines above say why")
        return UNEXPECTED
    if stopped in statuses or (received and launched and not statuses):
        return stopped
    if statuses:
        if launched:
            log.warning(f"all ranks of this machine have ended with 0, and their launcher with {launched}")
        return 0
    if launched in (0, OverrideError.exit_code):
        return launched
    log.error(f"the launcher has ended with {launched}, and no rank has begun: its lines above say why")
    return UNEXPECTED if launched > 0 else 128 - launched


def _tell(status: int, ranks: Ranks) -> None:
    """Say which rank was killed: it could not, and its launcher's words are many."""
    for process in ranks.ended:
        rank = ranks.begun[process]
        if rank.status == status and status > 128 and status != INTERRUPTED_BY_KEYBOARD:
            causes = " or ".join(f"{number.name}{hint}" for number, hint in HINTS.items())
            by = f"a signal, and its launcher's lines above say which ({causes})"
            if rank.sent:
                by = f"{signal.Signals(rank.sent[-1]).name}, as it was asked to stop"
            log.error(f"rank {rank.number or '0'} has ended without a word: killed by {by}")
            return


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
