"""Commands of a page with what they print, and what becomes of them when they are run.

Of a block that a test runs (made/page_blocks.py), the lines behind the first:

    latentmill VERB KEY=VALUE ...       a command; a line that ends in \\ goes on in the next
    # kill -TERM PID                    the command is sent SIGTERM while it runs
    # exit status: 75                   how it ends; 0 where nothing is said
    # ...                               lines that it prints are left out here
    # anything else                     what it prints

Lines may be broken anywhere on a page. Hashes, durations, rates and numbers with a fraction differ between machines
and are not compared; every other word and number is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from made.page_blocks import blocks

LEFT_OUT = "..."
VARYING = "|".join(
    (
        r"\b[0-9a-f]{12,64}\b",  # before numbers: one may begin like 814e1
        r"\d+:\d\d(?::\d\d)?",  # took 0:04
        r"(?<=differ by )\S+|(?<=again within )\S+",
        r"[+-]?\d+(?:\.\d+)?e[+-]?\d+",
        r"[+-]?\d[\d,]*\.\d+",
        r"\d[\d,]*(?=/s| s\b)",
        r"(?<=\+- )\S+",
    )
)


@dataclass
class Step:
    """One command of a page. words: without `latentmill`, quotes taken off and patterns of paths not yet expanded.
    printed: the stretches of output that the page shows, in order. stopped: whether it is sent SIGTERM."""

    words: list[str]
    printed: list[str] = field(default_factory=lambda: [""])
    status: int = 0
    stopped: bool = False

    @property
    def command(self) -> str:
        return f"latentmill {shlex.join(self.words)}"

    def expanded(self) -> list[str]:
        """The words as a shell gives them, in the current folder."""
        return [path for word in self.words for path in (sorted(glob(word)) or [word])]


def steps_of(page: Path, test: str) -> dict[str, list[Step]]:
    """The commands of the blocks that `test` (a path in the repository) runs, by the heading that they stand under."""
    found: dict[str, list[Step]] = {}
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        if block.run_by == test:
            above = (line.lstrip("# ") for line in reversed(lines[: block.line - 1]) if line.startswith("#"))
            found.setdefault(next(above), []).extend(_steps(block.lines[1:]))
    return found


def _steps(lines: Sequence[str]) -> list[Step]:
    """The commands in the lines of a block."""
    steps: list[Step] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            _take(steps[-1], line.lstrip("#").strip())
        else:
            command, *words = shlex.split(line)
            assert command == "latentmill", line
            steps.append(Step(words))
    return steps


def _take(step: Step, text: str) -> None:
    """Take up what a line of a page says of its command."""
    if text.startswith("kill -TERM PID"):
        step.stopped = True
    elif text.startswith("exit status: "):
        step.status = int(text.removeprefix("exit status: "))
    elif text == LEFT_OUT:
        step.printed.append("")
    else:
        step.printed[-1] += f"{text}\n"


def comparable(text: str) -> str:
    """The text without what differs from machine to machine, in one line."""
    return " ".join(re.sub(VARYING, "~", text).split())


def missing(step: Step, said: str) -> str:
    """The first stretch that the page shows and the command did not print there; "" where all are."""
    rest = comparable(said)
    for stretch in map(comparable, step.printed):
        _, found, rest = rest.partition(stretch) if stretch else ("", "found", rest)
        if not found:
            return stretch
    return ""
