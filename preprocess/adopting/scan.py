"""Reads adopted tars of latents strictly and once, and records the place and the hash of every record."""

from __future__ import annotations

import collections
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.config import LimitsConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.pixels import png_size
from pipeline.data.format.records import Record, split_key, unpack
from pipeline.data.reading.shards import image_of
from pipeline.errors import ShardCorrupt
from pipeline.storage.base import Storage
from preprocess.adopting.values import check_values
from preprocess.encoding.writer import INDEX_FORMAT, Moments, scaled_mean
from preprocess.proving.records import check_record
from preprocess.source.shard import SourceShard

RECORD_MEMBERS = 4
"""A record's bytes are bounded by this many of its largest members."""
PICKLES = ("pth", "pt", "pkl", "pickle", "pyd", "pyc")


@dataclass(frozen=True)
class ScannedRecord:
    """One record of a tar, or the reason of its rejection. files: the names of its files after the key."""

    key: str
    offset: int
    data: bytes
    files: tuple[str, ...]
    record: Record | None
    reason: str = ""
    detail: str = ""


class LatentShard(SourceShard):
    """A tar of latents: an input shard that also gives the offset and the bytes of its members, headers included."""

    def __init__(self, storage: Storage, key: str, limits: LimitsConfig) -> None:
        super().__init__(storage, key, limits)
        self._parts: list[bytes] = []

    def groups(self) -> Iterator[tuple[str, int, bytes, tuple[str, ...]]]:
        """Yields (key, offset, bytes, names of the files) of neighbouring files with the same key; files without a key
        come one by one with the key "". The bytes are b"" where they are more than RECORD_MEMBERS of the largest
        members. Raises ShardCorrupt."""
        key, start, parts, files, end = "", 0, list[bytes](), list[str](), 0
        most = RECORD_MEMBERS * self._limits.member_bytes
        for name, _ in self._members():
            stem, rest = split_key(name)
            file_key = stem if rest and stem.rpartition("/")[2] else ""
            if file_key != key or not file_key:
                if files:
                    yield key, start, b"".join(parts), tuple(files)
                key, start, parts, files = file_key, end, [], []
            if self.position - start > most:
                parts.clear()
            else:
                parts += self._parts
            files.append(rest if file_key else name)
            self._parts, end = [], self.position
        if files:
            yield key, start, b"".join(parts), tuple(files)

    def _read(self, size: int, what: str) -> bytes:
        data = super()._read(size, what)
        if what != "padding":  # the end of the archive, which may be long
            self._parts.append(data)
        return data


def read_records(
    shard: LatentShard, members: tuple[str, ...], layout: Mapping[str, str] | None
) -> Iterator[ScannedRecord]:
    """Yields the records of a tar in order, read as the trainer reads them, including those that it cannot read."""
    seen = set[str]()
    for key, offset, data, files in shard.groups():
        if not key:
            shard.passed_over += len(files)
            continue
        record, reason, detail = None, "", ""
        repeated = next((file for file, count in collections.Counter(files).items() if count > 1), "")
        missing = [file for file in wanted_files(members, layout) if file not in files]
        pickles = [file for file in files if file.rpartition(".")[2].lower() in PICKLES]
        if key in seen:
            reason, detail = "key_repeated", f"a record {key} stands in the tar before"
        elif repeated:
            reason, detail = "member_repeated", f"{key}.{repeated} is there twice"
        elif not data:
            reason, detail = "record_too_large", f"record {key} has more than {RECORD_MEMBERS} x limits.member_bytes"
        elif missing and pickles:
            reason, detail = "pickle", f"{key}.{pickles[0]} is a pickle, which is never opened: write arrays as .npy"
        elif missing:
            reason, detail = "member_missing", f"{key}.{missing[0]} is not there (it has {', '.join(files)})"
        else:
            try:
                record = unpack(data, members, layout=layout, captions="text" in members)
            except ShardCorrupt as error:
                record, reason, detail = None, "member_unreadable", f"record {key}: {error}"
        seen.add(key)
        yield ScannedRecord(key, offset, data, files, record, reason, detail)


def wanted_files(members: tuple[str, ...], layout: Mapping[str, str] | None) -> list[str]:
    """Names of the files that every record must have."""
    if layout is None:
        return [f"{name}.npy" for name in members]
    texts = [layout["caption"].partition(":")[0]] if "caption" in layout else []
    return [*(layout[name] for name in members), *texts]


@dataclass
class Scan:
    """The content of one tar. rows: [offset, size, SHA-256] of the accepted records. rejected: counts by reason.
    problem: the first reject in words. size: (width, height) of the crops in pixels. first: the first accepted
    record. lowest: the smallest value of all log-variances; infinite without any."""

    name: str
    bytes: int = 0
    sha256: str = ""
    rows: list[list[int | str]] = field(default_factory=list)
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    moments: Moments = field(default_factory=Moments)
    first: Record | None = None
    lowest: float = math.inf

    def index(self, layout: Mapping[str, str] | None) -> dict[str, object]:
        """The index of the tar, like ShardWriter's, with the layout if there is one."""
        facts: dict[str, object] = {"format": INDEX_FORMAT, "samples": len(self.rows), "bytes": self.bytes}
        facts |= {"sha256": self.sha256, "records": self.rows}
        return facts if layout is None else {**facts, "layout": dict(layout)}


def scan(
    storage: Storage, name: str, contract: Contract, layout: Mapping[str, str] | None, limits: LimitsConfig
) -> Scan:
    """Reads one tar completely. Raises ShardCorrupt and StorageError."""
    result = Scan(name)
    members = tuple(member.name for member in contract.members)
    with LatentShard(storage, name, limits) as shard:
        for scanned in read_records(shard, members, layout):
            record, reason, detail = scanned.record, scanned.reason, scanned.detail
            if record is not None:
                size = result.size if result.rows else crop_size(record, contract)
                try:
                    check_record(record, contract, size)
                    check_values(record, contract)
                    image = image_of(record, contract, size)
                except ShardCorrupt as error:
                    record, reason, detail = None, "member_mismatch", str(error)
                if record is not None and len(record.meta["caption"].encode()) > limits.caption_bytes:
                    record, reason = None, "caption_too_long"
                    detail = f"record {scanned.key}: its caption is longer than {limits.caption_bytes=}"
            if record is None:
                result.rejected[reason] += 1
                result.problem = result.problem or f"{storage.locate(name)}, byte {scanned.offset}: {detail}"
                continue
            result.size, result.first = size, result.first or record
            result.rows.append([scanned.offset, len(scanned.data), hashlib.sha256(scanned.data).hexdigest()])
            if contract.stored == "moments":
                logvar = record.members["moments"][contract.latent_shape[0] :]
                result.lowest = min(result.lowest, float(logvar.min()))
            result.moments.add(scaled_mean(image, contract))
        result.bytes, result.sha256 = shard.bytes, shard.sha256
    return result


def crop_size(record: Record, contract: Contract) -> tuple[int, int]:
    """(width, height) in pixels of the crop that a record's latents belong to; the contract's first size if it has no
    such bucket."""
    image = record.members[contract.stored]
    if contract.pixels == "png":
        return size if (size := png_size(image)) in contract.buckets else contract.buckets[0]
    shape = image.shape
    size = (shape[-1] * contract.downsampling, shape[-2] * contract.downsampling) if len(shape) == 3 else (0, 0)
    return size if size in contract.buckets else contract.buckets[0]
