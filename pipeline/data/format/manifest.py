"""The manifest: a cache's contract, and the hashes and counts of every shard, which prove its content.

It is `manifest.json` and is written last: without it there is no dataset. Its bytes are canonical, so equal caches have
equal manifests; it holds no time, host name or absolute path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pipeline.data.format.bounds import (
    MOST_BYTES,
    MOST_SAMPLES,
    MOST_UNITS,
    Bytes,
    Digest,
    MaybeDigest,
    Name,
    Pattern,
    Samples,
    Side,
    TarName,
)
from pipeline.data.format.contract import Contract, canonical_json
from pipeline.data.format.contract_json import contract_from_json, contract_to_json, format_of
from pipeline.data.format.objects import read_bounded
from pipeline.data.format.rows import Check, build_rows, counts, digests, pairs, require_dense, tar_names, texts, whole
from pipeline.errors import DatasetError, DestinationExists, NotFound, ParseError
from pipeline.parsing.bounds import Real, Whole
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage

MANIFEST = "manifest.json"
UNCOND = "uncond.npy"
VERSIONS = "manifests"
VERSION_NAME = re.compile(rf"{VERSIONS}/[0-9]{{6}}\.json")
FORMAT: Literal[3] = 3
READ = (2, FORMAT)
"""Formats that are read. A dataset keeps the format that it was begun in, whatever is appended to it."""
LARGEST = 1 << 29
"""Bytes of a manifest: a million shards take some 450 MB."""
SMALLEST_RECORD = 1024
"""Bytes of a record at the least: the header and a block of one member."""
Mean = Annotated[float, Real(-1e9, 1e9)]
Deviation = Annotated[float, Real(0, 1e9)]


@dataclass(frozen=True, kw_only=True)
class UnitEntry:
    """One input shard, and the counts of its accepted and rejected samples."""

    source: Name
    """Its name, with as many of its folders as distinguish it from the others."""
    source_sha256: Digest
    """SHA-256 of its bytes."""
    source_bytes: Bytes
    """Its size in bytes; 0 for a shard that `leave_out` of encode left out, of which nothing was read."""
    read: Samples
    """Number of samples in it."""
    accepted: Samples
    """Number of samples that were cached."""
    rejected: dict[str, Samples]
    """Number of rejected samples by reason; `filter:...` counts intact samples that a filter excluded. accepted and
    rejected add up to read."""

    @property
    def left_out(self) -> bool:
        """Whether it was left out: no tar is empty, so no shard that was read has 0 bytes."""
        return self.source_bytes == 0


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One cached tar."""

    VERB: ClassVar[str] = "encode"  # that wrote it, for messages
    name: TarName
    """Key of the tar, relative to the manifest."""
    unit: Annotated[int, Whole(0, MOST_UNITS)]
    """Index in the manifest's `units` of the input shard that it was made from."""
    size: tuple[Side, Side]
    """(width, height) in pixels of its crops, which are of one bucket."""
    samples: Samples
    """Number of records in it."""
    bytes: Bytes
    """Size of the tar in bytes."""
    sha256: Digest
    """SHA-256 of the tar."""
    index_sha256: Digest
    """SHA-256 of the index."""

    @property
    def index_name(self) -> str:
        """Key of its index, relative to the manifest."""
        return index_name(self.name)


def index_name(tar: str) -> str:
    """Key of the index of the tar of this key."""
    return tar.removesuffix(".tar") + ".index.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation by channel of the scaled latents (posterior means; of pixels in the range of -1 to
    1), (C,) each."""

    mean: tuple[Mean, ...]
    std: tuple[Deviation, ...]


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What a manifest holds besides its contract and its lists."""

    uncond_sha256: MaybeDigest
    """SHA-256 of uncond.npy, the encoded empty caption (L, D) float16; "" of a cache without captions."""
    statistics: Statistics
    sources: tuple[Pattern, ...]
    """The source pattern of each encode that added shards; of an absolute path only the last component."""
    excluded: Samples = 0
    """Number of records that are never read: duplicates of records in other shards (listed in
    Manifest.excluded_name)."""
    excluded_sha256: MaybeDigest = ""
    """SHA-256 of that list; "" if there are no such records."""
    version: Annotated[int, Whole(1, 999_999)] = 1
    """Version of this dataset; each `encode` that appends input shards makes the next one."""
    format: Literal[2, 3] = FORMAT
    """Version of the stored layout; 2 of a dataset that was made before."""


@dataclass(frozen=True, kw_only=True)
class Manifest(_Facts):
    """The manifest of a finished cache."""

    contract: Contract
    units: tuple[UnitEntry, ...]
    shards: tuple[ShardEntry, ...]

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

    @property
    def own(self) -> Manifest:
        """The manifest of the cache alone; that of a cache with columns differs from it (data/joined/manifest.py)."""
        return self

    @property
    def columns(self) -> tuple[Any, ...]:
        """What is read as part of each record from elsewhere: Bound of data/joined/binding.py."""
        return ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, which identifies the dataset."""
        return hashlib.sha256(manifest_bytes(self)).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Bytes


def manifest_bytes(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest."""
    value = dataclasses.asdict(manifest)
    return canonical_json(value | {"contract": contract_to_json(manifest.contract, manifest.format)})


UNITS: dict[str, Check] = {
    "source": texts,
    "source_sha256": digests,
    "source_bytes": whole(0, MOST_BYTES),
    "read": whole(0, MOST_SAMPLES),
    "accepted": whole(0, MOST_SAMPLES),
    "rejected": counts,
}
SHARDS: dict[str, Check] = {
    "name": tar_names,
    "unit": whole(0, MOST_UNITS),
    "size": pairs,
    "samples": whole(0, MOST_SAMPLES),
    "bytes": whole(0, MOST_BYTES),
    "sha256": digests,
    "index_sha256": digests,
}


def parse_manifest(data: bytes) -> Manifest:
    """Parse a manifest. Raises DatasetError when it is damaged or of a format that this version cannot read."""
    try:
        require_dense(data)
        return _parse(parse_json(data, LARGEST))
    except ParseError as error:
        raise DatasetError(f"it is damaged ({error}): restore it from {VERSIONS}/, or encode the cache again") from None


def _parse(value: Any) -> Manifest:
    """The manifest of a parsed JSON text, whose parts fit each other. Raises ParseError, DatasetError."""
    if type(value) is not dict or type(value.get("format")) is not int:
        raise ParseError("it is no manifest of a dataset")
    if value["format"] not in READ:
        hint = "encode the cache again" if 0 <= value["format"] < FORMAT else "use a newer latentmill"
        raise DatasetError(f"its format is {value['format']}, this version reads {READ[0]} and {FORMAT}: {hint}")
    names = {field.name for field in dataclasses.fields(Manifest)}
    if wrong := sorted(names ^ set(value)):
        raise ParseError(f"it has missing or unknown fields: {', '.join(wrong[:5])}")
    contract = _within("contract", contract_from_json, value["contract"])
    if format_of(value["contract"]) != value["format"]:
        raise ParseError(f"contract: it is not of format {value['format']}")
    units = build_rows(UnitEntry, value["units"], UNITS, "units")
    shards = build_rows(ShardEntry, value["shards"], SHARDS, "shards")
    rest = {name: item for name, item in value.items() if name not in ("contract", "units", "shards")}
    facts = build(_Facts, rest)
    parts = {field.name: getattr(facts, field.name) for field in dataclasses.fields(_Facts)}
    manifest = Manifest(contract=contract, units=units, shards=shards, **parts)
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ParseError where parts of a manifest contradict each other."""
    channels, buckets = manifest.contract.latent_shape[0], set(manifest.contract.buckets)
    if not len(manifest.statistics.mean) == len(manifest.statistics.std) == channels:
        raise ParseError(f"statistics: {channels} means and deviations are wanted, as many as latents have channels")
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise ParseError("shards: two have one name")
    for number, shard in enumerate(manifest.shards):
        if shard.unit >= len(manifest.units):
            raise ParseError(f"shards[{number}].unit={shard.unit}: there are {len(manifest.units)} units")
        if shard.size not in buckets:
            raise ParseError(f"shards[{number}].size={shard.size}: the contract has no such size")
        if shard.samples * SMALLEST_RECORD > shard.bytes:
            raise ParseError(f"shards[{number}]: {shard.samples} records do not fit into {shard.bytes} bytes")
    if bool(manifest.uncond_sha256) != (manifest.contract.text is not None):
        raise ParseError("uncond_sha256: it is of the empty caption, which a dataset has where it has captions")
    if manifest.samples < 0 or bool(manifest.excluded) != bool(manifest.excluded_sha256):
        raise ParseError(f"excluded={manifest.excluded}: it fits neither the records nor excluded_sha256")


def _within(name: str, read: Any, value: Any) -> Any:
    """read(value). Raises ParseError, which begins with `name`."""
    try:
        return read(value)
    except ParseError as error:
        raise ParseError(f"{name}: {error}") from None


def load_manifest(storage: Storage) -> Manifest:
    """The manifest of the cache at `storage`. Raises DatasetError, which says what to do, when it is missing or
    damaged."""
    try:
        data = read_bounded(storage, MANIFEST, LARGEST)
    except NotFound:
        has_objects = any(storage.list(""))
        hint = (
            "its encode was not finished: run the same `latentmill encode` again"
            if has_objects
            else "nothing is there: encode it first, or correct the path"
        )
        raise DatasetError(f"{storage.url} holds no {MANIFEST}, so it is not a dataset; {hint}") from None
    return _named(storage, MANIFEST, data)


def find_version(storage: Storage, digest: str) -> Manifest | None:
    """The version with this digest of the dataset at `storage`, or None. So a run can still read the version that it
    began with after the dataset has grown."""
    for info in reversed(storage.list(f"{VERSIONS}/")):
        if VERSION_NAME.fullmatch(info.key) and info.size <= LARGEST:
            data = storage.get(info.key)
            if hashlib.sha256(data).hexdigest() == digest:
                return _named(storage, info.key, data)
    return None


def newest_version(storage: Storage) -> Manifest | None:
    """The newest version of the dataset at `storage` by the copies under manifests/, or None where there is none.
    Raises DatasetError."""
    keys = [info.key for info in storage.list(f"{VERSIONS}/") if VERSION_NAME.fullmatch(info.key)]
    return _named(storage, keys[-1], read_bounded(storage, keys[-1], LARGEST)) if keys else None


def _named(storage: Storage, key: str, data: bytes) -> Manifest:
    """The manifest of an object's bytes. Raises DatasetError, which names the object."""
    try:
        return parse_manifest(data)
    except DatasetError as error:
        raise DatasetError(f"{storage.locate(key)} cannot be read: {error}") from None


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
    if manifest.version == 1 or _named(storage, MANIFEST, published).version != manifest.version - 1:
        raise conflict
    storage.put(MANIFEST, data)
    return True
