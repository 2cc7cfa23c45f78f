"""latentmill status RUN ...: what each run is doing, or in which state it ended.

  run      state                                             samples   images/s         last commit   restarts     loss
  runs/a   training (Slurm job 7, n1)   128,000 of 1,000,000 (12.8%)        812   120,000, 40 s ago          2   0.1534

A folder of runs, such as that of a sweep, stands for its runs. With --watch the lines are drawn anew every few seconds,
in place on a terminal, until every run is finished (exit status 0) or has failed (1). The verb reads the lease, the end
of metrics.jsonl and the names of the checkpoints, asks Slurm where it is installed, and changes nothing. Imports no
torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.config import RunConfig
from pipeline.errors import ConfigError, LatentmillError, NotFound, RunError
from pipeline.log import redraws, show
from pipeline.parsing.text import one_line
from pipeline.runs.directory import committed, is_finished, last_sample
from pipeline.runs.lease import Holder, claim_of, job_state, newest, newest_number, this_process
from pipeline.runs.names import AVERAGES, CHECKPOINTS, CONFIG, EVALUATIONS, EVENTS, FACTS, LEASES, LEDGERS, lease_of
from pipeline.runs.place import is_own
from pipeline.runs.stored import Row, read_config, read_rows
from pipeline.scheduler.slurm import ENDED
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking import terminal
from pipeline.tracking.terminal import Redrawn, duration

T = TypeVar("T")
USAGE = "usage: latentmill status RUN [RUN ...] [--watch [SECONDS]]"
WATCH = "--watch"
WATCH_SECONDS = 5.0
"""Time between two looks, where --watch names none."""
SHORTEST, LONGEST = 0.1, 86_400.0
"""Bounds on it."""
NARROWEST = 20
"""Characters of a run's state and name that are shown on a narrow terminal, too."""
WIDEST = 400
"""Most characters of a run's state and name that are shown."""
RUN_FOLDERS = tuple(name.rstrip("/") for name in (CHECKPOINTS, EVALUATIONS, LEDGERS, EVENTS, AVERAGES))
"""Folders of a run in which no other runs are looked for."""
TAIL_BYTES = 256 * 1024
"""Length of the end of metrics.jsonl that is read."""


@dataclass(frozen=True)
class Status:
    """The state of one run.

    samples: samples seen so far. end: samples at the run's end; None before config.yaml exists. images_per_s, loss: of
    the last logged row, None before there is one. committed, committed_at: n of the newest commit and its Unix time, 0
    where unknown. restarts: how many processes have trained the run after the first. problem: what could not be read.
    outcome: finished or failed; "" for a run that may go on.
    """

    url: str
    state: str
    samples: int
    end: int | None
    images_per_s: float | None
    committed: int
    committed_at: float
    restarts: int
    loss: float | None
    problem: str = ""
    outcome: str = ""


def main(argv: Sequence[str]) -> int:
    """The verb. argv: run directories, and folders of them. Returns 1 where no run could be read whole, else 0; with
    --watch what `watch` returns. Raises ConfigError for no arguments, RunError where one names no run."""
    urls, seconds = _asked(argv)
    if seconds:
        return watch(urls, seconds)
    runs = [run for url in urls for run in _runs(url, alone=len(urls) == 1)]
    show(table(runs), end="")
    return int(all(run.problem for run in runs))


def _asked(argv: Sequence[str]) -> tuple[list[str], float]:
    """The run directories, and the seconds of --watch; 0 without it."""
    urls, seconds, words = [], 0.0, list(argv)
    while words:
        name, equals, value = (word := words.pop(0)).partition("=")
        if name == WATCH:
            if not equals and words and _number(words[0]) is not None:
                value = words.pop(0)
            found = _number(value) if value or equals else WATCH_SECONDS
            if found is None or not SHORTEST <= found <= LONGEST:
                raise ConfigError(f"{WATCH} {value}: seconds from {SHORTEST:g} to {LONGEST:,.0f} are wanted. {USAGE}")
            seconds = found
        elif word.startswith("-"):
            raise ConfigError(USAGE)
        else:
            urls.append(word)
    if not urls:
        raise ConfigError(USAGE)
    return urls, seconds


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def watch(urls: Sequence[str], seconds: float) -> int:
    """Show the states every so many seconds until every run is finished (returns 0) or has failed (1), or until Ctrl-C
    (0). Elsewhere than on a terminal, a line for each run whose state is another than before. A run that is finished is
    read once. Raises RunError where the only URL names no run at first."""
    screen = Redrawn(sys.stdout) if redraws(sys.stdout) else None
    told: dict[str, Status] = {}
    alone = len(urls) == 1
    try:
        while True:
            runs = [run for url in urls for run in _runs(url, alone, told)]
            if screen:
                when = f"{time.strftime('%H:%M:%S')}, every {seconds:g} s; Ctrl-C ends"
                screen.draw(f"{when}\n{_fitting(runs, screen.size()[0])}")
            elif changed := [run for run in runs if told.get(run.url) != run]:
                lines = table(changed).splitlines(keepends=True)
                show("".join(lines[1:] if told else lines), end="")
            told, alone = {run.url: run for run in runs}, False
            if all(run.outcome for run in runs):
                return int(any(run.outcome == "failed" for run in runs))
            time.sleep(seconds)
    except KeyboardInterrupt:
        return 0


def _fitting(runs: Sequence[Status], columns: int) -> str:
    """The table with states, and then with names of runs, as short as the columns want it."""
    lengths = [max(len(cells[column]) for cells in map(_cells, runs)) for column in (1, 0)]
    most = [WIDEST, WIDEST]
    for place, length in enumerate(lengths):
        over = max(map(len, table(runs, *most).splitlines())) - columns
        if over > 0:
            most[place] = max(NARROWEST, min(length, most[place]) - over)
    return table(runs, *most)


def runs_at(url: str) -> list[str]:
    """The run at a path or URL, or otherwise the runs in that folder. Raises RunError where there is neither."""
    storage = open_storage(url)
    if is_run(storage):
        return [url]
    config = storage.local_path(CONFIG)
    names = _run_folders(config.parent) if config else {_run_of(info.key) for info in storage.list()}
    if not any(names):
        raise RunError(f"no run at {url}, nor in it: give the folder that `latentmill train run=` wrote")
    return [f"{url.rstrip('/')}/{name}" for name in sorted(names) if name]


def _run_folders(root: Path) -> set[str]:
    """The folders of runs under a folder on a disk, and those that may not be looked into: what is wrong with them is
    then told as a run's."""
    names, closed = set[str](), list[str]()
    for parent, folders, files in os.walk(root, onerror=lambda error: closed.append(str(error.filename))):
        own = RUN_FOLDERS if FACTS in files or LEASES.rstrip("/") in folders else ()
        folders[:] = [name for name in folders if name not in own and not name.startswith(".")]
        keys = (Path(parent, name).relative_to(root).as_posix() for name in files)
        names |= {name for key in keys if (name := _run_of(key))}
    return names | {Path(folder).relative_to(root).as_posix() for folder in closed if Path(folder) != root}


def _runs(url: str, alone: bool, told: Mapping[str, Status] | None = None) -> list[Status]:
    """The states of the runs at a path or URL. Where there is none, or nothing can be listed: a state that says so, or
    alone, the error. told: states of before, of which those of finished runs are kept."""
    try:
        finished = {name: run for name, run in (told or {}).items() if run.outcome == "finished"}
        return [finished.get(run) or status(run) for run in runs_at(url)]
    except LatentmillError as error:
        if alone:
            raise
        problem = one_line(str(error))
        return [Status(url, problem, 0, None, None, 0, 0.0, 0, None, problem)]


def is_run(storage: Storage) -> bool:
    """Whether a run is there, whole or damaged."""
    if storage.exists(FACTS) or newest_number(storage):
        return True
    return bool(is_own(storage, CONFIG))


def _run_of(key: str) -> str:
    """The folder of the run that a file belongs to, by the names of run.json and of leases; "" for other files, and for
    those in hidden folders."""
    folder, _, name = key.rpartition("/")
    above, _, last = folder.rpartition("/")
    found = folder if name == FACTS else above if lease_of(f"{last}/{name}") is not None else ""
    return "" if any(part.startswith(".") for part in found.split("/")) else found


def status(url: str) -> Status:
    """The state of the run at a path or URL. What of it cannot be read is told as its `problem`."""
    storage = open_storage(url)
    problems: list[str] = []
    holder = _tried(problems, lambda: newest(storage)[1], None)
    config = _tried(problems, lambda: _config(storage), None)
    rows = _tried(problems, lambda: read_rows(storage, TAIL_BYTES), list[Row]())
    commits = _tried(problems, lambda: committed(storage), list[int]())
    train_rows = [row for row in rows if row.kind == "train"]
    seen = max([row.n for row in train_rows[-1:]] + commits[:1] + [0])
    if holder is not None and holder.state == "held":
        seen = max(seen, holder.n)
    done = bool(commits) and config is not None and _tried(problems, lambda: is_finished(config, storage), False)
    problem = "; ".join(dict.fromkeys(problems))
    state = "finished" if done else state_of(holder)
    failed = not done and holder is not None and holder.state == "failed"
    return Status(
        url=url,
        state=f"{f'{state}; ' if holder or done else ''}{problem}" if problem else state,
        samples=seen,
        end=last_sample(config) if config else None,
        images_per_s=train_rows[-1].images_per_s if train_rows else None,
        committed=next(iter(commits), 0),
        committed_at=next((row.time for row in reversed(rows) if row.n == next(iter(commits), -1)), 0.0),
        restarts=max(0, holder.life - 1) if holder else 0,
        loss=train_rows[-1].loss if train_rows else None,
        problem=problem,
        outcome=state if state == "finished" else "failed" if failed else "",
    )


def _tried(problems: list[str], action: Callable[[], T], otherwise: T) -> T:
    """The value of `action()`; `otherwise` where it fails, and a line about that among the problems."""
    try:
        return action()
    except LatentmillError as error:
        problems.append(one_line(str(error)))
        return otherwise


def state_of(holder: Holder | None) -> str:
    """A run's state in words, from the newest lease and from Slurm's state of its job."""
    if holder is None:
        return "not being trained"
    if holder.state == "failed":
        return f"failed: {one_line(holder.message)}"
    if holder.state == "finished":
        return "finished"
    slurm = job_state(holder) if holder.job else None
    where = ", ".join(filter(None, [f"Slurm job {holder.job}" if holder.job else "", holder.host]))
    if holder.state == "held":
        if claim_of(holder, this_process({})):
            silent = time.time() - holder.beat
            return f"training ({where}{f'; silent for {duration(silent)}' if silent > 120 else ''})"
        return f"dead ({where}{f': {slurm}' if slurm else ''})"
    word = "waiting" if holder.state == "queued" else "stopped, to be continued"
    if not holder.job:
        return "stopped; the same command goes on"
    if slurm is None:
        return f"{word} (Slurm job {holder.job}, which cannot be asked for here)"
    if slurm in ("", *ENDED):
        return f"{'never begun' if holder.state == 'queued' else 'stopped'} (Slurm job {holder.job}: {slurm or 'gone'})"
    return f"{word} (Slurm job {holder.job}: {slurm})"


def table(runs: Sequence[Status], state: int = WIDEST, name: int = WIDEST) -> str:
    """A line for each run, under headings. state, name: most characters of a run's state, and of its name, of which the
    end is kept."""
    headings = ["run", "state", "samples", "images/s", "last commit", "restarts", "loss"]
    rows = [_cells(run) for run in runs]
    return terminal.table(headings, [[_ending(of, name), _cut(is_, state), *rest] for of, is_, *rest in rows], (0, 1))


def _cells(run: Status) -> list[str]:
    share = f" of {run.end:,} ({run.samples / run.end:.1%})" if run.end else ""
    age = f", {duration(time.time() - run.committed_at)} ago" if run.committed_at else ""
    return [
        one_line(run.url),
        one_line(run.state),
        f"{run.samples:,}{share}",
        "-" if run.images_per_s is None else f"{run.images_per_s:,.3g}",
        f"{run.committed:,}{age}" if run.committed else "none",
        str(run.restarts),
        "-" if run.loss is None else f"{run.loss:.4f}" if abs(run.loss) < 1e6 else f"{run.loss:.3g}",
    ]


def _cut(text: str, most: int) -> str:
    """The beginning of a text for a column that is to leave room for the others."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _ending(text: str, most: int) -> str:
    """The end of a text, as of paths, which are alike at their beginning."""
    return text if len(text) <= most else f"...{text[3 - most :]}"


def _config(storage: Storage) -> RunConfig | None:
    """The run's configuration, with keys of later versions passed over; None before the run has begun."""
    try:
        return read_config(storage, forward=True)
    except NotFound:
        return None
