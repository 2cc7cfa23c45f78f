"""Chooses which checkpoints of a run to keep when another is committed, and removes the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

from pipeline.config import FeaturesName, RunConfig
from pipeline.config.tasks.figures import Figure
from pipeline.config.tasks.found import best_of
from pipeline.errors import CheckpointCorrupt, NotFound, ParseError
from pipeline.log import log
from pipeline.parsing.values import parse_json
from pipeline.runs.checkpoint import read_commit
from pipeline.runs.directory import committed
from pipeline.runs.fragments import require_size
from pipeline.runs.names import (
    CHECKPOINTS,
    COMMIT,
    METRICS,
    SNAPSHOT,
    checkpoint_folder,
    checkpoint_of,
    evaluation_folder,
)
from pipeline.runs.stored import read_bounded
from pipeline.storage.base import Storage

METRICS_BYTES = 1 << 24
"""Largest metrics.json of an evaluation that is read."""
TOGETHER = 32
"""Files of a checkpoint that are looked at, or removed, at a time: one by one, those of thousands take minutes."""
ABANDONED_SECONDS = 3600.0
"""A half-written file that nobody has written to for this long was left by a process that was killed."""


@dataclass(frozen=True)
class Retention:
    """Rules for keeping checkpoints. keep: number of the newest ones. every: the first checkpoint at or after each
    multiple of this many samples is kept (0 = none). best: the figures of evaluations of which the first that there is
    decides which checkpoint is the best, and is kept (() = none)."""

    keep: int
    every: int = 0
    best: tuple[Figure, ...] = ()

    @classmethod
    def of(cls, config: RunConfig) -> Retention:
        """The rules that a run's configuration sets."""
        checkpoint = config.checkpoint
        return cls(checkpoint.keep, checkpoint.keep_every, best_of(config))


def retain(run: Storage, retention: Retention) -> None:
    """Remove the checkpoints that the rules do not keep, and the files of unfinished saves. What has no name of ours is
    left alone. Only one process may call this, while nothing is being saved.

    If the newest commit is damaged, or one of its files is missing or has another size, nothing is removed and a
    warning is logged. (Whoever wrote the files has just read them back.) A checkpoint's commit.json is removed before
    its files, so an interrupted removal leaves no committed checkpoint without some of its files.
    """
    checkpoints = committed(run)
    if not checkpoints:
        return
    try:
        newest = read_commit(run, checkpoints[0])
        with ThreadPoolExecutor(TOGETHER, "latentmill-retain") as pool:
            for _ in pool.map(lambda entry: require_sizes(run, newest.n, [entry]), newest.files):
                pass
    except (CheckpointCorrupt, NotFound) as error:
        log.warning(f"no checkpoint is removed, for the newest is damaged ({error})")
        return
    kept = kept_checkpoints(run, checkpoints, retention)
    newest_files = {checkpoint_folder(newest.n) + entry["name"] for entry in newest.files}
    keys_to_remove = []
    for info in run.list(CHECKPOINTS):
        n, key = checkpoint_of(info.key), info.key
        if n is None:
            continue
        weights_file = key.removesuffix(".json") + ".safetensors"
        belongs_to_newest = key in newest_files or weights_file in newest_files or key.endswith(COMMIT)
        if (n == newest.n and not belongs_to_newest) or (n not in kept and n < newest.n):
            keys_to_remove.append(key)
    for key in keys_to_remove:
        if key.endswith("/" + COMMIT):
            run.delete(key)
    with ThreadPoolExecutor(TOGETHER, "latentmill-retain") as pool:
        for _ in pool.map(run.delete, (key for key in keys_to_remove if not key.endswith("/" + COMMIT))):
            pass
    run.sweep(ABANDONED_SECONDS)


def kept_checkpoints(run: Storage, checkpoints: Sequence[int], retention: Retention) -> set[int]:
    """The n of the committed checkpoints (given newest first) that the rules keep."""
    kept = set(checkpoints[: max(retention.keep, 1)])
    if retention.every:
        first_of_period: dict[int, int] = {}
        for n in sorted(checkpoints):
            first_of_period.setdefault(n // retention.every, n)
        kept |= {n for period, n in first_of_period.items() if period}
    if retention.best:
        evaluated = {n: metrics for n in checkpoints if (metrics := _metrics(run, n)) is not None}
        for figure in retention.best:
            figures = {n: value for n in evaluated if (value := _value(evaluated[n], figure)) is not None}
            if figures:
                best = min if figure.better == "lower" else max
                kept.add(best(figures, key=lambda n: figures[n]))
                break
        # An evaluation that runs outside of training may still find one of these the best.
        kept |= {n for n in checkpoints if n not in evaluated and run.exists(f"{evaluation_folder(n)}/{SNAPSHOT}")}
    return kept


def require_sizes(run: Storage, n: int, files: Sequence[dict[str, Any]]) -> None:
    """Raises CheckpointCorrupt unless every file of the checkpoint at n exists in the size that its commit names."""
    for entry in files:
        require_size(run, checkpoint_folder(n) + entry["name"], entry["bytes"])


def _metrics(run: Storage, n: int) -> dict[str, Any] | None:
    """The figures of the evaluation at n; None for none, and for damaged ones."""
    try:
        metrics = parse_json(read_bounded(run, f"{evaluation_folder(n)}/{METRICS}", METRICS_BYTES))
    except (NotFound, ParseError):
        return None
    return metrics if isinstance(metrics, dict) else None


def _value(metrics: dict[str, Any], figure: Figure) -> float | None:
    """A figure; None for none or NaN. "fid" is the FID of whichever features the evaluation used."""
    keys = [*figure.names, *(f"{figure.name}_{features}" for features in get_args(FeaturesName))]
    values = (metrics.get(key) for key in keys)
    return next((float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)), None)
