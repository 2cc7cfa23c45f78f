"""The tars: each is made as a whole from its own images, published, and then reported, so that a run goes on where the
last one ended."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pipeline.config.values.bounds import Ge
from pipeline.data.format.contract import canonical_json
from pipeline.errors import NotFound, ParseError, RecordRejected
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage, local_errors
from preprocess.converting.rejects import Rejects
from preprocess.converting.samples import Samples
from preprocess.source.rejected import Rejected

Count = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class _Rejects:
    counts: dict[str, Count]
    listed: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Report:
    """What was made of the images of one tar. plan: by which it was made. name: of the tar; bytes: its size, 0 where no
    image was kept and there is no tar. boxes, captions: in all samples; without_boxes, without_captions: samples that
    have none. largest: the largest label, -1 without label maps."""

    plan: str
    name: str
    read: Count
    images: Count
    boxes: Count
    captions: Count
    without_boxes: Count
    without_captions: Count
    largest: Annotated[int, Ge(-1)]
    bytes: Count
    sha256: str
    rejected: _Rejects

    @property
    def rejects(self) -> Rejects:
        """Its rejected images."""
        return Rejects(self.rejected.counts, [Rejected(*one) for one in self.rejected.listed])


def tar_name(number: int) -> str:
    """Key of a tar."""
    return f"{number:05d}.tar"


def report_name(number: int) -> str:
    """Key of the report of a tar."""
    return f"convert/{number:05d}.json"


def finished(storage: Storage, number: int, plan: str) -> Report | None:
    """The report of a tar that this plan has made, and that is still there with its size; None otherwise."""
    try:
        report = build(Report, parse_json(storage.get(report_name(number))))
        same = report.plan == plan and report.name == tar_name(number)
        whole = not report.bytes or storage.stat(report.name).size == report.bytes
    except (NotFound, ParseError):
        return None
    return report if same and whole else None


def make(storage: Storage, number: int, plan: str, images: range, samples: Samples) -> Report:
    """Makes and publishes one tar and then its report. images: numbers of its images.
    Raises StorageError."""
    rejects, boxes, captions, without_boxes, without_captions, largest = Rejects(), 0, 0, 0, 0, -1
    kept, path = 0, storage.staging_path()
    try:
        with _growing(path) as (add, facts):
            for image in images:
                try:
                    sample = samples.sample(image)
                except RecordRejected as rejection:
                    rejects.catch(samples.file(image), rejection)
                else:
                    for name, data in sample.members:
                        add(name, data)
                    kept += 1
                    boxes, captions = boxes + sample.boxes, captions + sample.captions
                    without_boxes += not sample.boxes
                    without_captions += not sample.captions
                    largest = max(largest, sample.largest)
        if kept:
            storage.put_file(tar_name(number), path)
    finally:
        path.unlink(missing_ok=True)
    report = {
        "plan": plan,
        "name": tar_name(number),
        "read": len(images),
        "images": kept,
        "boxes": boxes,
        "captions": captions,
        "without_boxes": without_boxes,
        "without_captions": without_captions,
        "largest": largest,
        "bytes": facts.bytes if kept else 0,
        "sha256": facts.digest.hexdigest() if kept else "",
        "rejected": rejects.to_json(),
    }
    storage.put(report_name(number), canonical_json(report))
    return build(Report, report)


class _Hashed:
    """A file that is written forwards, with the SHA-256 and the number of its bytes."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes


@contextmanager
def _growing(path: Path) -> Iterator[tuple[Callable[[str, bytes], None], _Hashed]]:
    """A function that appends a file to the tar at `path`, and what is known of it after the end. Names that ustar
    cannot hold have pax headers; nothing depends on the machine or the time."""
    with local_errors("write", path), path.open("xb") as file:
        hashed = _Hashed(file)
        out: Any = hashed
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:

            def add(name: str, data: bytes) -> None:
                member = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 0644
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

            yield add, hashed
