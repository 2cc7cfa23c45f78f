"""What a measurement with a time limit has found so far, and what it had no time for."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.errors import LatentmillError


@dataclass
class Journal:
    """seconds: the time limit, from `began` on. doing: what is being done now. right: whether all checks have held.
    sections: headings with their lines, in the order in which they are to be read. tables: the head and the rows of a
    section's table. left_out: what was not done, and why."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)
    doing: str = "start"
    right: bool = True
    sections: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, tuple[Sequence[str], list[Sequence[str]]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def note(self, section: str, *lines: str) -> None:
        """Keep lines of a section, and say them."""
        self.sections.setdefault(section, []).extend(lines)
        for line in lines:
            say(line)

    def row(self, section: str, head: Sequence[str], cells: Sequence[str]) -> None:
        """Keep a row of a section's table, and say it."""
        self.sections.setdefault(section, [])
        self.tables.setdefault(section, (head, []))[1].append(cells)
        say(" | ".join(cells))

    def check(self, section: str, sentence: str, holds: bool, otherwise: str = "") -> None:
        """Keep whether something holds, and what is the case otherwise."""
        self.right = self.right and holds
        answer = "yes" if holds else f"NO ({otherwise})" if otherwise else "NO"
        self.note(section, f"- {sentence}: {answer}")

    def attempt(self, label: str, needed: float, work: Callable[[], None]) -> None:
        """Do some work if the time allows. A failure is kept, and what follows is done all the same. needed: seconds
        that it is expected to take; 0 = it is done even where the time is just over."""
        if needed and self.seconds_left < needed:
            self.left_out.append(f"{label}: {max(0.0, self.seconds_left):.0f} s were left")
            say(f"left out: {self.left_out[-1]}")
            return
        self.doing = label
        say(f"[{time.perf_counter() - self.began:.0f} s] {label}")
        try:
            work()
        except Exception as error:  # on a machine that nobody has seen, and the other parts are still useful
            if not isinstance(error, LatentmillError):
                traceback.print_exc()
            self.right = False
            reason = str(error).strip().splitlines()
            self.left_out.append(f"{label}: failed ({type(error).__name__}: {reason[0][:300] if reason else ''})")
            say(f"left out: {self.left_out[-1]}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
