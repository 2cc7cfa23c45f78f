"""Metrics of a run: a JSONL file first, wandb second.

metrics.jsonl holds every row, one JSON object a line, flushed as it is written:
    {"n": samples seen, "time": unix seconds, "kind": "train" | "eval" | "start" | ..., then the metrics}
A thread sends the same rows to wandb. A failure there (no network, a slow server, a full disk) costs the run one
warning and nothing else. Neither gets a secret: values under secret-sounding keys and passwords in URLs are redacted,
and the environment is never sent.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, NotFound, StorageError
from pipeline.log import log
from pipeline.parsing.text import redact_values
from pipeline.storage.base import Storage
from pipeline.tracking.wandb_run import Alert, Picture, Summary, WandbRun

METRICS_KEY = "metrics.jsonl"
WANDB_ID_KEY = "wandb.id"
WANDB_MODES = ("auto", "online", "offline", "off")


class Tracker:
    """The metrics of a run, written by the rank that logs. On other ranks it is disabled: every method does nothing.

    run: the run directory. folder: for metrics.jsonl and wandb's files when the run directory is not local (s3://);
    `commit` uploads the rows. settings: the resolved configuration as plain data, which is redacted and sent to wandb.
    name: of the run in wandb, by default the last part of the run's URL.
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
        self._lock = threading.RLock()  # evaluations beside training log from their own thread
        self.evaluations: set[int] = set()
        """n of the evaluations in metrics.jsonl."""
        if not enabled:
            return
        local = run.local_path(METRICS_KEY)
        assert local is not None or folder is not None, "a run that is not local needs a folder for its metrics"
        self._path = local if local is not None else Path(folder or ".") / METRICS_KEY
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if local is None:
            self._path.write_bytes(_get(run, METRICS_KEY))
        self.evaluations = _evaluated(read_rows(self._path))
        if config.wandb != "off":
            self._wandb = WandbRun(
                mode=config.wandb,
                project=config.project,
                group=config.group,
                name=name or redact_values(run.url.rstrip("/").rsplit("/", 1)[-1]),
                identity=_identity(run),
                settings=redact_values(dict(settings or {})),
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
            rows = [row for row in read_rows(self._path) if row["n"] <= n]
            partial = self._path.with_name(self._path.name + ".partial")
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(_line(row) for row in rows)
            os.replace(partial, self._path)
            self.evaluations = _evaluated(rows)
            self.log(n, facts, kind="start")

    def log(self, n: int, metrics: Mapping[str, Any], kind: str = "train") -> None:
        """Write one row at n samples seen. metrics: numbers, strings, lists and dicts of them. NaN becomes null."""
        if not self._enabled:
            return
        row = _json_value({"n": int(n), "time": round(time.time(), 3), "kind": kind, **metrics})
        with self._lock:
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8", buffering=1)  # a line at a time
            self._file.write(_line(row))
            if kind == "eval":
                self.evaluations.add(int(n))
        if self._wandb is not None:
            numbers = {f"{kind}/{key}": v for key, v in _numbers(row) if key not in ("n", "time")}
            if numbers:
                self._wandb.put(numbers | {"samples": n})

    def image(self, n: int, name: str, png: bytes, caption: str = "") -> None:
        """Send a picture at n samples seen to wandb. The run directory has its own copy under evals/."""
        if self._enabled and self._wandb is not None:
            self._wandb.put({"samples": n, f"images/{name}": Picture(png, caption)})

    def alert(self, kind: str, n: int, text: str) -> None:
        """Report something that needs attention at n samples seen: a row of kind "alert", a line on standard error and
        an alert of wandb. kind: spike, stall or skipped."""
        if not self._enabled:
            return
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
        url = redact_values(url)
        costs = {"stall_s": round(stall_s, 4), "write_s": round(write_s, 4), "bytes": bytes}
        self.log(n, {"url": url, **costs}, kind="checkpoint")
        if self._wandb is not None:
            self._wandb.put(Summary({"checkpoint": url, "checkpoint_samples": n}))

    def commit(self) -> None:
        """Upload metrics.jsonl where the run directory is not local. Called before each checkpoint's commit, which
        guarantees the rows up to it."""
        if self._enabled and self._run.local_path(METRICS_KEY) is None and self._path.exists():
            self._run.put(METRICS_KEY, self._path.read_bytes())

    def close(self) -> None:
        """Upload the rows and wait for wandb, but not forever."""
        try:
            self.commit()
        finally:
            self._close()

    def _close(self) -> None:
        self._close_file()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. After an error, failures of closing are not raised, and after a StorageError nothing is uploaded: the
        store would take as long to fail again."""
        if error is None:
            self.close()
        elif isinstance(error, StorageError):
            self._close()
        else:
            try:
                self.close()
            except StorageError:
                pass


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a killed process left unfinished."""
    return parse_rows(path.read_bytes()) if path.exists() else []


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows in the bytes of a metrics.jsonl."""
    rows = []
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # an empty line, or one cut by a kill
            continue
        if isinstance(row, dict) and isinstance(row.get("n"), int):
            rows.append(row)
    return rows


def _identity(run: Storage) -> str:
    """wandb's id of this run. It is drawn once and stored in the run directory, so that a resumed run keeps it."""
    stored = _get(run, WANDB_ID_KEY).decode().strip()
    if not stored:
        run.put_if_absent(WANDB_ID_KEY, secrets.token_hex(4).encode())
        stored = run.get(WANDB_ID_KEY).decode().strip()
    return stored


def _evaluated(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    return {row["n"] for row in rows if row.get("kind") == "eval"}


def _get(run: Storage, key: str) -> bytes:
    try:
        return run.get(key)
    except NotFound:
        return b""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    """A value that JSON can hold: numpy and torch scalars become Python numbers, NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float):
        return number if math.isfinite(number) else None
    return number


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int | float]]:
    """(name, number) pairs of a row, which wandb draws. Numbers in nested dicts have dotted names."""
    numbers: list[tuple[str, int | float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append((prefix + str(key), value))
    return numbers
