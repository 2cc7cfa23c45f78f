"""Metrics of a run: a JSONL file first, trackers second.

metrics.jsonl holds every row, one JSON object a line, flushed as it is written:
    {"n": samples seen, "time": unix seconds, "kind": "train" | "eval" | "start" | ..., then the metrics}
A thread sends the same rows to wandb, and event files of TensorBoard get them, as tracking.to says. A failure there (no
network, a slow server, a full disk) costs the run one warning and nothing else. None gets a secret: values under
secret-sounding keys and passwords in URLs are redacted, and the environment is never sent.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, NotFound, ParseError, StorageError
from pipeline.log import log
from pipeline.parsing.text import redact_values, safe
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage, local_errors
from pipeline.storage.local import LocalStorage
from pipeline.tracking.drawn import drawn
from pipeline.tracking.event_files import EventFiles, require_trackers
from pipeline.tracking.identity import identity_of
from pipeline.tracking.wandb_run import Alert, Picture, Summary, WandbRun

METRICS_KEY = "metrics.jsonl"
METRICS_BYTES = 1 << 31
"""Largest metrics.jsonl with which a run goes on."""
ROW_BYTES = 1 << 24
"""Longest line of metrics.jsonl that is read."""
WANDB_MODES = ("auto", "online", "offline", "off")


class Tracker:
    """The metrics of a run, written by the rank that logs. On other ranks it is disabled: every method does nothing.

    run: the run directory. folder: for metrics.jsonl and the trackers' files when the run directory is not local
    (s3://); `commit` uploads the rows. settings: the resolved configuration as plain data, which is redacted and sent
    to the trackers. name: of the run in wandb, by default WANDB_NAME, else the last part of the run's URL. Raises
    ConfigError where a tracker is not installed.
    """

    def __init__(
        self,
        run: Storage,
        config: TrackingConfig,
        *,
        settings: Mapping[str, Any] | None = None,
        name: str = "",
        folder: Path | None = None,
        enabled: bool = True,
    ) -> None:
        if config.wandb not in WANDB_MODES:
            raise ConfigError(f"tracking.wandb={config.wandb} is none of {', '.join(WANDB_MODES)}")
        self._run = run
        self._enabled = enabled
        self._file: TextIO | None = None
        self._wandb: WandbRun | None = None
        self._events: EventFiles | None = None
        self._lock = threading.RLock()  # evaluations beside training log from their own thread
        self.evaluations: set[int] = set()
        """n of the evaluations in metrics.jsonl."""
        if not enabled:
            return
        require_trackers(config)
        local = run.local_path(METRICS_KEY)
        assert local is not None or folder is not None, "a run that is not local needs a folder for its metrics"
        self._path = local if local is not None else Path(folder or ".") / METRICS_KEY
        with local_errors("write", self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        stored = _stored(run)
        if local is None:
            self._folder().put(METRICS_KEY, stored)
        self.evaluations = _evaluated(parse_rows(stored))
        told = redact_values(dict(settings or {}))
        if "tensorboard" in config.to:
            self._events = EventFiles(run, self._path.parent, told)
        if "wandb" in config.to and config.wandb != "off":
            self._wandb = WandbRun(
                mode=config.wandb,
                project=config.project,
                group=config.group,
                name=safe(name or os.environ.get("WANDB_NAME") or run.url.rstrip("/").rsplit("/", 1)[-1]),
                identity=identity_of(run),
                settings=told,
                folder=self._path.parent,
            )

    def start(self, n: int, **facts: Any) -> None:
        """Begin or resume the run at n: drop the rows beyond n and write a "start" row.

        The report counts restarts by these rows. facts: world size, versions and the like.
        """
        if not self._enabled:
            return
        with self._lock:
            self._close_file()
            lines = self._folder().get(METRICS_KEY).split(b"\n") if self._path.exists() else [b""]
            *whole, last = [(line, parse_row(line)) for line in lines]
            whole += [last] if last[1] else []  # without its end a line is kept only if it is a whole row
            kept = [(line, row) for line, row in whole if row is None or row["n"] <= n]
            self._folder().put(METRICS_KEY, b"".join(line + b"\n" for line, _ in kept if line))
            rows = [row for _, row in kept if row]
            self.evaluations = _evaluated(rows)
            if self._events is not None:
                self._events.start(n, rows)
            self.log(n, facts, kind="start")

    def log(self, n: int, metrics: Mapping[str, Any], kind: str = "train") -> None:
        """Write one row at n samples seen. metrics: numbers, strings, lists and dicts of them. NaN becomes null."""
        if not self._enabled:
            return
        row = _json_value({"n": int(n), "time": round(time.time(), 3), "kind": kind, **metrics})
        with self._lock:
            with local_errors("write", self._path):
                if self._file is None:
                    self._file = self._path.open("a", encoding="utf-8", buffering=1)  # a line at a time
                self._file.write(_line(row))
            if kind == "eval":
                self.evaluations.add(int(n))
            if self._events is not None:
                self._events.row(row)
        if self._wandb is not None and (numbers := drawn(row)):
            self._wandb.put({**numbers, "samples": n})

    def image(self, n: int, name: str, png: bytes, caption: str = "") -> None:
        """Send a picture at n samples seen to the trackers. The run directory has its own copy under evals/."""
        if self._events is not None:
            with self._lock:
                self._events.image(n, name, png, caption)
        if self._wandb is not None:
            self._wandb.put({"samples": n, f"images/{name}": Picture(png, caption)})

    def alert(self, kind: str, n: int, text: str) -> None:
        """Report something that needs attention at n samples seen: a row of kind "alert", a line on standard error and
        an alert of wandb. kind: spike, stall, skipped or codebook."""
        if not self._enabled:
            return
        text = safe(text)
        self.log(n, {"alert": kind, "text": text}, kind="alert")
        log.warning(f"{kind} at {n} samples: {text}")
        if self._wandb is not None:
            self._wandb.put(Alert(kind, f"at {n} samples: {text}"))

    def checkpoint(self, n: int, url: str, stall_s: float = 0.0, write_s: float = 0.0, bytes: int = 0) -> None:
        """Record a commit at n samples seen: a row of kind "checkpoint", and wandb's summary. url: where it is.

        stall_s: seconds that training waited for it. write_s: seconds from its beginning to its commit. bytes: size of
        rank 0's file.
        """
        if not self._enabled:
            return
        url = safe(url)
        costs = {"stall_s": round(stall_s, 4), "write_s": round(write_s, 4), "bytes": bytes}
        self.log(n, {"url": url, **costs}, kind="checkpoint")
        if self._wandb is not None:
            self._wandb.put(Summary({"checkpoint": url, "checkpoint_samples": n}))

    def commit(self) -> None:
        """Upload metrics.jsonl, and then TensorBoard's files, where the run directory is not local. Called before each
        checkpoint's commit, which guarantees the rows up to it."""
        if not self._enabled or self._run.local_path(METRICS_KEY) is not None:
            return
        if self._path.exists():
            self._run.put(METRICS_KEY, self._folder().get(METRICS_KEY))
        if self._events is not None:
            with self._lock:
                files = self._events.read()
            self._events.upload(files)

    def close(self) -> None:
        """Upload the rows and wait for wandb, but not forever."""
        try:
            self.commit()
        finally:
            self._close()

    def _close(self) -> None:
        try:
            self._close_file()
            if self._events is not None:
                self._events.close()
        finally:
            if self._wandb is not None:
                self._wandb.close()
                self._wandb = None

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with local_errors("write", self._path):
                file.close()

    def _folder(self) -> LocalStorage:
        """The local folder of metrics.jsonl."""
        return LocalStorage(self._path.parent)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. After an error, failures of closing are not raised, and after a StorageError nothing is uploaded: the
        store would take as long to fail again."""
        if error is None:
            self.close()
        else:
            with suppress(StorageError):
                (self._close if isinstance(error, StorageError) else self.close)()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a killed process left unfinished."""
    return parse_rows(path.read_bytes()) if path.exists() else []


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows in the bytes of a metrics.jsonl."""
    return parse_lines(data)[0]


def parse_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The rows in the bytes of a metrics.jsonl, and the number of lines that are no rows. A last line without its end,
    which a kill leaves, is no line."""
    lines = data.split(b"\n")
    parsed = [parse_row(line) for line in lines]
    damaged = sum(row is None and bool(line) for row, line in zip(parsed[:-1], lines))
    return [row for row in parsed if row is not None], damaged


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None where the line is no row: no JSON, or without the n, the time or the kind of one."""
    if not line:
        return None
    try:
        row = parse_json(line, ROW_BYTES)
    except ParseError:
        return None
    if type(row) is not dict or type(row.get("n")) is not int or not 0 <= row["n"] < 2**63:
        return None
    is_one = type(row.get("time")) in (int, float) and type(row.get("kind")) is str and row["kind"]
    return row if is_one else None


def _evaluated(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    return {row["n"] for row in rows if row.get("kind") == "eval"}


def _stored(run: Storage) -> bytes:
    """The bytes of a run's metrics.jsonl, b"" for none. Raises StorageError."""
    path = run.local_path(METRICS_KEY)
    if path is not None and os.path.isdir(path):
        raise StorageError(f"{path} is a folder, and a run writes its metrics there: move it away")
    try:
        if (size := run.stat(METRICS_KEY).size) > METRICS_BYTES:
            raise StorageError(
                f"{run.locate(METRICS_KEY)} has {size:,} bytes, more than a run writes: move it away, and the run goes "
                "on with a new one"
            )
        return run.get(METRICS_KEY)
    except NotFound:
        return b""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    """A value that JSON can hold: numpy and torch scalars become Python numbers, NaN and infinity become null, and
    texts lose secrets and control characters."""
    if isinstance(value, Mapping):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    if isinstance(value, str):
        return safe(value)
    if value is None or isinstance(value, bool | int):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float):
        return number if math.isfinite(number) else None
    return number
