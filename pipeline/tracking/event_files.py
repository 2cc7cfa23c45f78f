"""Rows of metrics and pictures of evaluations as event files of TensorBoard. Only this module imports tensorboard,
inside functions.

    tensorboard/events.out.tfevents.000001   what the run's first process has logged; the next process has 000002, ...

A row is one event, so it is there whole or not at all: its numbers under the names that wandb has, at step n, at the
row's time. Each event is on the disk before the training goes on. A process that goes on at n begins its file with a
mark by which TensorBoard drops what earlier files have beyond n, and with the rows up to n that these files lack: those
that a kill or a damaged file has cost, and all of them where the run was not tracked by TensorBoard before.

Where the run directory is not local, the file is uploaded with metrics.jsonl, before each commit and at the end.
"""

from __future__ import annotations

import io
import json
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.log import log
from pipeline.parsing.text import one_line
from pipeline.storage.base import Storage
from pipeline.tracking.drawn import drawn

FOLDER = "tensorboard/"
"""Folder of a run directory for event files."""
NAME = re.compile(r"events\.out\.tfevents\.([0-9]{6,9})")
"""Names of event files of ours. TensorBoard reads the files of a folder in the order of their names."""
EVENT_BYTES = 1 << 28
"""Longest event that is read."""
HEADER, FOOTER = 12, 4
"""Bytes around an event in a file: its length in 8 bytes with 4 of their checksum, and 4 of its own checksum."""
VERSION = "brain.Event:2"
"""Version of the format that each file begins with."""


def require_trackers(config: TrackingConfig) -> None:
    """Raise ConfigError where a tracker that is asked for is not installed. Imports nothing."""
    if "tensorboard" in config.to and find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.to names tensorboard, whose package is not installed: pip install 'latentmill[tensorboard]', or "
            "leave it out of tracking.to"
        )


class EventFiles:
    """The event files of a run, and the one to which this process writes. A failure costs the run one warning: its rows
    are in metrics.jsonl.

    folder: a local one, for this process's file where the run directory is not local. settings: the configuration
    without secrets, which is shown as a text. Raises ConfigError where tensorboard is not installed.
    """

    def __init__(self, run: Storage, folder: Path, settings: Mapping[str, Any]) -> None:
        self._run, self._settings = run, settings
        self._folder = folder
        self._key, self._path = "", folder  # of this process's file
        self._file: IO[bytes] | None = None
        self._records: Any = None
        self._failed = self._warned = False

    def start(self, n: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin or go on at n: have TensorBoard drop what lies beyond n, and write what it lacks of `rows`, which are
        those of metrics.jsonl up to n."""

        def write() -> None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            written = self._written()
            self._close()
            self._open()
            self._add(time.time(), step=n + 1, session_log=SessionLog(status=SessionLog.START))
            for row in rows:
                key = (row["kind"], row["n"], row["time"])
                written[key] -= 1
                if written[key] < 0:
                    self._row(row)
            if self._settings:
                self._add(time.time(), step=n, summary=_text("config", json.dumps(self._settings, indent=1)))

        self._guarded(write)

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl."""
        self._guarded(lambda: self._row(row))

    def image(self, n: int, name: str, png: bytes, caption: str) -> None:
        """Write a picture at n samples seen, with its caption as a text of the same name."""

        def write() -> None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            width, height = struct.unpack(">II", png[16:24])
            picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
            summary = Summary(value=[Summary.Value(tag=f"images/{name}", image=picture)])
            if caption:
                summary.MergeFrom(_text(f"images/{name}", caption))
            self._add(time.time(), step=n, summary=summary)

        self._guarded(write)

    def read(self) -> bytes:
        """The bytes of this process's file so far, b"" before there is one."""
        return self._path.read_bytes() if self._key else b""

    def upload(self, data: bytes) -> None:
        """Bring what `read` has returned into the run directory, where that is not local. Where that fails, the next
        upload brings it all."""
        try:
            if data and self._run.local_path(self._key) is None:
                self._run.put(self._key, data)
        except StorageError as error:
            self._warn(str(error))

    def close(self) -> None:
        """Close the file."""
        self._guarded(self._close)

    # ----------------------------------------------------------------------------------------------------------------

    def _row(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in drawn(row).items()]
        summary = Summary(value=values)
        if row["kind"] == "alert":
            summary = _text(f"alert/{row.get('alert')}", str(row.get("text")))
        if summary.value:
            self._add(row["time"], step=row["n"], summary=summary)

    def _add(self, at: float, **event: Any) -> None:
        """Write an event and have it on the disk. at: its Unix time."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self._file is None:
            self._open()
        assert self._file is not None
        self._records.write(Event(wall_time=at, **event).SerializeToString())
        self._file.flush()

    def _open(self) -> None:
        """Begin this process's file, whose name comes after those of all others."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard import RecordWriter

        number = max((number for number, _ in self._files()), default=0) + 1
        self._key = f"{FOLDER}events.out.tfevents.{number:06d}"
        self._path = self._run.local_path(self._key) or self._folder / self._key
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("xb")
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=time.time(), file_version=VERSION).SerializeToString())

    def _files(self) -> list[tuple[int, str]]:
        """(number, key) of the run's event files, in order."""
        keys = (info.key for info in self._run.list(FOLDER))
        return sorted((int(match[1]), key) for key in keys if (match := NAME.fullmatch(key.removeprefix(FOLDER))))

    def _written(self) -> Counter[tuple[str, int, float]]:
        """How often (kind, n, time) is that of an event in the files of the run."""
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event

        found: Counter[tuple[str, int, float]] = Counter()
        for _, key in self._files():
            path = self._run.local_path(key)
            with io.BytesIO(self._run.get(key)) if path is None else path.open("rb") as file:
                for data in records(file):
                    try:
                        event = Event.FromString(data)
                    except DecodeError:
                        break  # TensorBoard reads no further either
                    if event.summary.value:
                        kind = event.summary.value[0].tag.partition("/")[0]
                        found[kind, event.step, event.wall_time] += 1
        return found

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run an action. If it raises, no more is written."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # TensorBoard must never end a run, and its errors have no common base
            self._failed = True
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(f"TensorBoard's event files cannot be written ({one_line(what)}); metrics.jsonl goes on")


def records(file: IO[bytes]) -> Iterator[bytes]:
    """The bytes of each event in an event file, up to one that a killed process left unfinished. Checksums are not
    looked at."""
    while len(header := file.read(HEADER)) == HEADER:
        (length,) = struct.unpack("<Q", header[:8])
        if length > EVENT_BYTES or len(data := file.read(length)) < length or len(file.read(FOOTER)) < FOOTER:
            return
        yield data


def _text(tag: str, text: str) -> Any:
    """A summary with a text, which TensorBoard shows as it is."""
    from torch.utils.tensorboard.summary import text as summary

    return summary(tag, "\n".join(f"    {line}" for line in text.splitlines()))
