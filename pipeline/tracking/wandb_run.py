"""A wandb run behind a queue: a failure there costs training one warning and nothing else.

Without a network, with a slow server, a full disk or an error of wandb itself, the rows are still in metrics.jsonl
(tracker.py). The environment, the command line and the host are never sent; of wandb's variables, WANDB_PROJECT,
WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS and WANDB_NAME are obeyed where no key says otherwise.
"""

from __future__ import annotations

import io
import netrc
import os
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.log import log
from pipeline.parsing.redaction import redact

WANDB_URL = "https://api.wandb.ai"
PROJECT = "latentmill"
"""Project where neither tracking.project nor WANDB_PROJECT names one."""
REACH_SECONDS = 3.0  # time for a connection to wandb's server, after which the run is tracked offline
FINISH_SECONDS = 30.0  # time that the end of a run waits for wandb
QUEUED_ROWS = 10_000  # most rows that wait for a slow wandb; further rows are only in metrics.jsonl


@dataclass(frozen=True)
class Picture:
    """A PNG as a value of a row."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Alert:
    """Something that needs attention."""

    title: str
    text: str


@dataclass(frozen=True)
class Summary:
    """Values for the summary of the run."""

    values: dict[str, Any]


Row = dict[str, Any]
"""Values by name, of one sample count ("samples"); a value may be a Picture."""


class WandbRun:
    """A wandb run behind a queue: the training loop puts rows, and a daemon thread does what may block or fail."""

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
        self._arguments: dict[str, Any] = filed_under(project, group) | {
            "name": name,
            "id": identity,
            "config": settings,
            "dir": str(folder),
        }
        self._mode = mode
        self._queue: queue.Queue[Row | Alert | Summary | None] = queue.Queue(maxsize=QUEUED_ROWS)
        self._warned = False
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, item: Row | Alert | Summary) -> None:
        """Queue an item. Never waits and never raises."""
        if self._failed:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._warn("wandb is too slow; some rows are in metrics.jsonl alone")

    def close(self) -> None:
        """Wait until everything is sent, for about FINISH_SECONDS at most."""
        try:
            self._queue.put(None, timeout=FINISH_SECONDS)
        except queue.Full:
            pass
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._warn("wandb did not finish in time; metrics.jsonl has every row")

    def _work(self) -> None:
        run = self._guarded(self._open)
        while (item := self._queue.get()) is not None:
            if not self._failed:
                self._guarded(partial(_send, run, item))
        if run is not None:
            self._guarded(run.finish)
            self._guarded(self._redact_logs)

    def _redact_logs(self) -> None:
        """wandb's own logs name the run's folder and what it was given, as they are."""
        for path in Path(self._arguments["dir"]).glob("wandb/*run-*/logs/*.log"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if (clean := redact(text)) != text:
                path.write_text(clean, encoding="utf-8")

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
            x_disable_meta=True,  # command line, host and environment are not sent
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
        """Run an action of wandb. If it raises, tracking by wandb ends with one warning."""
        try:
            return action()
        except Exception as error:  # wandb must never end a run, and its errors have no common base
            self._failed = True
            self._warn(f"wandb failed ({type(error).__name__}: {error}); metrics.jsonl goes on")
            return None

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(message)


def filed_under(project: str, group: str) -> dict[str, Any]:
    """Where wandb files a run: as the keys say and, where these are empty, as wandb's own variables in the environment
    do. Every one of them is named here, since wandb reads its variables but once in a process."""
    environment = os.environ.get
    tags = environment("WANDB_TAGS", "").split(",")
    return {
        "project": project or environment("WANDB_PROJECT") or PROJECT,
        "entity": environment("WANDB_ENTITY") or None,
        "group": group or environment("WANDB_RUN_GROUP") or None,
        "tags": [tag.strip() for tag in tags if tag.strip()] or None,
    }


def _send(run: Any, item: Row | Alert | Summary) -> None:
    if isinstance(item, Alert):
        run.alert(title=item.title, text=item.text, level="WARN")
    elif isinstance(item, Summary):
        run.summary.update(item.values)
    else:
        run.log({key: _picture(value) if isinstance(value, Picture) else value for key, value in item.items()})


def _picture(picture: Picture) -> Any:
    """The picture as a wandb.Image."""
    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(picture.png)), caption=picture.caption)


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
