"""Runs the steps of a study, each in a process of its own, and notes which are finished, so that a second run goes on
where the first stopped (as pipeline/demo.py does)."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.distributed import forks
from pipeline.distributed.children import own_command
from pipeline.distributed.ranks import run_command
from pipeline.errors import LatentmillError
from pipeline.log import show
from pipeline.verbs import VERBS

STEPS = "steps.json"
UNFINISHED = "unfinished.json"  # seconds that a step had taken when it was stopped
STOPPED = (75, 130, 143)
"""Exit statuses of a step that was interrupted rather than failed."""


@dataclass(frozen=True)
class Step:
    """One command. words: a verb of latentmill, or a module of benchmarks, and its arguments. product: a path that
    exists once the command has succeeded. seconds: how long it is expected to take. optional: whether it is left out
    where less time is left."""

    heading: str
    words: tuple[str, ...]
    product: Path
    seconds: float = 0.0
    optional: bool = False

    @property
    def command(self) -> str:
        """The command as typed in a shell."""
        program = "latentmill" if self.words[0] in VERBS else "python -m"
        return " ".join([program, self.words[0], *map(_quoted, self.words[1:])])


class StepFailed(LatentmillError):
    """A step's command failed and has printed the reason. exit_code: of the command."""

    def __init__(self, command: str, status: int) -> None:
        outcome = "was stopped" if status in STOPPED else f"failed (exit status {status})"
        super().__init__(f"this step {outcome}; run the study again to go on from here: {command}")
        self.exit_code = status


@dataclass
class Runner:
    """Runs steps in order. dest: folder of the study. limit_s: time for all of them, over all runs of the study; the
    seconds of finished steps count. run: runs a command's words and returns its exit status."""

    dest: Path
    limit_s: float
    run: Callable[[tuple[str, ...]], int] = field(default_factory=lambda: execute)
    done: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0

    def __post_init__(self) -> None:
        path = self.dest / STEPS
        if path.is_file():
            self.done = json.loads(path.read_text(encoding="utf-8"))

    @property
    def spent_s(self) -> float:
        return sum(entry["seconds"] for entry in self.done[: self._number])

    def step(self, step: Step) -> bool:
        """Run a step, unless it is finished and nothing before it has run anew. Returns False for one that was left
        out. Raises StepFailed."""
        if step.optional and self.spent_s + step.seconds > self.limit_s:
            show(f"\n== {step.heading}: left out; {self.limit_s - self.spent_s:.0f} s are left of the time")
            return False
        show(f"\n== {step.heading}\n   {step.command}")
        known = self.done[self._number] if self._number < len(self.done) else None
        if known and known["command"] == step.command and step.product.exists():
            show(f"   already done, in {known['seconds']:.0f} s")
            self._number += 1
            return True
        del self.done[self._number :]  # what comes later was made of an earlier outcome of this step
        began, earlier = time.monotonic(), self.dest / UNFINISHED
        before = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
        status = self.run(step.words)
        seconds = round(time.monotonic() - began + before.get(step.command, 0.0), 2)
        if status:
            earlier.write_text(json.dumps({step.command: seconds}), encoding="utf-8")
            raise StepFailed(step.command, status)
        earlier.unlink(missing_ok=True)
        self.done.append({"heading": step.heading, "command": step.command, "seconds": seconds})
        self._number += 1
        path = self.dest / STEPS
        whole = path.with_suffix(".new")
        whole.write_text(json.dumps(self.done, indent=1), encoding="utf-8")
        whole.replace(path)
        show(f"   {seconds:.0f} s")
        return True


@dataclass
class Listing:
    """Prints the steps instead of running them, with the time that each is expected to take."""

    spent_s: float = 0.0

    def step(self, step: Step) -> bool:
        self.spent_s += step.seconds
        show(f"\n# {step.heading}: about {step.seconds:.0f} s\n{step.command}")
        return True


def execute(words: tuple[str, ...]) -> int:
    """Run a command in a process of its own, and return its exit status."""
    verb, *arguments = words
    if verb in forks.HEAVY:
        return forks.run_verb(cli.main, verb, arguments)
    if verb in VERBS:
        return run_command(own_command(VERBS[verb][0], *arguments))
    return run_command([sys.executable, "-m", verb, *arguments])  # of the checkout: benchmarks is not installed


def _quoted(argument: str) -> str:
    """An argument as typed in a shell: key='some text'."""
    key, equals, value = argument.partition("=")
    return f"{key}={shlex.quote(value)}" if equals else shlex.quote(argument)
