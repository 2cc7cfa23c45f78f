"""latentmill status RUN ...: what each run is doing, or how it was left.

    run      state                        samples          images/s  last commit       restarts  loss
    runs/a   training (Slurm job 7, n1)   128,000 (12.8%)       812  120,000, 40 s ago        2  0.1534

A folder of runs, such as a sweep's, is as good as its runs. It reads the lease, the end of metrics.jsonl and the names
of the checkpoints, asks Slurm where there is one, and changes nothing. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, NotFound, RunError
from pipeline.runs.directory import RunInfo, committed, is_finished, last_sample, load_run
from pipeline.runs.lease import Holder, claim_of, job_state, newest, this_process
from pipeline.scheduler import slurm as sbatch
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import METRICS_KEY, parse_rows

USAGE = "usage: latentmill status RUN [RUN ...]"
TAIL_BYTES = 256 * 1024
"""Of metrics.jsonl, of which the end is read."""


@dataclass(frozen=True)
class Status:
    """What is known of one run. samples: seen by now, end: at its last; None where config.yaml is not there yet.

    committed: n of the newest commit and its Unix time, 0 where they are not known. restarts: processes that have held
    the run, without the first.
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
    found = [status(run) for url in argv for run in runs_at(url)]
    print(table(found))
    return 0


def runs_at(url: str) -> list[str]:
    """The run at a path or URL, or else the runs in that folder. Raises RunError where there is neither."""
    storage = open_storage(url)
    if _is_run(storage):
        return [url]
    ends = [info.key.rpartition(mark) for info in storage.list() for mark in ("/lease/", "/run.json")]
    names = {before for before, mark, _ in ends if mark}
    if not names:
        raise RunError(f"no run at {url}, nor in it: give the folder that `latentmill train run=` wrote")
    return [f"{url.rstrip('/')}/{name}" for name in sorted(names)]


def status(url: str) -> Status:
    """What is known of the run at a path or URL."""
    storage = open_storage(url)
    _, holder = newest(storage)
    info = _info(url)
    rows = _last_rows(storage)
    trained = [row for row in rows if row["kind"] == "train"]
    commits = committed(storage)
    seen = max([row["n"] for row in trained[-1:]] + commits[:1] + [0])
    if holder is not None and holder.state == "held":
        seen = max(seen, holder.n)
    done = bool(commits) and info is not None and is_finished(info.config, storage)
    return Status(
        url=url,
        state="finished" if done else state_of(holder),
        samples=seen,
        end=last_sample(info.config) if info else None,
        images_per_s=trained[-1].get("images_per_s") if trained else None,
        committed=next(iter(commits), 0),
        committed_at=next((row["time"] for row in reversed(rows) if row["n"] == next(iter(commits), -1)), 0.0),
        restarts=max(0, holder.life - 1) if holder else 0,
        loss=trained[-1].get("loss") if trained else None,
    )


def state_of(holder: Holder | None) -> str:
    """A run's state in words, from the newest lease and from what Slurm says of its job."""
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
    what = "waiting" if holder.state == "queued" else "stopped, to be gone on with"
    if not holder.job:
        return "stopped; the same command goes on"
    if slurm is None:
        return f"{what} (Slurm job {holder.job}, which cannot be asked for here)"
    if slurm in ("", *sbatch.ENDED):
        return f"{'never begun' if holder.state == 'queued' else 'stopped'} (Slurm job {holder.job}: {slurm or 'gone'})"
    return f"{what} (Slurm job {holder.job}: {slurm})"


def table(found: Sequence[Status]) -> str:
    """A line for each run, under headings."""
    headings = ["run", "state", "samples", "images/s", "last commit", "restarts", "loss"]
    rows = [headings, *([str(cell) for cell in _cells(one)] for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    left = ("run", "state")
    lines = [
        "  ".join(
            cell.ljust(width) if heading in left else cell.rjust(width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _cells(one: Status) -> list[Any]:
    part = f" of {one.end:,} ({one.samples / one.end:.1%})" if one.end else ""
    age = f", {duration(time.time() - one.committed_at)} ago" if one.committed_at else ""
    return [
        one.url,
        one.state,
        f"{one.samples:,}{part}",
        "-" if one.images_per_s is None else f"{one.images_per_s:,.3g}",
        f"{one.committed:,}{age}" if one.committed else "none",
        one.restarts,
        "-" if one.loss is None else f"{one.loss:.4f}",
    ]


def duration(seconds: float) -> str:
    """40 s, 12 min, 3.5 h, 2.1 d."""
    for unit, size in (("d", 86400), ("h", 3600)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(0.0, seconds):.0f} s"


def _is_run(storage: Storage) -> bool:
    return storage.exists("config.yaml") or newest(storage)[1] is not None


def _info(url: str) -> RunInfo | None:
    """The run's configuration; None before it has begun."""
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
