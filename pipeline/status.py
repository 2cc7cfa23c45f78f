"""latentmill status RUN ...: what each run is doing, or in which state it ended.

  run      state                                             samples   images/s         last commit   restarts     loss
  runs/a   training (Slurm job 7, n1)   128,000 of 1,000,000 (12.8%)        812   120,000, 40 s ago          2   0.1534

A folder of runs, such as that of a sweep, stands for its runs. The verb reads the lease, the end of metrics.jsonl and
the names of the checkpoints, asks Slurm where it is installed, and changes nothing. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, NotFound, RunError
from pipeline.log import show
from pipeline.runs.directory import RunInfo, committed, is_finished, last_sample, load_run
from pipeline.runs.lease import Holder, claim_of, job_state, newest, this_process
from pipeline.scheduler.slurm import ENDED
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking import terminal
from pipeline.tracking.terminal import duration
from pipeline.tracking.tracker import METRICS_KEY, parse_rows

USAGE = "usage: latentmill status RUN [RUN ...]"
TAIL_BYTES = 256 * 1024
"""Length of the end of metrics.jsonl that is read."""


@dataclass(frozen=True)
class Status:
    """The state of one run.

    samples: samples seen so far. end: samples at the run's end; None before config.yaml exists. images_per_s, loss: of
    the last logged row, None before there is one. committed, committed_at: n of the newest commit and its Unix time, 0
    where unknown. restarts: how many processes have trained the run after the first.
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


def main(argv: Sequence[str]) -> int:
    """The verb. argv: run directories, and folders of them. Raises ConfigError, RunError."""
    if not argv or any(word.startswith("-") for word in argv):
        raise ConfigError(USAGE)
    show(table([status(run) for url in argv for run in runs_at(url)]), end="")
    return 0


def runs_at(url: str) -> list[str]:
    """The run at a path or URL, or otherwise the runs in that folder. Raises RunError where there is neither."""
    storage = open_storage(url)
    if _is_run(storage):
        return [url]
    parts = [info.key.rpartition(mark) for info in storage.list() for mark in ("/lease/", "/run.json")]
    names = {folder for folder, mark, _ in parts if mark}
    if not names:
        raise RunError(f"no run at {url}, nor in it: give the folder that `latentmill train run=` wrote")
    return [f"{url.rstrip('/')}/{name}" for name in sorted(names)]


def status(url: str) -> Status:
    """The state of the run at a path or URL."""
    storage = open_storage(url)
    _, holder = newest(storage)
    info = _info(url)
    rows = _last_rows(storage)
    train_rows = [row for row in rows if row["kind"] == "train"]
    commits = committed(storage)
    seen = max([row["n"] for row in train_rows[-1:]] + commits[:1] + [0])
    if holder is not None and holder.state == "held":
        seen = max(seen, holder.n)
    done = bool(commits) and info is not None and is_finished(info.config, storage)
    return Status(
        url=url,
        state="finished" if done else state_of(holder),
        samples=seen,
        end=last_sample(info.config) if info else None,
        images_per_s=train_rows[-1].get("images_per_s") if train_rows else None,
        committed=next(iter(commits), 0),
        committed_at=next((row["time"] for row in reversed(rows) if row["n"] == next(iter(commits), -1)), 0.0),
        restarts=max(0, holder.life - 1) if holder else 0,
        loss=train_rows[-1].get("loss") if train_rows else None,
    )


def state_of(holder: Holder | None) -> str:
    """A run's state in words, from the newest lease and from Slurm's state of its job."""
    if holder is None:
        return "not being trained"
    if holder.state == "failed":
        return f"failed: {holder.message}"
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


def table(runs: Sequence[Status]) -> str:
    """A line for each run, under headings."""
    headings = ["run", "state", "samples", "images/s", "last commit", "restarts", "loss"]
    return terminal.table(headings, [_cells(run) for run in runs], left=(0, 1))


def _cells(run: Status) -> list[str]:
    share = f" of {run.end:,} ({run.samples / run.end:.1%})" if run.end else ""
    age = f", {duration(time.time() - run.committed_at)} ago" if run.committed_at else ""
    return [
        run.url,
        run.state,
        f"{run.samples:,}{share}",
        "-" if run.images_per_s is None else f"{run.images_per_s:,.3g}",
        f"{run.committed:,}{age}" if run.committed else "none",
        str(run.restarts),
        "-" if run.loss is None else f"{run.loss:.4f}",
    ]


def _is_run(storage: Storage) -> bool:
    return storage.exists("config.yaml") or newest(storage)[1] is not None


def _info(url: str) -> RunInfo | None:
    """The run's configuration; None before the run has begun."""
    try:
        return load_run(url)
    except RunError:
        return None


def _last_rows(storage: Storage) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl."""
    try:
        size = storage.stat(METRICS_KEY).size
        length = min(size, TAIL_BYTES)
        return parse_rows(storage.get_range(METRICS_KEY, size - length, length))
    except NotFound:
        return []
