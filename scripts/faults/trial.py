"""One trial: a damaged copy of a small dataset and run, one command, and how it ended."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COPIED = 1_000_000
"""Files up to this size in bytes are copied; larger ones are linked, since a change replaces a file."""
SECONDS = 5.0
"""A command that is refused may take this much of one core."""
MEGABYTES = 200
"""It may take this much memory beyond that."""
LIMIT = 60
"""Seconds after which a command is killed."""
FAILED_LINE = re.compile(r"^latentmill( \w+)?( \[rank \d+\])?: .+")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")


@dataclass(frozen=True)
class Case:
    """What is tried. words: of the command line, run in a copy of the base. change: what is done to the copy. wants:
    "refused" (status 1 or 2 and one line), "done" (status 0), or "either" of them. says: pattern that the output must
    match. check: what must hold in the folder afterwards."""

    area: str
    name: str
    words: tuple[str, ...]
    change: Callable[[Path], object] = lambda folder: None
    wants: str = "refused"
    says: str = ""
    check: Callable[[Path], bool] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    file_bytes: int = 0
    """Largest file that the command can write, in bytes, which stands for a disk that fills; 0 for no limit."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended. wrong: why that is not what it wants, or "". megabytes: peak beyond the parent's memory."""

    case: Case
    status: int
    seconds: float
    megabytes: float
    line: str
    wrong: str


def run_case(case: Case, base: Path, folder: Path) -> Outcome:
    """Run one case in a fork of this process, which has imported the product."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, copy_function=_copy, symlinks=True)
    try:
        case.change(folder)
        status, seconds, megabytes = _fork(case, folder)
        text = (folder / "stderr.txt").read_text("utf-8", "replace")
        shown = (folder / "stdout.txt").read_text("utf-8", "replace")
        lines = [line for line in text.splitlines() if FAILED_LINE.match(line)]
        line = lines[-1] if lines else ""
        wrong = _wrong(case, folder, status, seconds, megabytes, text + shown, lines)
        return Outcome(case, status, seconds, megabytes, line, wrong)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wrong(case: Case, folder: Path, status: int, seconds: float, megabytes: float, text: str, lines: list[str]) -> str:
    """Why an outcome is not what the case wants; "" if it is."""
    if status < 0:
        return f"killed by signal {-status} ({LIMIT} s are the limit)"
    if "Traceback (most recent call last)" in text:
        return f"traceback: {text.strip().splitlines()[-1][:120]}"
    if status not in (0, 1, 2):
        return f"status {status}"
    if status and len(lines) != 1 and case.words[0] != "status":  # which says it in the run's row
        return f"{len(lines)} lines of failure"
    if case.wants == "refused" and status == 0:
        return "not refused"
    if case.wants == "done" and status:
        return f"refused: {lines[-1][:120]}"
    if status and seconds > SECONDS:
        return f"took {seconds:.0f} s of one core"
    if status and megabytes > MEGABYTES:
        return f"took {megabytes:.0f} MB"
    if CONTROL.search(text):
        return "a control character reached the terminal"
    if case.says and not re.search(case.says, text):
        return f"does not say {case.says!r}: {lines[-1][:200] if lines else text[-200:]!r}"
    if case.check is not None and not case.check(folder):
        return "the folder is not what it must be afterwards"
    return ""


def _copy(source: str, destination: str) -> None:
    if os.path.getsize(source) <= COPIED:
        shutil.copy2(source, destination)
    else:
        os.link(source, destination)


def _fork(case: Case, folder: Path) -> tuple[int, float, float]:
    """(exit status or negative signal, seconds of one core, MB beyond the parent's) of the command in a child."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = _resident()
    child = os.fork()
    if child == 0:
        _become(case, folder)
    status, usage = _wait(child)
    seconds = usage.ru_utime + usage.ru_stime
    return os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024 - before


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage


def _become(case: Case, folder: Path) -> None:
    """The child: run the command line with its output in files, and end."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(case.environment)
        if case.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_bytes, case.file_bytes))
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        from pipeline import cli

        try:
            status = cli.main(list(case.words))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _resident() -> float:
    """Memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
