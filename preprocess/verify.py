"""latentmill verify: proves a cache, or says what is wrong with it.

Every byte is hashed and every record read: hashes and counts against the manifest, shapes, types and finiteness against
the contract, statistics anew. Then a few records are taken back to their source: captions must be the source's, text
states and moments those that the contract's encoders give again, and the decoded latents must look like the images.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pipeline import cli
from pipeline.config import VerifyConfig
from pipeline.data.manifest import UNCOND, Contract, Manifest, Member, ShardEntry, load_excluded, load_manifest
from pipeline.data.records import Record, find_records, parse_npy
from pipeline.data.shards import fetch_shard, require_shards
from pipeline.errors import DataError, LatentmillError, NotFound, ShardCorrupt
from pipeline.launch import cores
from pipeline.progress import Progress
from pipeline.storage import Storage, open_storage
from preprocess.findings import Findings
from preprocess.sample import LOWRES_FACTOR
from preprocess.verify_page import Pair, write_page
from preprocess.verify_source import check_sources
from preprocess.writer import Moments

SHORTEST = 2  # tokens of a caption: start and end


def main(config: VerifyConfig) -> int:
    """The verb. Raises DataError when anything is wrong."""
    storage = open_storage(config.dataset)
    manifest = load_manifest(storage)
    require_shards(storage, manifest)
    findings = Findings()
    check_shards(storage, manifest, findings)
    check_uncond(storage, manifest, findings)
    check_excluded(storage, manifest, findings)
    pairs = list[Pair]()
    if findings.problems:
        findings.add("source", "not compared: the cache itself is damaged")
    elif manifest.adopted and not config.source:
        findings.add("source", "not compared: it was indexed from latents whose images are not known")
    elif config.samples:
        pairs = check_sources(storage, manifest, config, findings)
    width = max(len(name) for name, _ in findings.checks)
    print(f"dataset {config.dataset}, digest {manifest.digest}")
    for name, result in findings.checks:
        print(f"  {name:<{width}}  {result}")
    if config.report:
        write_page(config.report, config.dataset, manifest, findings.checks, pairs)
    if findings.problems:
        for problem in findings.problems[:20]:
            print(f"verify: {problem}", file=sys.stderr)
        raise DataError(
            f"{config.dataset} is not what its manifest promises: {len(findings.problems)} problems, the first: "
            f"{findings.problems[0]}. Delete what is named and the manifest, and run the same `latentmill encode` again"
        )
    if findings.poor:
        raise DataError(
            f"{config.dataset} is what its manifest promises, but its encoders do not reconstruct these images: "
            f"{findings.poor}. Look at the pairs (report=page.html); encode with others, or accept it with min_psnr="
        )
    return 0


# --------------------------------------------------------------------------------------------------------------------
# The cache by itself


@dataclass
class ShardFindings:
    """What one shard was found to hold. rows: the numbers in its records' keys."""

    moments: Moments = field(default_factory=Moments)
    rows: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_shards(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """Hashes, counts, contents and statistics of every shard."""
    moments, problems = Moments(), list[str]()
    rows: dict[int, list[int]] = collections.defaultdict(list)
    with (
        ThreadPoolExecutor(cores()) as pool,
        Progress(len(manifest.shards), "verify", "shards") as progress,
    ):
        pending: collections.deque[Future[ShardFindings]] = collections.deque()
        for number, entry in enumerate(manifest.shards):
            pending.append(pool.submit(check_shard, storage, manifest.contract, entry, manifest.adopted))
            while len(pending) > cores() or (pending and number == len(manifest.shards) - 1):
                found = pending.popleft().result()
                moments.merge(found.moments)
                problems += found.problems
                rows[manifest.shards[number - len(pending)].unit] += found.rows
                progress.update(1)
    size = sum(entry.bytes for entry in manifest.shards)
    findings.add("shards", f"{len(manifest.shards)} tars and indexes, {size:,} bytes: every hash right", *problems)
    if not problems:
        problems = check_counts(manifest, rows)
    read = sum(unit.read for unit in manifest.units)
    counted = f"{sum(len(found) for found in rows.values()):,} records = {read:,} read - "
    counted += f"{sum(manifest.rejected.values()):,} rejected"
    counted += ", each also flipped" if manifest.contract.flip else ""
    findings.add("counts", counted, *problems)
    if problems:
        return
    mean, std = np.array(manifest.statistics.mean), np.array(manifest.statistics.std)
    off = not (np.allclose(moments.mean, mean, atol=1e-6) and np.allclose(moments.std, std, atol=1e-6))
    told = ", ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(moments.mean, moments.std, strict=True))
    wrong = f"latents have mean ± std {told} by channel, the manifest says {mean.round(3)} ± {std.round(3)}"
    findings.add("latents", f"mean ± std by channel {told}", *([wrong] if off else []))


def check_counts(manifest: Manifest, rows: dict[int, list[int]]) -> list[str]:
    """What is wrong with the counts: accepted + rejected = read, and a record for each sample accepted, of each unit.

    rows: numbers in the keys of each unit's records.
    """
    problems = []
    variants = 2 if manifest.contract.flip and not manifest.adopted else 1
    for number, unit in enumerate(manifest.units):
        if unit.accepted + sum(unit.rejected.values()) != unit.read:
            rejected = sum(unit.rejected.values())
            problems.append(f"{unit.source}: {unit.read} read is not {unit.accepted} accepted + {rejected} rejected")
        if sorted(rows[number]) != list(range(unit.accepted * variants)):
            problems.append(f"{unit.source}: its {unit.accepted} samples accepted have {len(rows[number])} records")
    return problems


def check_shard(storage: Storage, contract: Contract, entry: ShardEntry, adopted: bool) -> ShardFindings:
    """Reads one shard whole. adopted: others wrote it, so that keys are any, and not all of it need be records."""
    findings = ShardFindings()
    names = [member.name for member in contract.members] if adopted else None
    try:
        shard = fetch_shard(storage, entry)
        places = [(record[0], record[1]) for record in shard.records]
        found = [("", *place) for place in places] if adopted else list(find_records(shard.view))
        if [(offset, size) for _, offset, size in found] != places:
            raise ShardCorrupt("its index places records elsewhere than they are")
        if len(found) != entry.samples:
            raise ShardCorrupt(f"it holds {len(found)} records, the manifest says {entry.samples}")
        for row, (key, offset, size) in enumerate(found):
            data = shard.view[offset : offset + size]
            unit, _, number = (key or f"{entry.unit:06d}_{row}").partition("_")
            if hashlib.sha256(data).hexdigest() != shard.records[row][2] or unit != f"{entry.unit:06d}":
                raise ShardCorrupt(f"record {key} in row {row} is not what its index says")
            findings.rows.append(int(number))
            record = shard.record(row, names)
            check_record(record, contract, entry.size)
            mean = record.members["moments"][: contract.latent_shape[0]].astype(np.float64)
            findings.moments.add((mean - contract.shift) * contract.scale)
    except (LatentmillError, ValueError) as error:
        findings.problems.append(f"{storage.url}/{entry.name}: {error}")
    return findings


def check_record(record: Record, contract: Contract, size: tuple[int, int]) -> None:
    """Raises ShardCorrupt unless the record's members are those of the contract for a crop of `size`, and finite."""
    for member in contract.members:
        array = record.members.get(member.name)
        shape = member_shape(member, contract, size, array)
        if array is None or array.shape != shape or array.dtype.name != member.dtype:
            raise ShardCorrupt(f"record {record.key}: {member.name} is not {member.dtype} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ShardCorrupt(f"record {record.key}: {member.name} holds NaN or infinity")
    if len(record.members) != len(contract.members):
        raise ShardCorrupt(f"record {record.key} has members that the contract does not name")
    if not isinstance(record.meta.get("caption"), str) or not record.meta["caption"]:
        raise ShardCorrupt(f"record {record.key} has no caption")


def member_shape(
    member: Member, contract: Contract, size: tuple[int, int], found: np.ndarray | None
) -> tuple[int, ...]:
    """A member's shape in a record whose crop is `size` (width, height); a trimmed text may have any length that the
    context allows."""
    if -1 not in member.shape:
        return member.shape
    if member.name == "text":
        tokens = len(found) if found is not None and found.ndim else 0
        return (tokens if SHORTEST <= tokens <= contract.text.length else contract.text.length, *member.shape[1:])
    factor = {"moments": contract.downsampling, "cond.masked": contract.downsampling, "cond.lowres": LOWRES_FACTOR}
    pixels = factor.get(member.name, 1)
    return (*member.shape[:-2], size[1] // pixels, size[0] // pixels)


def check_uncond(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """The encoded empty caption."""
    try:
        data = storage.get(UNCOND)
        wanted = (manifest.contract.text.length, manifest.contract.text.width)
        right = (
            hashlib.sha256(data).hexdigest() == manifest.uncond_sha256 and parse_npy(memoryview(data)).shape == wanted
        )
    except (NotFound, ShardCorrupt):
        right = False
    wrong = f"{storage.url}/{UNCOND} is missing or not what the manifest promises"
    findings.add("empty caption", "hash right", *([] if right else [wrong]))


def check_excluded(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """The list of records that are never read."""
    if not manifest.excluded:
        return
    problems = []
    try:
        pairs = load_excluded(storage, manifest)
        sizes = np.array([entry.samples for entry in manifest.shards])
        ordered = all(tuple(a) < tuple(b) for a, b in itertools.pairwise(pairs.tolist()))
        if len(pairs) != manifest.excluded or not ordered or (pairs < 0).any() or (pairs[:, 0] >= len(sizes)).any():
            problems.append(f"{storage.locate(manifest.excluded_name)} is not {manifest.excluded} records in order")
        elif (pairs[:, 1] >= sizes[pairs[:, 0]]).any():
            problems.append(f"{storage.locate(manifest.excluded_name)} names records that are not there")
    except LatentmillError as error:
        problems.append(str(error))
    findings.add("excluded", f"{manifest.excluded:,} records repeated in other shards", *problems)


if __name__ == "__main__":
    raise SystemExit(cli.main(["verify", *sys.argv[1:]]))
