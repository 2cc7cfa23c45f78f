"""What a run directory tells a report: rows, evaluations and facts, read without the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from pipeline.errors import NotFound, ParseError, RunError, StorageError
from pipeline.parsing.redaction import redact
from pipeline.parsing.values import parse_json, parse_yaml
from pipeline.planning.happened import PLAN_KEY, Planned, parse_plan
from pipeline.report.parsed import (
    FILE_BYTES,
    PICTURE_BYTES,
    Step,
    Tiles,
    is_number,
    is_row,
    parse_card,
    parse_figures,
    parse_steps,
    parse_tiles,
    require_sheet,
    steered_beside_plain,
)
from pipeline.storage.base import ObjectInfo, Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import METRICS_KEY, parse_lines

T = TypeVar("T")
STEPS_KEY = "steps.json"
CONFIG_BYTES = 1 << 20
METRICS_BYTES = 1 << 26
"""The last bytes of metrics.jsonl that are read: some 100,000 rows, of two million steps."""
IN_EVALS = re.compile(
    r"evals/(?P<n>[0-9]{12,19})(-(?P<name>[^/]+))?/(?P<file>(metrics|card|grid)\.json|(grid|given)\.png)"
)
"""Keys of evaluations; what else lies under evals/ is left alone."""
SHEETS = 8  # evaluations inside training whose pictures are shown, besides the last one


@dataclass(frozen=True)
class Evaluation:
    """One folder of evals/.

    n: samples seen by the weights. name: "" for evaluations inside training, else the name that `latentmill eval` gave
    it. metrics: content of metrics.json. card: what is shown of card.json. grid: PNG bytes, which are read for those
    evaluations alone whose pictures are shown. tiles: content of grid.json; None without a picture. given: PNG bytes of
    what the pictures were given, in the same tiles, of the last evaluation inside training and of those by `eval`;
    b"" for no picture.
    """

    n: int
    name: str
    metrics: dict[str, Any]
    card: dict[str, Any]
    grid: bytes = b""
    tiles: Tiles | None = None
    given: bytes = b""

    @property
    def reconstructs(self) -> bool:
        """Whether it is an autoencoder's, so that what was given are pictures and the samples are reconstructions."""
        return bool(self.card.get("kind") == "autoencoder")


@dataclass(frozen=True)
class Run:
    """What a report shows of one run.

    rows: rows of metrics.jsonl in the order in which they were written. evaluations: in order of n. steps: of
    steps.json, in which `latentmill demo` keeps its steps; [] for other runs. notes: what is damaged and left out.
    """

    url: str
    name: str
    rows: list[dict[str, Any]]
    evaluations: list[Evaluation]
    config: str
    facts: dict[str, Any]
    steps: list[Step]
    notes: list[str] = field(default_factory=list)
    planned: Planned | None = None

    def curve(self, metric: str, kind: str = "train") -> list[tuple[float, float]]:
        """(samples seen, value) of the rows of that kind in which the metric is a number."""
        return [
            (float(row["n"]), float(row[metric]))
            for row in self.rows
            if row["kind"] == kind and is_number(row.get(metric))
        ]

    def evaluation_curve(self, metric: str) -> list[tuple[float, float]]:
        """(samples seen, value) over the evaluations inside training."""
        return [
            (float(evaluation.n), float(evaluation.metrics[metric]))
            for evaluation in self.training_evaluations
            if is_number(evaluation.metrics.get(metric))
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
        return [row for row in self.rows if row["kind"] == "start"]

    @property
    def seconds(self) -> float:
        """Time from row to row, without the time between a process's last row and the next process's start."""
        pairs = pairwise(self.rows)
        return sum(row["time"] - previous["time"] for previous, row in pairs if row["kind"] != "start")

    @property
    def restarts(self) -> int:
        return max(len(self.starts) - 1, 0)

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration; {} where it cannot be read."""
        try:
            tree = parse_yaml(self.config, CONFIG_BYTES) if self.config else {}
        except ParseError:
            return {}
        return tree if isinstance(tree, dict) else {}


def load(url: str) -> Run:
    """Read a run directory, local or s3://. What is damaged in it is left out, with a note. Raises RunError where there
    is no run, StorageError."""
    storage, notes = open_storage(url), list[str]()
    config = _get(storage, "config.yaml", notes, CONFIG_BYTES)
    metrics = _get(storage, METRICS_KEY, notes, METRICS_BYTES, end=True)
    if not config and not metrics:
        why = f" ({notes[0]})" if notes else ""
        raise RunError(f"no run at {url}: it has neither config.yaml nor {METRICS_KEY}{why}")
    _parsed(_settings, config, "config.yaml", notes, "is shown as it stands")
    rows, unread = parse_lines(metrics)
    drawn = [row for row in rows if is_row(row)]
    if unread := unread + len(rows) - len(drawn):
        notes.append(f"{METRICS_KEY}: {unread:,} of its lines are damaged and left out")
    return Run(
        url=url,
        name=redact(url.rstrip("/").rsplit("/", 1)[-1]),
        rows=drawn,
        evaluations=_evaluations(storage, notes),
        config=config.decode("utf-8", "replace"),
        facts=_parsed(_facts, _get(storage, "run.json", notes), "run.json", notes) or {},
        steps=read_steps(storage, notes),
        planned=_parsed(parse_plan, _get(storage, PLAN_KEY, notes), PLAN_KEY, notes),
        notes=notes,
    )


def read_steps(storage: Storage, notes: list[str]) -> list[Step]:
    """The finished steps of a demo; [] where there are none, or where they are damaged, which is noted."""
    return _parsed(parse_steps, _get(storage, STEPS_KEY, notes), STEPS_KEY, notes) or []


# --------------------------------------------------------------------------------------------------------------------
# Evaluations


def _evaluations(storage: Storage, notes: list[str]) -> list[Evaluation]:
    """Every folder of evals/ that has a metrics.json, which is written last, in order of n."""
    folders: dict[tuple[int, str], dict[str, ObjectInfo]] = {}
    try:
        infos = storage.list("evals/")
    except StorageError as error:
        if storage.local_path("evals") is None:
            raise
        notes.append(f"evals/ is left out: {error}")
        return []
    for info in infos:
        if match := IN_EVALS.fullmatch(info.key):
            folders.setdefault((int(match["n"]), match["name"] or ""), {})[match["file"]] = info
    evaluations = []
    for (n, name), files in sorted(folders.items()):
        if "metrics.json" not in files:
            continue
        read = partial(_read, storage, files, notes)
        if metrics := read("metrics.json", parse_figures):
            card = read("card.json", parse_card) or {}
            evaluations.append(Evaluation(n, name, metrics, card, tiles=read("grid.json", parse_tiles)))
    inside = [evaluation for evaluation in evaluations if not evaluation.name]
    pairs = [e for plain, steered in steered_beside_plain(evaluations) for e in (plain, *steered)]
    shown = {id(evaluation) for evaluation in (*_with_sheets(inside), *pairs)}
    return [
        _with_grid(storage, folders[e.n, e.name], notes, e, last=e.name != "" or e is inside[-1])
        if id(e) in shown
        else replace(e, tiles=None)
        for e in evaluations
    ]


def evaluation_at(storage: Storage, notes: list[str]) -> Evaluation | None:
    """The evaluation whose files lie at the top of `storage`, with its pictures; None where there is no metrics.json.
    What is damaged is left out, with a note."""
    files = {info.key: info for info in storage.list() if IN_EVALS.fullmatch(f"evals/{0:012d}/{info.key}")}
    read = partial(_read, storage, files, notes)
    if "metrics.json" not in files or not (metrics := read("metrics.json", parse_figures)):
        return None
    card = read("card.json", parse_card) or {}
    evaluation = Evaluation(0, "", metrics, card, tiles=read("grid.json", parse_tiles))
    return _with_grid(storage, files, notes, evaluation, last=True)


def _with_sheets(inside: Sequence[Evaluation]) -> list[Evaluation]:
    """Those of the evaluations inside training whose pictures are shown."""
    return [*evenly_spaced([e for e in inside if e.tiles], SHEETS), *inside[-1:]]


def _with_grid(
    storage: Storage, files: Mapping[str, ObjectInfo], notes: list[str], evaluation: Evaluation, *, last: bool
) -> Evaluation:
    """The evaluation with its picture, or without tiles where that is missing or of another size. last: with what was
    given, too."""
    tiles = evaluation.tiles
    if tiles is None or "grid.png" not in files:
        return replace(evaluation, tiles=None)

    def checked(data: bytes) -> bytes:
        require_sheet(data, tiles)
        return data

    grid = _read(storage, files, notes, "grid.png", checked, PICTURE_BYTES)
    given = _read(storage, files, notes, "given.png", checked, PICTURE_BYTES) if grid and last else None
    return replace(evaluation, grid=grid or b"", tiles=tiles if grid else None, given=given or b"")


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items: the first, the last, and evenly spaced ones between them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# --------------------------------------------------------------------------------------------------------------------
# Files


def _read(
    storage: Storage,
    files: Mapping[str, ObjectInfo],
    notes: list[str],
    name: str,
    parse: Callable[[bytes], T],
    limit: int = FILE_BYTES,
) -> T | None:
    """A file of an evaluation, parsed; None, with a note unless it is missing, where it cannot be read."""
    info = files.get(name)
    if info is None:
        return None
    if info.size > limit:
        notes.append(f"{info.key} is left out: it has {info.size:,} bytes, {limit:,} at most are read")
        return None
    try:
        return _parsed(parse, storage.get(info.key), info.key, notes)
    except NotFound:  # removed meanwhile, or no file
        if _is_odd(storage, info.key):
            notes.append(f"{info.key} is left out: it is no file")
        return None
    except StorageError as error:
        if storage.local_path(info.key) is None:
            raise  # the store is gone, after long patience
        notes.append(f"{info.key} is left out: {error}")
        return None


def _is_odd(storage: Storage, key: str) -> bool:
    """Whether a folder, a pipe or a device lies where a file should."""
    path = storage.local_path(key)
    return path is not None and os.path.lexists(path) and not os.path.isfile(path)


def _parsed(
    parse: Callable[[bytes], T], data: bytes, key: str, notes: list[str], outcome: str = "is left out"
) -> T | None:
    """The value of the file `key`; None where it is empty or damaged, which is noted with the outcome."""
    if not data:
        return None
    try:
        return parse(data)
    except ParseError as error:
        notes.append(f"{key} {outcome}: {error}")
        return None


def _settings(data: bytes) -> Any:
    return parse_yaml(data, CONFIG_BYTES)


def _facts(data: bytes) -> dict[str, Any]:
    """The content of run.json. Raises ParseError."""
    tree = parse_json(data, FILE_BYTES)
    if not isinstance(tree, dict):
        raise ParseError("it holds no group of keys")
    return tree


def _get(storage: Storage, key: str, notes: list[str], limit: int = FILE_BYTES, end: bool = False) -> bytes:
    """The bytes of a file; b"" for none, for one that cannot be read, and for one of more than `limit` bytes, which is
    noted. end: read the last `limit` bytes of a longer one."""
    if _is_odd(storage, key):
        notes.append(f"{key} is left out: it is no file")
        return b""
    try:
        size = storage.stat(key).size
        if size <= limit:
            return storage.get(key)
        notes.append(f"{key} has {size:,} bytes, of which {f'the last {limit:,}' if end else 'none'} are read")
        return storage.get_range(key, size - limit, limit) if end else b""
    except NotFound:
        return b""
    except StorageError as error:
        if storage.local_path(key) is None:
            raise
        notes.append(f"{key} is left out: {error}")
        return b""


def spread(metrics: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Ends of a figure's error bar: its interval (..._low, ..._high) or, without one, one standard error (..._error) to
    both sides. None when the metrics hold neither."""
    low, high, error = (metrics.get(f"{metric}_{end}") for end in ("low", "high", "error"))
    if is_number(low) and is_number(high):
        return float(low), float(high)  # type: ignore[arg-type]
    value = metrics.get(metric)
    return (value - error, value + error) if is_number(error) and is_number(value) else None  # type: ignore[operator]
