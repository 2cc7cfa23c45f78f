"""The manifest: a cache's contract, and the hashes and counts of every shard, which prove its content.

It is `manifest.json` and is written last: without it there is no dataset. Its bytes are canonical, so equal caches have
equal manifests; it holds no time, host name or absolute path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.data.format.contract import Contract, _build, canonical_json, contract_from_json
from pipeline.data.format.records import parse_npy
from pipeline.errors import DatasetError, DestinationExists, NotFound
from pipeline.storage.base import Storage

MANIFEST = "manifest.json"
UNCOND = "uncond.npy"
VERSIONS = "manifests"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class UnitEntry:
    """One input shard, and the counts of its accepted and rejected samples."""

    source: str
    """Its name, with as many of its folders as distinguish it from the others."""
    source_sha256: str
    """SHA-256 of its bytes."""
    source_bytes: int
    """Its size in bytes; 0 for a shard that `leave_out` of encode left out, of which nothing was read."""
    read: int
    """Number of samples in it."""
    accepted: int
    """Number of samples that were cached."""
    rejected: dict[str, int]
    """Number of rejected samples by reason; `filter:...` counts intact samples that a filter excluded. accepted and
    rejected add up to read."""

    @property
    def left_out(self) -> bool:
        """Whether it was left out: no tar is empty, so no shard that was read has 0 bytes."""
        return self.source_bytes == 0


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One cached tar."""

    name: str
    """Key of the tar, relative to the manifest."""
    unit: int
    """Index in the manifest's `units` of the input shard that it was made from."""
    size: tuple[int, int]
    """(width, height) in pixels of its crops, which are of one bucket."""
    samples: int
    """Number of records in it."""
    bytes: int
    """Size of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar."""
    index_sha256: str
    """SHA-256 of the index."""

    @property
    def index_name(self) -> str:
        """Key of its index, relative to the manifest."""
        return self.name.removesuffix(".tar") + ".index.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation by channel of the scaled posterior means, (C,) each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a finished cache."""

    contract: Contract
    units: tuple[UnitEntry, ...]
    shards: tuple[ShardEntry, ...]
    uncond_sha256: str
    """SHA-256 of uncond.npy, the encoded empty caption (L, D) float16."""
    statistics: Statistics
    sources: tuple[str, ...]
    """The source pattern of each encode that added shards; of an absolute path only the last component."""
    excluded: int = 0
    """Number of records that are never read: duplicates of records in other shards (listed in
    Manifest.excluded_name)."""
    excluded_sha256: str = ""
    """SHA-256 of that list; "" if there are no such records."""
    version: int = 1
    """Version of this dataset; each `encode` that appends input shards makes the next one."""
    format: int = FORMAT
    """Version of the stored layout."""

    @property
    def samples(self) -> int:
        """Number of records that are read: those of the shards minus the excluded ones."""
        return sum(shard.samples for shard in self.shards) - self.excluded

    @property
    def name(self) -> str:
        """Key of this version's own copy, which stays when the dataset grows."""
        return f"{VERSIONS}/{self.version:06d}.json"

    @property
    def excluded_name(self) -> str:
        """Key of the list of excluded records: int32 (N, 2) .npy of shard number and row, sorted."""
        return f"{VERSIONS}/{self.version:06d}.excluded.npy"

    @property
    def adopted(self) -> bool:
        """Whether `latentmill index` made it from existing tars: each tar is its own source, and its images are not
        known."""
        is_own_source = [self.units[shard.unit].source_sha256 == shard.sha256 for shard in self.shards]
        return bool(is_own_source) and all(is_own_source)

    @property
    def left_out(self) -> list[str]:
        """Names of the input shards that were left out."""
        return [unit.source for unit in self.units if unit.left_out]

    @property
    def rejected(self) -> dict[str, int]:
        """Number of rejected samples of all input shards, by reason."""
        total: dict[str, int] = {}
        for unit in self.units:
            for reason, count in unit.rejected.items():
                total[reason] = total.get(reason, 0) + count
        return total

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, which identifies the dataset."""
        return hashlib.sha256(manifest_bytes(self)).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Bytes


def manifest_bytes(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest."""
    return canonical_json(dataclasses.asdict(manifest))


def parse_manifest(data: bytes) -> Manifest:
    """Parse a manifest. Raises DatasetError when it is damaged or of a format that this version cannot read."""
    try:
        value = json.loads(data)
        if value.get("format") != FORMAT:
            hint = "encode the cache again" if value.get("format") in range(FORMAT) else "use a newer latentmill"
            raise DatasetError(f"its format is {value.get('format')}, this version reads {FORMAT}: {hint}")
        contract = contract_from_json(value["contract"])
        units = tuple(_build(UnitEntry, unit) for unit in value["units"])
        shards = tuple(_build(ShardEntry, {**shard, "size": tuple(shard["size"])}) for shard in value["shards"])
        statistics = Statistics(mean=tuple(value["statistics"]["mean"]), std=tuple(value["statistics"]["std"]))
        parts = {"contract": contract, "units": units, "shards": shards, "statistics": statistics}
        parts["sources"] = tuple(value["sources"])
        return _build(Manifest, {**value, **parts})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"it is damaged ({type(error).__name__}: {error}): encode the cache again") from None


def load_manifest(storage: Storage) -> Manifest:
    """The manifest of the cache at `storage`. Raises DatasetError, which says what to do, when it is missing or
    damaged."""
    try:
        data = storage.get(MANIFEST)
    except NotFound:
        has_objects = any(storage.list(""))
        hint = (
            "its encode was not finished: run the same `latentmill encode` again"
            if has_objects
            else "nothing is there: encode it first, or correct the path"
        )
        raise DatasetError(f"{storage.url} holds no {MANIFEST}, so it is not a dataset; {hint}") from None
    try:
        return parse_manifest(data)
    except DatasetError as error:
        raise DatasetError(f"{storage.url}/{MANIFEST} cannot be read: {error}") from None


def find_version(storage: Storage, digest: str) -> Manifest | None:
    """The version with this digest of the dataset at `storage`, or None. So a run can still read the version that it
    began with after the dataset has grown."""
    for info in reversed(storage.list(f"{VERSIONS}/")):
        if info.key.endswith(".json"):
            data = storage.get(info.key)
            if hashlib.sha256(data).hexdigest() == digest:
                return parse_manifest(data)
    return None


def commit_manifest(storage: Storage, manifest: Manifest) -> bool:
    """Publish the manifest; False if an identical one is already there.

    The version's own copy is written first, then manifest.json, which may replace only the previous version. Raises
    DestinationExists if another dataset is there.
    """
    data = manifest_bytes(manifest)
    conflict = DestinationExists(f"{storage.url} holds a finished cache with another {MANIFEST}: choose another dest")
    if not storage.put_if_absent(manifest.name, data) and storage.get(manifest.name) != data:
        raise DestinationExists(
            f"{storage.locate(manifest.name)} holds another version {manifest.version} than this run makes: if it is "
            "damaged, delete it and run this again; else choose another dest"
        )
    if storage.put_if_absent(MANIFEST, data):
        return True
    published = storage.get(MANIFEST)
    if published == data:
        return False
    if manifest.version == 1 or parse_manifest(published).version != manifest.version - 1:
        raise conflict
    storage.put(MANIFEST, data)
    return True


def load_excluded(storage: Storage, manifest: Manifest) -> np.ndarray:
    """(N, 2) int32: shard number and row of each record that is never read, sorted. Raises DatasetError."""
    if not manifest.excluded:
        return np.empty((0, 2), dtype=np.int32)
    try:
        data = storage.get(manifest.excluded_name)
    except NotFound:
        data = b""
    if hashlib.sha256(data).hexdigest() != manifest.excluded_sha256:
        raise DatasetError(
            f"{storage.locate(manifest.excluded_name)} is missing or not what the manifest promises: restore it, or "
            "delete the manifest and run `latentmill encode finalize=true` again"
        )
    return parse_npy(memoryview(data))
