"""How a rank tells what runs its launcher (under.py) that it has begun, and how it has ended.

torchrun and accelerate turn every exit status of their ranks into 1, so the ranks write it down: FOLDER/PID holds the
rank's number and how many its machine has, and once it has ended, its exit status. Takes no lock, so that handlers of
signals may call it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = "LATENTMILL_ENDINGS"
"""Variable with the folder. A rank takes it out of its environment: what it starts itself is no rank."""
UNEXPECTED = 70
"""Exit status (EX_SOFTWARE of sysexits.h) of what nobody raised on purpose: a rank that ended with a traceback, as it
does when its peers on other machines are gone, or a launcher that brought no rank up."""

_own: list[tuple[int, str]] = []
"""Process and file of this rank, once it has begun."""


@dataclass(frozen=True)
class Ending:
    """What one process has said. rank: its number, "" where it has none. status: None until it has ended. ranks: how
    many its machine has; 0 where that is not known."""

    process: int
    rank: str
    status: int | None
    ranks: int = 0


def begin() -> None:
    """Say that this rank has begun. To be called once its handlers are there, for signals may come from then on.
    Nothing happens where nobody wants to know."""
    folder = os.environ.pop(FOLDER, "")
    if folder:
        process = os.getpid()
        _own[:] = [(process, os.path.join(folder, str(process)))]
        rank, ranks, size = (os.environ.get(name, "").strip() for name in ("RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
        _say(f"{rank}/{ranks or size}")  # deepspeed's launcher says LOCAL_SIZE


def end(status: int) -> None:
    """Say with which exit status this rank ends. Forks of a rank say nothing."""
    begin()
    _say(str(status))


def _say(line: str) -> None:
    """Append a line to the rank's file, in one write."""
    if _own and _own[0][0] == os.getpid():
        with suppress(OSError):
            descriptor = os.open(_own[0][1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)


def endings(folder: Path) -> list[Ending]:
    """What the processes of a folder have said so far. A file without a line yet is passed over."""
    found = list[Ending]()
    for path in folder.iterdir():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        statuses = [int(line) for line in lines[1:] if line.isdecimal() and len(line) < 4]
        if lines:
            rank, _, ranks = lines[0].partition("/")
            known = int(ranks) if ranks.isdecimal() and len(ranks) < 8 else 0
            rank = rank if rank.isdecimal() else ""
            found.append(Ending(int(path.name), rank, statuses[-1] if statuses else None, known))
    return found
