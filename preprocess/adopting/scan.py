"""Reading tars of latents that others wrote: strictly, once, into where each record lies and what it hashes to."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.config import LimitsConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.records import Record, split_key, unpack
from pipeline.errors import ShardCorrupt
from pipeline.storage.base import Storage
from preprocess.encoding.writer import INDEX_FORMAT, Moments
from preprocess.proving.records import check_record
from preprocess.source.shard import SourceShard

PICKLES = ("pth", "pt", "pkl", "pickle", "pyd", "pyc")


@dataclass(frozen=True)
class Found:
    """One record of a tar, or what is wrong with it. files: names of its files, as after the key."""

    key: str
    offset: int
    data: bytes
    files: tuple[str, ...]
    record: Record | None
    reason: str = ""
    detail: str = ""


class LatentShard(SourceShard):
    """A tar of latents: an input shard whose members keep their place and bytes, headers with them."""

    def __init__(self, storage: Storage, key: str, limits: LimitsConfig) -> None:
        super().__init__(storage, key, limits)
        self._parts: list[bytes] = []

    def groups(self) -> Iterator[tuple[str, int, bytes, tuple[str, ...]]]:
        """(key, offset, bytes, names of the files) of neighbours with one key; "" for files that have none. Raises
        ShardCorrupt."""
        key, start, parts, files, end = "", 0, list[bytes](), list[str](), 0
        for name, _ in self._members():
            stem, rest = split_key(name)
            here = stem if rest and stem.rpartition("/")[2] else ""
            if here != key or not here:
                if files:
                    yield key, start, b"".join(parts), tuple(files)
                key, start, parts, files = here, end, [], []
            parts += self._parts
            files.append(rest if here else name)
            self._parts, end = [], self.position
        if files:
            yield key, start, b"".join(parts), tuple(files)

    def _read(self, size: int, what: str) -> bytes:
        data = super()._read(size, what)
        if what != "padding":  # of the archive's end, which may be long
            self._parts.append(data)
        return data


def read_records(shard: LatentShard, members: tuple[str, ...], layout: Mapping[str, str] | None) -> Iterator[Found]:
    """The records of a tar in order, as the trainer's reader reads them, those that it cannot with them."""
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
        elif missing and pickles:
            reason, detail = "pickle", f"{key}.{pickles[0]} is a pickle, which is never opened: write arrays as .npy"
        elif missing:
            reason, detail = "member_missing", f"{key}.{missing[0]} is not there (it has {', '.join(files)})"
        else:
            try:
                record = unpack(data, members, layout=layout)
                if not isinstance(record.meta, dict) or not isinstance(record.meta.get("caption"), str):
                    raise ShardCorrupt(f"record {key}: its caption is not text")
            except ShardCorrupt as error:
                record, reason, detail = None, "member_unreadable", f"record {key}: {error}"
        seen.add(key)
        yield Found(key, offset, data, files, record, reason, detail)


def wanted_files(members: tuple[str, ...], layout: Mapping[str, str] | None) -> list[str]:
    """Files that every record must have."""
    if layout is None:
        return [f"{name}.npy" for name in members]
    return [*(layout[name] for name in members), layout["caption"].partition(":")[0]]


@dataclass
class Scan:
    """What one tar holds. rows: [offset, size, SHA-256] of the records that are accepted. rejected: counts by reason;
    problem: the first of them, in words. size: (width, height) in pixels of their crops. first: the first record."""

    name: str
    bytes: int = 0
    sha256: str = ""
    rows: list[list[int | str]] = field(default_factory=list)
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    problem: str = ""
    size: tuple[int, int] = (0, 0)
    moments: Moments = field(default_factory=Moments)
    first: Record | None = None

    def index(self, layout: Mapping[str, str] | None) -> dict[str, object]:
        """Its index, as ShardWriter writes it, with the layout where there is one."""
        facts: dict[str, object] = {"format": INDEX_FORMAT, "samples": len(self.rows), "bytes": self.bytes}
        facts |= {"sha256": self.sha256, "records": self.rows}
        return facts if layout is None else {**facts, "layout": dict(layout)}


def scan(
    storage: Storage, name: str, contract: Contract, layout: Mapping[str, str] | None, limits: LimitsConfig
) -> Scan:
    """Reads one tar from its first byte to its last. Raises ShardCorrupt, StorageError."""
    found = Scan(name)
    members = tuple(member.name for member in contract.members)
    with LatentShard(storage, name, limits) as shard:
        for one in read_records(shard, members, layout):
            record, reason, detail = one.record, one.reason, one.detail
            if record is not None:
                size = found.size if found.rows else crop_size(record, contract)
                try:
                    check_record(record, contract, size)
                except ShardCorrupt as error:
                    record, reason, detail = None, "member_mismatch", str(error)
                if record is not None and len(record.meta["caption"].encode()) > limits.caption_bytes:
                    record, reason = None, "caption_too_long"
                    detail = f"record {one.key}: its caption is longer than {limits.caption_bytes=}"
            if record is None:
                found.rejected[reason] += 1
                found.problem = found.problem or f"{storage.locate(name)}, byte {one.offset}: {detail}"
                continue
            found.size, found.first = size, found.first or record
            found.rows.append([one.offset, len(one.data), hashlib.sha256(one.data).hexdigest()])
            mean = record.members["moments"][: contract.latent_shape[0]].astype(np.float64)
            found.moments.add((mean - contract.shift) * contract.scale)
        found.bytes, found.sha256 = shard.bytes, shard.sha256
    return found


def crop_size(record: Record, contract: Contract) -> tuple[int, int]:
    """(width, height) in pixels that a record's latents are of, when the contract has such crops; else its first."""
    shape = record.members["moments"].shape
    size = (shape[-1] * contract.downsampling, shape[-2] * contract.downsampling) if len(shape) == 3 else (0, 0)
    return size if size in contract.buckets else contract.buckets[0]
