"""Which checkpoints of a run are kept when another is committed, and the removal of the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pipeline.config import CheckpointConfig, FeaturesName
from pipeline.errors import CheckpointCorrupt, NotFound
from pipeline.log import log
from pipeline.runs.checkpoint import read_commit
from pipeline.runs.directory import CHECKPOINTS, COMMIT, SNAPSHOT, checkpoint_folder, committed, evaluation_folder
from pipeline.storage.base import Storage

LOWER_IS_BETTER = {"fid": True, "kid": True, "cmmd": True, "clip_score": False, "attribute_accuracy": False}
ABANDONED_SECONDS = 3600.0
"""A half-written file that nobody has written to for so long is of a process that was killed."""


@dataclass(frozen=True)
class Retention:
    """keep: how many of the newest. every: samples of which the first checkpoint at or after each multiple stays (0 =
    none). best: the figure of evaluations whose best checkpoint stays ("" = none)."""

    keep: int
    every: int = 0
    best: str = ""

    @classmethod
    def of(cls, config: CheckpointConfig) -> Retention:
        """What a configuration asks for."""
        return cls(config.keep, config.keep_every, config.best)


def retain(run: Storage, retention: Retention) -> None:
    """Remove the checkpoints that are not to be kept, and what unfinished saves have left. By one process alone, when
    nothing is being saved.

    Nothing is removed unless the newest commit and the files that it names are there in their sizes (whoever wrote them
    has just read them back); else it is said on standard error. A commit goes before the files that it names, so a
    removal cut short leaves no checkpoint without some of its files.
    """
    there = committed(run)
    if not there:
        return
    try:
        commit = read_commit(run, there[0])
        require_sizes(run, commit.n, commit.files)
    except (CheckpointCorrupt, NotFound) as error:
        log.warning(f"no checkpoint is removed, for the newest is damaged ({error})")
        return
    kept = chosen(run, there, retention)
    named = {checkpoint_folder(commit.n) + entry["name"] for entry in commit.files}
    doomed = []
    for info in run.list(CHECKPOINTS):
        n = int(info.key.split("/")[1])
        stem = info.key.removesuffix(".json") + ".safetensors"
        leftover = n == commit.n and info.key not in named and stem not in named and not info.key.endswith(COMMIT)
        if leftover or (n not in kept and n < commit.n):
            doomed.append(info.key)
    for key in sorted(doomed, key=lambda key: not key.endswith("/" + COMMIT)):
        run.delete(key)
    run.sweep(ABANDONED_SECONDS)


def chosen(run: Storage, there: Sequence[int], retention: Retention) -> set[int]:
    """Which of the committed checkpoints (newest first) are to be kept."""
    kept = set(there[: max(retention.keep, 1)])
    if retention.every:
        first: dict[int, int] = {}
        for n in sorted(there):
            first.setdefault(n // retention.every, n)
        kept |= {n for period, n in first.items() if period}
    if retention.best:
        figures = {n: figure for n in there if (figure := _figure(run, n, retention.best)) is not None}
        if figures:
            pick = min if LOWER_IS_BETTER[retention.best] else max
            kept.add(pick(figures, key=lambda n: figures[n]))
        # Those whose figures are yet to come stay as well.
        kept |= {n for n in there if n not in figures and run.exists(f"{evaluation_folder(n)}/{SNAPSHOT}")}
    return kept


def require_sizes(run: Storage, n: int, files: Sequence[dict[str, Any]]) -> None:
    """Raises CheckpointCorrupt unless the files of the checkpoint at n are there, as large as their commit says."""
    for entry in files:
        key = checkpoint_folder(n) + entry["name"]
        try:
            size = run.stat(key).size
        except NotFound as error:
            raise CheckpointCorrupt(f"{run.locate(key)} is missing") from error
        if size != entry["bytes"]:
            raise CheckpointCorrupt(f"{run.locate(key)} has {size} bytes instead of {entry['bytes']}")


def _figure(run: Storage, n: int, name: str) -> float | None:
    """A figure of the evaluation at n by its short name: fid is that of whichever features it was made with."""
    try:
        metrics = json.loads(run.get(f"{evaluation_folder(n)}/metrics.json"))
    except (NotFound, ValueError):
        return None
    keys = [name, *(f"{name}_{features}" for features in get_args(FeaturesName))]
    value = next((metrics[key] for key in keys if metrics.get(key) is not None), None)
    return None if value is None or math.isnan(value) else float(value)
