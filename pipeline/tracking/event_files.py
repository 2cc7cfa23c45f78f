"""Rows of metrics and pictures of evaluations as event files of TensorBoard. Only this module imports tensorboard,
inside functions.

    tensorboard/events.out.tfevents.000001   what the run's first process has logged; the next process has 000002, ...

A row is one event, so it is there whole or not at all: its numbers under the names that wandb has, at step n, at the
row's time. Each event is handed to the operating system before the training goes on. A process that goes on begins its
file with a mark at the step where the files and metrics.jsonl first differ (by what a kill or a damaged file has cost,
what lies beyond the commit, what came while TensorBoard did not track the run), and writes all rows from there anew.

TensorBoard's Python loader drops at the mark what earlier files have from there on, and so shows metrics.jsonl as it
is. Its fast loader, the default for folders on a disk, knows no mark: it drops points of a name when one of that name
comes at a step that is not greater. So what lies beyond a commit stays there until training has come that far again.

Where the run directory is not local, the files are uploaded with metrics.jsonl, before each commit and at the end.
"""

from __future__ import annotations

import io
import json
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from operator import itemgetter
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
CHECKED_BYTES = 1 << 16
"""Longest event whose checksum is looked at: TensorBoard's code for it takes a second for some megabytes."""
TURN_BYTES = 1 << 24
"""Size from which a file that is uploaded is closed, and the next one begun: a commit uploads no more than what is
new, and about this much."""
HEADER, FOOTER = 12, 4
"""Bytes around an event in a file: its length in 8 bytes with 4 of their checksum, and 4 of its own checksum."""
VERSION = "brain.Event:2"
"""Version of the format that each file begins with."""
PNG = b"\x89PNG\r\n\x1a\n"
"""What a PNG begins with; its width and height are the bytes from 16 to 24."""

Shown = tuple[str, int, float]
"""(kind, n, time) of a row that TensorBoard shows."""
Place = tuple[int, str, int, int]
"""Step of an event, and where it is: key, first byte, number of bytes."""


def require_trackers(config: TrackingConfig) -> None:
    """Raise ConfigError where a tracker that is asked for is not installed. Imports nothing."""
    if "tensorboard" in config.to and find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.to names tensorboard, whose package is not installed: pip install 'latentmill[tensorboard]', or "
            "leave it out of tracking.to"
        )


def installed(config: TrackingConfig) -> TrackingConfig:
    """The configuration without trackers that are not installed on this machine, about which a warning is logged: for
    verbs that add to a run whose configuration is what it is."""
    try:
        require_trackers(config)
    except ConfigError:
        log.warning(
            "the run's tracking.to names tensorboard, whose package is not installed here: its rows are in "
            "metrics.jsonl, from which the run takes them when it goes on; pip install 'latentmill[tensorboard]' shows "
            "them at once"
        )
        return replace(config, to=tuple(name for name in config.to if name != "tensorboard"))
    return config


class EventFiles:
    """The event files of a run, and the one to which this process writes. A failure costs the run one warning: its rows
    are in metrics.jsonl.

    folder: a local one, for this process's files where the run directory is not local. settings: the configuration
    without secrets, which is shown as a text. Raises ConfigError where tensorboard is not installed.
    """

    def __init__(self, run: Storage, folder: Path, settings: Mapping[str, Any]) -> None:
        self._run, self._settings = run, settings
        self._folder = folder
        self._key = ""  # of the file that is written now
        self._file: IO[bytes] | None = None
        self._records: Any = None
        self._here: dict[str, Path] = {}  # files that the run directory, elsewhere, does not have whole yet
        self._alerts: dict[str, tuple[int, str]] = {}  # n and text of the last alerts, by kind
        self._failed = self._warned = False

    def start(self, n: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin or go on at n. rows: those of metrics.jsonl up to n. From the step on at which they and the files first
        differ, n + 1 at the latest, TensorBoard is to drop what it has, and the rows and pictures are written anew."""

        def write() -> None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            shown, pictures = self._shown()
            wanted = Counter((row["kind"], row["n"], row["time"]) for row in rows if _is_shown(row))
            mark = min([n + 1, *(step for _, step, _ in (wanted - shown) + (shown - wanted))])
            self._close()
            self._open()
            self._add(time.time(), step=mark, session_log=SessionLog(status=SessionLog.START))
            for row in sorted(rows, key=itemgetter("n")):
                if row["n"] >= mark:
                    self._row(row)
                elif row["kind"] == "alert":
                    self._alert(row)
            for step, key, first, length in pictures:
                if mark <= step <= n:
                    self._write(self._run.get_range(key, first, length))
            if self._settings:
                self._add(time.time(), step=n, summary=_text("config", json.dumps(self._settings, indent=1)))

        self._guarded(write)

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl."""
        self._guarded(lambda: self._row(row))

    def image(self, n: int, name: str, png: bytes, caption: str) -> None:
        """Write a picture at n samples seen, with its caption as a text of the same name. One that is no PNG costs a
        warning."""

        def write() -> None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            width, height = struct.unpack(">II", png[16:24])
            picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
            summary = Summary(value=[Summary.Value(tag=f"images/{name}", image=picture)])
            if caption:
                summary.MergeFrom(_text(f"images/{name}", caption))
            self._add(time.time(), step=n, summary=summary)

        if not png.startswith(PNG) or len(png) < 24:
            log.warning(f"the picture {name} at {n:,} samples is damaged: TensorBoard does not get it")
            return
        self._guarded(write)

    def read(self) -> dict[str, bytes]:
        """The bytes of each file, by key, that `upload` is to bring into the run directory. A file that has become
        large is closed, and the next event begins another."""
        try:
            found = {key: path.read_bytes() for key, path in self._here.items()}
        except OSError as error:
            self._warn(f"{type(error).__name__}: {error}")
            return {}
        if len(found.get(self._key, b"")) > TURN_BYTES:
            self._guarded(self._close)
        return found

    def upload(self, files: Mapping[str, bytes]) -> None:
        """Bring what `read` has returned into the run directory. Where that fails, the next upload brings it all."""
        for key, data in files.items():
            try:
                self._run.put(key, data)
            except StorageError as error:
                self._warn(str(error))
                return
            if key != self._key:
                self._here.pop(key, None)

    def close(self) -> None:
        """Close the file."""
        self._guarded(self._close)

    # ----------------------------------------------------------------------------------------------------------------

    def _row(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if row["kind"] == "alert":
            summary = _text(f"alert/{row.get('alert')}", self._alert(row))
        else:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in drawn(row).items()]
            summary = Summary(value=values)
        if summary.value:
            self._add(row["time"], step=row["n"], summary=summary)

    def _alert(self, row: Mapping[str, Any]) -> str:
        """The text of an alert, below those of its kind at the same n: TensorBoard may show one text at a step."""
        kind, n, text = str(row.get("alert")), row["n"], str(row.get("text"))
        last, before = self._alerts.get(kind, (-1, ""))
        self._alerts[kind] = (n, f"{before}\n{text}" if last == n else text)
        return self._alerts[kind][1]

    def _add(self, at: float, **event: Any) -> None:
        """Write an event. at: its Unix time."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(wall_time=at, **event).SerializeToString())

    def _write(self, event: bytes) -> None:
        """Write an event and hand it to the operating system."""
        if self._file is None:
            self._open()
        assert self._file is not None
        self._records.write(event)
        self._file.flush()

    def _open(self) -> None:
        """Begin a file, whose name comes after those of all others, and which no other process has begun."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard import RecordWriter

        number = max((number for number, _ in self._files()), default=0)
        file: IO[bytes] | None = None
        while file is None:
            number += 1
            key = f"{FOLDER}events.out.tfevents.{number:06d}"
            local = self._run.local_path(key)
            path = local or self._folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            if local or self._run.put_if_absent(key, b""):
                with suppress(FileExistsError):
                    file = path.open("xb")
        if local is None:
            self._here[key] = path
        self._key, self._file, self._records = key, file, RecordWriter(file)
        self._records.write(Event(wall_time=time.time(), file_version=VERSION).SerializeToString())

    def _files(self) -> list[tuple[int, str]]:
        """(number, key) of the run's event files, in order."""
        keys = (info.key for info in self._run.list(FOLDER))
        return sorted((int(match[1]), key) for key in keys if (match := NAME.fullmatch(key.removeprefix(FOLDER))))

    def _shown(self) -> tuple[Counter[Shown], list[Place]]:
        """What TensorBoard shows of the run's files: how often each row, and where the pictures are."""
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        shown, pictures = Counter[Shown](), list[Place]()
        for _, key in self._files():
            path = self._run.local_path(key)
            with io.BytesIO(self._run.get(key)) if path is None else path.open("rb") as file:
                for first, data in records(file):
                    try:
                        event = Event.FromString(data)
                    except DecodeError:
                        break  # TensorBoard reads no further either
                    if event.session_log.status == SessionLog.START:
                        shown = Counter({row: times for row, times in shown.items() if row[1] < event.step})
                        pictures = [picture for picture in pictures if picture[0] < event.step]
                    elif event.summary.value:
                        kind = event.summary.value[0].tag.partition("/")[0]
                        if kind == "images":
                            pictures.append((event.step, key, first, len(data)))
                        elif kind != "config":
                            shown[kind, event.step, event.wall_time] += 1
        return shown, pictures

    def _close(self) -> None:
        file, self._file, self._key = self._file, None, ""
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


def records(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of each event in an event file, up to one that a killed process left unfinished or that does not
    fit its checksums, at which TensorBoard's Python loader ends, too."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    first = HEADER
    while len(header := file.read(HEADER)) == HEADER:
        length, checksum = struct.unpack("<QI", header)
        if checksum != masked_crc32c(header[:8]) or length > EVENT_BYTES:
            return
        data, footer = file.read(length), file.read(FOOTER)
        if len(data) < length or len(footer) < FOOTER:
            return
        if length <= CHECKED_BYTES and struct.unpack("<I", footer)[0] != masked_crc32c(data):
            return
        yield first, data
        first += length + FOOTER + HEADER


def _is_shown(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics.jsonl has anything that TensorBoard shows."""
    return row["kind"] == "alert" or bool(drawn(row))


def _text(tag: str, text: str) -> Any:
    """A summary with a text, which TensorBoard shows as it is."""
    from torch.utils.tensorboard.summary import text as summary

    return summary(tag, "\n".join(f"    {line}" for line in text.splitlines()))
