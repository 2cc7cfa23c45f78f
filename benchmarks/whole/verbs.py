"""Verbs as processes of their own, several side by side, each with its output in a file."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.distributed.children import own_command, own_environment
from pipeline.errors import DataError

POLL_SECONDS = 0.02
LINES_SHOWN = 3  # of the output of a verb that has failed


@dataclass
class Begun:
    """A verb that runs. seconds: from its start to its end, once it has ended."""

    words: list[str]
    process: subprocess.Popen[bytes]
    output: Path
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    def ended(self) -> int | None:
        """Its exit status, minus the number of the signal that ended it; None while it runs."""
        status = self.process.poll()
        if status is not None and not self.seconds:
            self.seconds = time.perf_counter() - self.began
        return status

    def kill(self) -> None:
        """End it and all that it has started, by SIGKILL."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ended()

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


class Verbs:
    """Starts verbs of latentmill. folder: for their output. `with Verbs(...)`: what still runs at the end is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun: list[Begun] = []

    def begin(self, verb: str, *words: str) -> Begun:
        """Start a verb in this process's environment, in which NCCL says its version."""
        output = self._folder / f"{len(self._begun):02d}-{verb}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                own_command("pipeline.cli", verb, *words),
                env=own_environment() | {"NCCL_DEBUG": "VERSION"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self._begun.append(Begun([verb, *words], process, output))
        return self._begun[-1]

    def finish(self, *begun: Begun) -> None:
        """Wait for verbs. Raises DataError for the first that has failed, with the end of its output."""
        waiting = list(begun)
        while waiting:
            for one in list(waiting):
                if (status := one.ended()) is None:
                    continue
                waiting.remove(one)
                require(one, status)
            time.sleep(POLL_SECONDS)

    def run(self, *commands: Sequence[str]) -> list[Begun]:
        """Run verbs side by side, each given as (verb, word, ...)."""
        begun = [self.begin(verb, *words) for verb, *words in commands]
        self.finish(*begun)
        return begun

    def strike(self, begun: Begun, when: Callable[[], bool]) -> bool:
        """Kill a verb as soon as something holds. Whether it was killed, and had not ended by itself before."""
        while begun.ended() is None:
            if when():
                begun.kill()
                return begun.ended() == -signal.SIGKILL
            time.sleep(POLL_SECONDS)
        return False

    def kill(self) -> None:
        """Kill what still runs."""
        for one in self._begun:
            if one.ended() is None:
                one.kill()

    def __enter__(self) -> Verbs:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def require(begun: Begun, status: int) -> None:
    """Raise DataError for a verb that has failed."""
    if status:
        last = " / ".join(begun.said.strip().splitlines()[-LINES_SHOWN:])
        raise DataError(f"latentmill {shlex.join(begun.words)} ended with status {status}: {last}")
