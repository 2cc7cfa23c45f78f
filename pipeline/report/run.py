"""What a run directory tells a report: rows, evaluations and facts, read without the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.errors import NotFound, RunError
from pipeline.parsing.redaction import redact
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import METRICS_KEY, parse_rows


@dataclass(frozen=True)
class Evaluation:
    """One folder of evals/.

    n: samples seen by the weights. name: "" for evaluations inside training, else the name that `latentmill
    eval` gave it. metrics: content of metrics.json. grid: PNG bytes, may be empty. tiles: content of grid.json.
    """

    n: int
    name: str
    metrics: dict[str, Any]
    card: dict[str, Any]
    grid: bytes
    tiles: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a report shows of one run.

    rows: rows of metrics.jsonl in the order in which they were written. evaluations: in order of n. steps: rows of
    steps.json, in which `latentmill demo` keeps heading, command and seconds of each of its steps; [] for other runs.
    """

    url: str
    name: str
    rows: list[dict[str, Any]]
    evaluations: list[Evaluation]
    config: str
    facts: dict[str, Any]
    steps: list[dict[str, Any]]

    def curve(self, metric: str, kind: str = "train") -> list[tuple[float, float]]:
        """(samples seen, value) of the rows of that kind in which the metric is a number."""
        return [
            (float(row["n"]), float(row[metric]))
            for row in self.rows
            if row.get("kind") == kind and _is_number(row.get(metric))
        ]

    def evaluation_curve(self, metric: str) -> list[tuple[float, float]]:
        """(samples seen, value) over the evaluations inside training."""
        return [
            (float(evaluation.n), float(evaluation.metrics[metric]))
            for evaluation in self.training_evaluations
            if _is_number(evaluation.metrics.get(metric))
        ]

    def evaluation_bars(self, metric: str) -> dict[float, tuple[float, float]]:
        """Error bars of the evaluations inside training, by samples seen."""
        bars = {float(evaluation.n): spread(evaluation.metrics, metric) for evaluation in self.training_evaluations}
        return {n: bar for n, bar in bars.items() if bar}

    @property
    def training_evaluations(self) -> list[Evaluation]:
        return [evaluation for evaluation in self.evaluations if not evaluation.name]

    @property
    def last(self) -> Evaluation | None:
        """The evaluation inside training at the most samples, which a headline quotes."""
        return max(self.training_evaluations, key=lambda e: e.n, default=None)

    @property
    def samples(self) -> int:
        return max((row["n"] for row in self.rows), default=0)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Rows that were written when a process began or resumed the run."""
        return [row for row in self.rows if row.get("kind") == "start"]

    @property
    def seconds(self) -> float:
        """Time from row to row, without the time between a process's last row and the next process's start."""
        pairs = pairwise(self.rows)
        return sum(row["time"] - previous["time"] for previous, row in pairs if row.get("kind") != "start")

    @property
    def restarts(self) -> int:
        return max(len(self.starts) - 1, 0)


def load(url: str) -> Run:
    """Read a run directory, local or s3://. Raises RunError where there is none."""
    storage = open_storage(url)
    config, facts, metrics = (_get(storage, key) for key in ("config.yaml", "run.json", METRICS_KEY))
    if not config and not metrics:
        raise RunError(f"no run at {url}: it has neither config.yaml nor {METRICS_KEY}")
    return Run(
        url=url,
        name=redact(url.rstrip("/").rsplit("/", 1)[-1]),
        rows=parse_rows(metrics),
        evaluations=sorted(_evaluations(storage), key=lambda e: (e.n, e.name)),
        config=config.decode("utf-8", "replace"),
        facts=json.loads(facts) if facts else {},
        steps=json.loads(_get(storage, "steps.json") or b"[]"),
    )


def _evaluations(storage: Storage) -> Iterator[Evaluation]:
    """Every folder of evals/ that has a metrics.json, which is written last."""
    keys = {info.key for info in storage.list("evals")}
    for key in sorted(key for key in keys if key.endswith("/metrics.json")):
        folder = key.rsplit("/", 1)[0]
        number, _, name = folder.rsplit("/", 1)[-1].partition("-")
        if not number.isdecimal():
            continue
        files = {
            file: storage.get(f"{folder}/{file}") if f"{folder}/{file}" in keys else b""
            for file in ("card.json", "grid.png", "grid.json")
        }
        yield Evaluation(
            n=int(number),
            name=name,
            metrics=json.loads(storage.get(key)),
            card=json.loads(files["card.json"] or b"{}"),
            grid=files["grid.png"],
            tiles=json.loads(files["grid.json"] or b"{}"),
        )


def _get(storage: Storage, key: str) -> bytes:
    try:
        return storage.get(key)
    except NotFound:
        return b""


def spread(metrics: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Ends of a figure's error bar: its interval (..._low, ..._high) or, without one, one standard error (..._error) to
    both sides. None when the metrics hold neither."""
    low, high, error = (metrics.get(f"{metric}_{end}") for end in ("low", "high", "error"))
    if _is_number(low) and _is_number(high):
        return float(low), float(high)  # type: ignore[arg-type]
    value = metrics.get(metric)
    return (value - error, value + error) if _is_number(error) and _is_number(value) else None  # type: ignore[operator]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
