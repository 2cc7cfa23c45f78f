"""latentmill index: makes a dataset of plain WebDataset tars of latents that were made elsewhere, in place.

Every tar is read once, as strictly as a source shard, and never changed. An index per tar, the encoded empty caption,
`contract.json` and the manifest are written beside them, so that the dataset is streamed, verified and trained on like
one of `encode`. Facts that tars do not state (encoders, scale and shift) come from the configuration; what it does not
say is recorded as unknown in the manifest. Nothing is written before everything has been checked.
"""

from __future__ import annotations

import collections
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pipeline import cli
from pipeline.config import IndexConfig
from pipeline.data.format.bounds import TAR_NAME
from pipeline.data.format.contract import Contract, canonical_json
from pipeline.data.format.manifest import (
    MANIFEST,
    UNCOND,
    VERSIONS,
    Manifest,
    ShardEntry,
    Statistics,
    UnitEntry,
    commit_manifest,
    index_name,
    load_manifest,
    manifest_bytes,
    newest_version,
)
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.reader import Reader
from pipeline.distributed.place import cores
from pipeline.errors import ConfigError, DatasetError, DestinationExists, ParseError, ShardCorrupt, SourceError
from pipeline.log import show
from pipeline.parsing.bounds import LONGEST_NAME
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from pipeline.storage.patterns import expand
from pipeline.storage.urls import open_storage, without_folders
from pipeline.tracking.progress import Progress
from preprocess.adopting.conversion import convert
from preprocess.adopting.foreign import UNKNOWN, Facts, empty_caption, facts_of
from preprocess.adopting.scan import Scan, scan
from preprocess.adopting.summary import refuse_rejects, summary
from preprocess.encoding.plan import PLAN, Part, plan_bytes, read_plan
from preprocess.encoding.writer import Moments

OWN_FILES = f"{PLAN}, {MANIFEST}, {VERSIONS}/, all *.index.json and a {UNCOND} that it made"
"""What `latentmill index` writes."""
LARGEST_INDEX = 1 << 28
"""Bytes of an index that is there already and is looked at."""


def main(config: IndexConfig) -> int:
    """Runs the verb. Raises an error before anything is written if anything is wrong."""
    if config.dest:
        return convert(config)
    storage = open_storage(config.dataset)
    names = tar_names(storage, config)
    refuse_foreign(storage, names)
    facts = facts_of(storage, names, config)
    refuse_other(storage, facts.contract, names, config)
    uncond = empty_caption(storage, facts)
    scans = scan_all(storage, names, facts, config)
    manifest, files = manifest_of(scans, facts, uncond, config)
    if facts.made:
        manifest = restored(storage, manifest)
    else:
        plan = plan_bytes(facts.contract, Part(without_folders(config.source), tuple(names)), facts.format)
        files = {**({UNCOND: uncond} if uncond else {}), PLAN: plan, **files}
    require_identical(storage, {**files, manifest.name: manifest_bytes(manifest)})
    for key, data in files.items():
        put_identical(storage, key, data)
    prove_reading(storage, manifest, scans)
    commit_manifest(storage, manifest)
    show(summary(config.dataset, manifest, min(result.lowest for result in scans)))
    return 0


def tar_names(storage: Storage, config: IndexConfig) -> list[str]:
    """Keys of the tars relative to the dataset, sorted. Raises ConfigError for one outside the dataset, or whose name a
    manifest cannot hold."""
    names, root = [], _absolute(storage.url)
    for place, key in expand(config.source):
        url = _absolute(place.locate(key))
        if not url.startswith(f"{root}/"):
            raise ConfigError(f"source={config.source}: {url} does not lie below dataset={config.dataset}")
        if not url.endswith(".tar"):
            raise ConfigError(f"source={config.source}: {url} is not named .tar; name only the tars of latents")
        name = url[len(root) + 1 :]
        if not TAR_NAME.fullmatch(name) or len(name) > LONGEST_NAME:
            raise ConfigError(f"source={config.source}: {name!r} holds control characters or is too long: rename it")
        names.append(name)
    return sorted(names)


def _absolute(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(Path(url).expanduser().resolve())


def refuse_foreign(storage: Storage, names: list[str]) -> None:
    """Raises DestinationExists when a file that would be written is there already and is none of a dataset's, before
    any tar is read."""
    sizes = {info.key: info.size for info in storage.list("")}
    for name in names:
        key = index_name(name)
        if key in sizes and not _is_index(storage, key, sizes[key]):
            raise DestinationExists(
                f"{storage.locate(key)} is there, and is no index of a tar: move it, for `latentmill index` writes one "
                "under this name"
            )
    if MANIFEST not in sizes:
        return
    try:
        adopted = load_manifest(storage).adopted
    except DatasetError as error:
        raise DestinationExists(
            f"{error}. `latentmill index` does not write over it: move it away, and index again"
        ) from None
    if not adopted:
        raise DestinationExists(f"{storage.locate(MANIFEST)} is there, and not of `latentmill index`: nothing to do")


def _is_index(storage: Storage, key: str, size: int) -> bool:
    """Whether an object looks like an index of ours."""
    if not 0 < size <= LARGEST_INDEX:
        return False
    try:
        facts = parse_json(storage.get(key))
    except ParseError:
        return False
    return type(facts) is dict and {"format", "samples", "bytes", "sha256", "records"} <= set(facts)


def refuse_other(storage: Storage, contract: Contract, names: list[str], config: IndexConfig) -> None:
    """Raises DestinationExists when the dataset exists and differs from what this run would make."""
    plan = read_plan(storage)
    if plan is None:
        return
    if plan.contract.converted:
        raise DestinationExists(
            f"{storage.url} was converted: to restore it, run the same `latentmill index dest=` again"
        )
    differences = plan.contract.differences(contract)
    advice = f"give the same, or delete {OWN_FILES} there and index it anew"
    if differences:
        raise DestinationExists(f"{storage.url} was indexed with other settings ({'; '.join(differences)}): {advice}")
    if plan.contract.device == UNKNOWN and plan.names != names:
        raise DestinationExists(
            f"{storage.url} was indexed from {len(plan.names)} tars ({plan.parts[0].source}) that are not the "
            f"{len(names)} of source={config.source}: {advice}"
        )


# --------------------------------------------------------------------------------------------------------------------
# The tars


def scan_all(storage: Storage, names: list[str], facts: Facts, config: IndexConfig) -> list[Scan]:
    """Reads all tars, several at a time. Raises SourceError, which names the first reject, when more records are
    unusable than max_rejects allows, and ShardCorrupt for a damaged tar."""
    scan_tar = partial(scan, storage, contract=facts.contract, layout=facts.layout, limits=config.limits)
    scans = list[Scan]()
    pool = ThreadPoolExecutor(cores())
    try:
        with Progress(len(names), "index", "tars") as progress:
            for result in pool.map(scan_tar, names):
                scans.append(result)
                if result.problem and not config.max_rejects:
                    raise SourceError(f"{result.problem}. Mend it, or leave such records out with max_rejects=")
                progress.update(1)
    finally:
        pool.shutdown(cancel_futures=True)
    rejected = sum((result.rejected for result in scans), collections.Counter[str]())
    problem = next((result.problem for result in scans if result.problem), "")
    refuse_rejects(rejected, sum(len(result.rows) for result in scans), problem, config)
    return scans


def manifest_of(
    scans: list[Scan], facts: Facts, uncond: bytes, config: IndexConfig
) -> tuple[Manifest, dict[str, bytes]]:
    """Returns the manifest, in which every tar is its own source, and the indexes by key."""
    moments, units, shards, indexes = Moments(), list[UnitEntry](), list[ShardEntry](), dict[str, bytes]()
    for number, result in enumerate(scans):
        index = canonical_json(result.index(facts.layout))
        moments.merge(result.moments)
        units.append(
            UnitEntry(
                source=result.name,
                source_sha256=result.sha256,
                source_bytes=result.bytes,
                read=len(result.rows) + result.rejected.total(),
                accepted=len(result.rows),
                rejected=dict(result.rejected),
            )
        )
        entry = ShardEntry(
            name=result.name,
            unit=number,
            size=result.size if result.rows else facts.contract.buckets[0],
            samples=len(result.rows),
            bytes=result.bytes,
            sha256=result.sha256,
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        shards.append(entry)
        indexes[entry.index_name] = index
    manifest = Manifest(
        contract=facts.contract,
        units=tuple(units),
        shards=tuple(shards),
        uncond_sha256=hashlib.sha256(uncond).hexdigest() if uncond else "",
        statistics=Statistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist())),
        sources=(without_folders(config.source),),
        format=facts.format,
    )
    return manifest, indexes


# --------------------------------------------------------------------------------------------------------------------
# Writing


def restored(storage: Storage, manifest: Manifest) -> Manifest:
    """The manifest that `encode` wrote, if its copy under manifests/ still exists, or else `manifest`.

    Raises DatasetError when the tars differ from those of the copy.
    """
    former = newest_version(storage)
    if former is None:
        return manifest
    former_hashes = {entry.name: (entry.sha256, entry.index_sha256) for entry in former.shards}
    current_hashes = {entry.name: (entry.sha256, entry.index_sha256) for entry in manifest.shards}
    if former_hashes != current_hashes:
        name = min(
            name
            for name in former_hashes.keys() | current_hashes.keys()
            if former_hashes.get(name) != current_hashes.get(name)
        )
        raise DatasetError(
            f"{storage.locate(name)} is not what {former.name} says: restore it, give source= all tars and no others, "
            "or run the `latentmill encode` of this dataset again"
        )
    return former


def require_identical(storage: Storage, files: dict[str, bytes]) -> None:
    """Raises DestinationExists when one of the files exists with other bytes. Nothing has been written by then."""
    stored = {info.key: info.size for info in storage.list("")}
    for key, data in files.items():
        if key in stored and (stored[key] != len(data) or storage.get(key) != data):
            raise _other_bytes(storage, key)


def put_identical(storage: Storage, key: str, data: bytes) -> None:
    """Writes an object unless it exists. Raises DestinationExists when it exists with other bytes."""
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        raise _other_bytes(storage, key)


def _other_bytes(storage: Storage, key: str) -> DestinationExists:
    return DestinationExists(
        f"{storage.locate(key)} is there, and not what these tars and settings give: if they changed, delete "
        f"{OWN_FILES} there and index anew"
    )


def prove_reading(storage: Storage, manifest: Manifest, scans: list[Scan]) -> None:
    """Reads a record as the trainer will and compares it with the scanned one. Raises DatasetError when they differ."""
    dataset = dataset_of(storage, manifest)
    entry, row = manifest.shards[dataset[0].shard], int(dataset.rows(0)[0])
    scanned = next(result for result in scans if result.name == entry.name).first
    if row or scanned is None:
        return
    try:
        record = Reader(dataset).read(0).record(0, list(scanned.members))
        same = record.key == scanned.key and record.meta["caption"] == scanned.meta["caption"]
        same = same and all((record.members[name] == array).all() for name, array in scanned.members.items())
    except (ShardCorrupt, KeyError):
        same = False
    if not same:
        raise DatasetError(
            f"{storage.locate(entry.name)}: the stream does not read record {scanned.key} as it was scanned: this "
            "version cannot read members of these names, so rename them"
        )


if __name__ == "__main__":
    raise SystemExit(cli.main(["index", *sys.argv[1:]]))
