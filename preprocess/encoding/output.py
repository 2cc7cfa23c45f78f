"""The published files of a unit: tars and indexes per dataset and bucket, and the report that marks the unit as done.

The tars of a unit grow in temporary files. They are published when the unit is complete, and the report comes last.
"""

from __future__ import annotations

import collections
import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.format.contract import Contract, canonical_json
from pipeline.errors import DestinationExists, NotFound, StorageError
from pipeline.storage.base import Storage
from preprocess.encoding.census import Census
from preprocess.encoding.encoder import Encoded
from preprocess.encoding.plan import Unit
from preprocess.encoding.rejects import rejects_key
from preprocess.encoding.writer import Moments, ShardWriter, scaled_mean
from preprocess.filters.excluded import Hashes
from preprocess.gathering.unit import SourceUnit
from preprocess.units.reports import REPORT_FORMAT, read_report


@dataclass(frozen=True)
class Destination:
    """One dataset that is being made. digest: SHA-256 of its contract. require: raises DestinationExists when units may
    not be published any more."""

    storage: Storage
    contract: Contract
    digest: str
    require: Callable[[], None] = lambda: None


@dataclass
class UnitFacts:
    """What the report says of an input shard that has been read completely.

    censuses, thumbnails: per dataset. digests: of each accepted sample, equal for duplicates; b"" when duplicates are
    kept. buckets: per dataset, the bucket of each accepted sample. cut_boxes: per dataset, boxes that samples have and
    their records lack. cut_captions: the same of captions.
    """

    unit: Unit
    shard: SourceUnit
    read: int = 0
    accepted: int = 0
    truncated: int = 0
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    censuses: list[Census] = field(default_factory=list)
    thumbnails: list[list[dict[str, str]]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    buckets: list[list[int]] = field(default_factory=list)
    cut_boxes: list[int] = field(default_factory=list)
    looks: list[list[bytes]] = field(default_factory=list)
    """Per dataset, the perceptual hash of each accepted sample, b"" when near-duplicates are kept."""
    profiles: collections.Counter[str] = field(default_factory=collections.Counter)
    """Accepted samples with a colour profile, by what became of it."""
    cut_captions: int = 0
    rejects: bytes = b""
    """The list of rejected samples as a file, b"" without any."""

    def hashes(self, dataset: int) -> bytes | None:
        """Bytes of the file that duplicates and near-duplicates are found by; None where all are kept."""
        parts = [b"".join(self.digests), b"".join(self.looks[dataset])]
        if not any(parts):
            return None
        digests, looks = (np.array(bytearray(part), dtype=np.uint8).reshape(self.accepted, -1) for part in parts)
        return Hashes(digests, looks, np.array(self.buckets[dataset], dtype=np.uint16)).to_npy()


class _Tar:
    """One tar that grows in a temporary file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = path.open("xb")
        self.writer = ShardWriter(self.file)


class UnitOutput:
    """The tars of one unit, used in the writer's thread: `add` batches, then `publish` or `discard`."""

    def __init__(self, destinations: list[Destination]) -> None:
        self.destinations = destinations
        self._tars: dict[tuple[int, int], _Tar] = {}  # by (dataset, bucket)
        self._finished: dict[tuple[int, int], tuple[dict[str, Any], bytes]] = {}
        self._moments = [Moments() for _ in destinations]
        self._retried = [0 for _ in destinations]

    def add(self, encoded: Encoded) -> None:
        """Appends a batch. Raises NonFinite and StorageError."""
        batch = encoded.batch
        contract, storage = self.destinations[batch.target].contract, self.destinations[batch.target].storage
        self._retried[batch.target] += encoded.retried
        with disk_errors(storage):
            place = batch.target, batch.bucket
            tar = self._tars.get(place)
            if tar is None:
                tar = self._tars[place] = _Tar(storage.staging_path())
            text = contract.text
            records = encoded.records(text.storage, text.captions) if text else encoded.records("none")
            for i, record in enumerate(records):
                tar.writer.add(record)
                self._moments[batch.target].add(scaled_mean(encoded.images[i], contract))

    def publish(self, facts: UnitFacts, variants: int) -> None:
        """Publishes each dataset's tars with their indexes, then its report. Raises StorageError, and DestinationExists
        when others have given the unit's number to another shard."""
        assert facts.accepted + facts.rejected.total() == facts.read, "every sample read is accepted or rejected"
        for number, destination in enumerate(self.destinations):
            report = self._finish(number, destination, facts, variants)
            key, data = facts.unit.report_name, canonical_json(report)
            destination.require()
            if destination.storage.exists(key) and _is_settled(destination.storage, facts.unit, data):
                continue  # another worker has published the same unit, or left it out
            for bucket, (shard, index) in self._shards(number).items():
                destination.storage.put_file(shard["name"], self._tars[number, bucket].path)
                destination.storage.put(shard["name"].removesuffix(".tar") + ".index.json", index)
            hashes = facts.hashes(number)
            if hashes is not None:
                destination.storage.put(facts.unit.hashes_name, hashes)
            if facts.rejects:
                destination.storage.put(rejects_key(facts.unit.number), facts.rejects)
            destination.storage.put(key, data)
        self.discard()

    def discard(self) -> None:
        """Removes the tars that were not published."""
        for tar in self._tars.values():
            with suppress(OSError):  # a full disk: what is in memory cannot be written, and need not be
                tar.file.close()
            with suppress(OSError):
                tar.path.unlink(missing_ok=True)

    def _finish(self, number: int, destination: Destination, facts: UnitFacts, variants: int) -> dict[str, Any]:
        """Ends the tars of one dataset and returns its report."""
        contract, unit = destination.contract, facts.unit
        members: collections.Counter[str] = collections.Counter()
        for (target, bucket), tar in sorted(self._tars.items()):
            if target != number:
                continue
            with disk_errors(destination.storage):
                facts_of_tar = tar.writer.finish()
                tar.file.close()
            index = canonical_json(facts_of_tar)
            size = contract.buckets[bucket]
            shard = {
                "name": unit.tar_name(size, len(contract.buckets)),
                "size": size,
                "index_sha256": hashlib.sha256(index).hexdigest(),
                **{name: facts_of_tar[name] for name in ("samples", "bytes", "sha256")},
            }
            self._finished[number, bucket] = shard, index
            members += tar.writer.member_bytes
        shards = [shard for shard, _ in self._shards(number).values()]
        assert sum(shard["samples"] for shard in shards) == facts.accepted * variants
        hashes = facts.hashes(number)
        cut = {"cut_boxes": facts.cut_boxes[number]} if contract.conditions.boxes is not None else {}
        if contract.text is not None and contract.text.captions > 1:
            cut["cut_captions"] = facts.cut_captions
        profiles = {"profiles": dict(facts.profiles)} if contract.colour == "srgb" else {}
        return (
            cut
            | profiles
            | {
                "format": REPORT_FORMAT,
                "unit": unit.number,
                "contract": destination.digest,
                "source": {"name": unit.name, "sha256": facts.shard.sha256, "bytes": facts.shard.bytes},
                "read": facts.read,
                "accepted": facts.accepted,
                "rejected": dict(facts.rejected),
                "passed_over": facts.shard.passed_over,
                "truncated": facts.truncated,
                "retried": self._retried[number],
                "shards": shards,
                "hashes_sha256": hashlib.sha256(hashes).hexdigest() if hashes is not None else "",
                "statistics": self._moments[number].to_json(),
                "census": facts.censuses[number].to_json(),
                "member_bytes": dict(members),
                "thumbnails": facts.thumbnails[number],
            }
        )

    def _shards(self, number: int) -> dict[int, tuple[dict[str, Any], bytes]]:
        """The report's entry and the index of each finished tar of a dataset, by bucket."""
        return {
            bucket: entry_and_index for (target, bucket), entry_and_index in self._finished.items() if target == number
        }


def _is_settled(storage: Storage, unit: Unit, data: bytes) -> bool:
    """Whether a unit has this report, or one that says that it is left out."""
    try:
        return storage.get(unit.report_name) == data or read_report(storage, unit.number, unit.name).left_out
    except (NotFound, DestinationExists):
        return False


@contextmanager
def disk_errors(storage: Storage) -> Iterator[None]:
    """Turns the error of a full or broken disk into a StorageError that says where and what to do. storage: for which a
    tar is being written: on its own disk, or on S3 in the folder for temporary files."""
    try:
        yield
    except OSError as error:
        is_local = storage.local_path("x") is not None
        place = storage.url if is_local else str(storage.staging_path().parent)
        hint = "mend it"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            other = "choose a dest" if is_local else "set TMPDIR to a folder"
            hint = f"free some space and run this again, or {other} on a disk that has it"
        raise StorageError(
            f"cannot write the tar that is being made in {place}: {error.strerror or error}; {hint}"
        ) from error
