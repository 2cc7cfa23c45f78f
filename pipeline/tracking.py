"""Metrics of a run: a JSONL file first, wandb second.

metrics.jsonl holds every row, one JSON object a line, flushed as it is written:
    {"n": samples seen, "time": unix seconds, "kind": "train" | "eval" | "start" | ..., then the metrics}
wandb gets the same rows from a thread of its own. Whatever happens there (no network, a slow server, a full disk) costs
the run nothing but one warning. Neither gets a secret: values under secret-sounding keys and passwords inside URLs are
redacted, and the environment is never sent.
"""

from __future__ import annotations

import io
import json
import math
import netrc
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import urlsplit

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, NotFound, StorageError
from pipeline.storage import Storage

METRICS_KEY = "metrics.jsonl"
WANDB_ID_KEY = "wandb.id"
WANDB_MODES = ("auto", "online", "offline", "off")
WANDB_URL = "https://api.wandb.ai"
REACH_SECONDS = 3.0  # how long a connection to wandb's server may take before the run is tracked offline
FINISH_SECONDS = 30.0  # how long the end of a run waits for wandb
QUEUED_ROWS = 10_000  # rows that wait for a slow wandb; more are left to metrics.jsonl alone

REDACTED = "[redacted]"
SECRET_WORDS = frozenset(
    ["key", "apikey", "secret", "token", "password", "passwd", "passphrase", "credential", "credentials"]
)
PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
SIGNED_QUERY = re.compile(r"(?i)([?&](?:x-amz-signature|x-amz-security-token|sig|signature|token)=)[^&\s]+")


class Tracker:
    """Where the rank that logs sends its rows; disabled on the others, where every method does nothing.

    run: the run directory. folder: where metrics.jsonl grows and wandb keeps its files when the run directory is not
    local (s3://); its rows are uploaded by `commit`. settings: the resolved configuration as plain data, sent to wandb
    redacted. name: of the run in wandb; by default the last part of the run's URL.
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
        self._wandb: _Wandb | None = None
        self._lock = threading.RLock()  # evaluations beside training log from a thread of their own
        self.evaluations: set[int] = set()
        """n of the evaluations that metrics.jsonl has a row of."""
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
            self._wandb = _Wandb(
                mode=config.wandb,
                project=config.project,
                group=config.group,
                name=name or run.url.rstrip("/").rsplit("/", 1)[-1],
                identity=_identity(run),
                settings=redact(dict(settings or {})),
                folder=self._path.parent,
            )

    def start(self, n: int, **facts: Any) -> None:
        """Mark that a process begins or resumes the run at n: rows beyond n are dropped, and a "start" row is written.

        The report counts restarts by these rows. facts: world size, versions and the like.
        """
        if not self._enabled:
            return
        with self._lock:
            self._close_file()
            kept = [row for row in read_rows(self._path) if row["n"] <= n]
            partial = self._path.with_name(self._path.name + ".partial")
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(_line(row) for row in kept)
            os.replace(partial, self._path)
            self.evaluations = _evaluated(kept)
            self.log(n, facts, kind="start")

    def log(self, n: int, metrics: Mapping[str, Any], kind: str = "train") -> None:
        """One row at n samples seen. metrics: numbers, strings, lists and dicts of them; not-a-number becomes null."""
        if not self._enabled:
            return
        row = _plain({"n": int(n), "time": round(time.time(), 3), "kind": kind, **metrics})
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
        """A picture at n samples seen, for wandb alone: the run directory keeps its own under evals/."""
        if self._enabled and self._wandb is not None:
            self._wandb.put({"samples": n, f"images/{name}": _Picture(png, caption)})

    def alert(self, kind: str, n: int, text: str) -> None:
        """What somebody should look at, at n samples seen: a row of kind "alert", a line on standard error, and wandb's
        alert. kind: spike, stall or skipped."""
        if not self._enabled:
            return
        self.log(n, {"alert": kind, "text": text}, kind="alert")
        print(f"warning: {kind} at {n} samples: {text}", file=sys.stderr, flush=True)
        if self._wandb is not None:
            self._wandb.put({"samples": n, "alert": _Alert(kind, f"at {n} samples: {text}")})

    def checkpoint(self, n: int, url: str, stall_s: float = 0.0, write_s: float = 0.0, bytes: int = 0) -> None:
        """A commit at n samples seen lies at this URL: a row of kind "checkpoint", and of wandb's summary.

        stall_s: how long training waited for it. write_s: from its beginning to its commit, seconds. bytes: of rank 0's
        file.
        """
        if not self._enabled:
            return
        url = redact(url)
        took = {"stall_s": round(stall_s, 4), "write_s": round(write_s, 4), "bytes": bytes}
        self.log(n, {"url": url, **took}, kind="checkpoint")
        if self._wandb is not None:
            self._wandb.put({"summary": _Summary({"checkpoint": url, "checkpoint_samples": n})})

    def commit(self) -> None:
        """Bring metrics.jsonl into the run directory where that is not local; called before each checkpoint's commit,
        which promises the rows up to it."""
        if self._enabled and self._run.local_path(METRICS_KEY) is None and self._path.exists():
            self._run.put(METRICS_KEY, self._path.read_bytes())

    def close(self) -> None:
        """Bring the rows home and wait for wandb, a while at most."""
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
        """Closes. After an error its own failures are not raised, and a store that has failed is not asked again: it
        would take as long again to fail."""
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
    """The rows of a metrics.jsonl; a last line that a killed process left unfinished is no row."""
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


def redact(value: Any, key: str = "") -> Any:
    """A copy of plain data in which nothing secret is left.

    Values whose key has a word such as key, secret, token or password are replaced whole, and so are user names and
    passwords in URLs and signatures in their queries.
    """
    if isinstance(value, Mapping):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    if value not in ("", None) and SECRET_WORDS.intersection(words):
        return REDACTED
    if isinstance(value, str):
        return SIGNED_QUERY.sub(rf"\1{REDACTED}", PASSWORD_IN_URL.sub(REDACTED, value))
    return value


# --------------------------------------------------------------------------------------------------------------------
# wandb


class _Picture:
    """A PNG on its way to wandb."""

    def __init__(self, png: bytes, caption: str) -> None:
        self.png, self.caption = png, caption


class _Alert:
    """An alert on its way to wandb."""

    def __init__(self, title: str, text: str) -> None:
        self.title, self.text = title, text


class _Summary:
    """What wandb's summary of the run is to say."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


class _Wandb:
    """A wandb run behind a queue: the training loop puts rows, a daemon thread does all that may wait or fail."""

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        group: str,
        name: str,
        identity: str,
        settings: dict[str, Any],
        folder: Path,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "project": project,
            "group": group or None,
            "name": name,
            "id": identity,
            "config": settings,
            "dir": str(folder),
        }
        self._mode = mode
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=QUEUED_ROWS)
        self._warned = False
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, row: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._warn("wandb is too slow; some rows are in metrics.jsonl alone")

    def close(self) -> None:
        try:
            self._queue.put(None, timeout=FINISH_SECONDS)
        except queue.Full:
            pass
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._warn("wandb did not finish in time; metrics.jsonl has every row")

    def _work(self) -> None:
        run = self._guarded(self._open)
        while (row := self._queue.get()) is not None:
            if not self._failed:
                self._guarded(partial(_log, run, row))
        if run is not None:
            self._guarded(run.finish)

    def _open(self) -> Any:
        mode: Any = self._mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        if mode == "online" and not _reachable():
            self._warn("wandb's server cannot be reached; tracking offline (`wandb sync` uploads it later)")
            mode = "offline"
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # command line, host and environment stay here
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=20,
            symlink=False,
        )
        run = wandb.init(mode=mode, resume="allow", settings=settings, **self._arguments)
        run.define_metric("samples")
        run.define_metric("*", step_metric="samples")
        return run

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Run an action of wandb's; whatever it raises ends tracking there, with one warning."""
        try:
            return action()
        except Exception as error:  # wandb must never end a run, and its errors have no common base
            self._failed = True
            self._warn(f"wandb failed ({type(error).__name__}: {error}); metrics.jsonl goes on")
            return None

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            print(f"warning: {message}", file=sys.stderr, flush=True)


def _log(run: Any, row: dict[str, Any]) -> None:
    """Log a row, with its pictures as wandb's own; or an alert, or a part of the summary."""
    for value in row.values():
        if isinstance(value, _Alert):
            run.alert(title=value.title, text=value.text, level="WARN")
            return
        if isinstance(value, _Summary):
            run.summary.update(value.values)
            return
    if any(isinstance(value, _Picture) for value in row.values()):
        import wandb
        from PIL import Image

        row = {
            key: wandb.Image(Image.open(io.BytesIO(value.png)), caption=value.caption)
            if isinstance(value, _Picture)
            else value
            for key, value in row.items()
        }
    run.log(row)


def _server() -> tuple[str, int]:
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB_URL)
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def _reachable() -> bool:
    try:
        socket.create_connection(_server(), timeout=REACH_SECONDS).close()
    except OSError:
        return False
    return True


def _logged_in() -> bool:
    """Whether wandb would find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(_server()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _identity(run: Storage) -> str:
    """wandb's id of this run: made once and kept in the run directory, so that a resumed run goes on under it."""
    stored = _get(run, WANDB_ID_KEY).decode().strip()
    if not stored:
        run.put_if_absent(WANDB_ID_KEY, secrets.token_hex(4).encode())
        stored = run.get(WANDB_ID_KEY).decode().strip()
    return stored


# --------------------------------------------------------------------------------------------------------------------
# Rows


def _evaluated(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    return {row["n"] for row in rows if row.get("kind") == "eval"}


def _get(run: Storage, key: str) -> bytes:
    try:
        return run.get(key)
    except NotFound:
        return b""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Values as JSON has them: numpy and torch scalars as Python numbers, not-a-number and infinity as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float):
        return number if math.isfinite(number) else None
    return number


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int | float]]:
    """The numbers of a row, those of nested dicts under dotted names; what wandb draws."""
    found: list[tuple[str, int | float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + str(key), value))
    return found
