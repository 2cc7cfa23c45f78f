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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline import cli
from pipeline.config import EncodeConfig, LimitsConfig, VerifyConfig
from pipeline.data.manifest import UNCOND, Contract, Manifest, ShardEntry, load_manifest
from pipeline.data.records import Record, find_records, parse_npy, record_key, unpack
from pipeline.data.stream import fetch_shard, require_shards
from pipeline.errors import DataError, LatentmillError, NotFound, RecordRejected, ShardCorrupt, SourceError
from pipeline.evaluation.pictures import to_uint8
from pipeline.evaluation.trained import load_encoders
from pipeline.launch import cores
from pipeline.models.autoencoder import FirstStage, sample_posterior
from pipeline.models.text import TextTower
from pipeline.progress import Progress
from pipeline.storage import Storage, expand, open_storage
from pipeline.training.distributed import pick_device
from preprocess.sample import Prepared, prepare
from preprocess.source import SourceShard
from preprocess.unit import to_unit_range
from preprocess.verify_page import Pair, write_page
from preprocess.writer import Moments

SHARDS_COMPARED = 8  # input shards that are read again, at most
ENCODED_TOGETHER = 64
STATE_TOLERANCE = 0.02  # of text states whose values are about 1; fp16 and other batches give 0.002
LATENT_TOLERANCE = 0.05  # root mean square of scaled latents, whose values are about 1


@dataclass
class Findings:
    """What was checked (name, result) and what is wrong."""

    checks: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, check: str, result: str, *problems: str) -> None:
        """One check's outcome."""
        self.checks.append((check, f"WRONG: {problems[0]}" if problems else result))
        self.problems += problems


def main(config: VerifyConfig) -> int:
    """The verb. Raises DataError when anything is wrong."""
    storage = open_storage(config.dataset)
    manifest = load_manifest(storage)
    require_shards(storage, manifest)
    findings = Findings()
    check_shards(storage, manifest, findings)
    check_uncond(storage, manifest, findings)
    pairs = list[Pair]()
    if findings.problems:
        findings.add("source", "not compared: the cache itself is damaged")
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
    return 0


# --------------------------------------------------------------------------------------------------------------------
# The cache by itself


def check_shards(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """Hashes, counts, contents and statistics of every shard."""
    moments, problems = Moments(), list[str]()
    with (
        ThreadPoolExecutor(cores()) as pool,
        Progress(len(manifest.shards), "verify", "shards") as progress,
    ):
        pending: collections.deque[Future[tuple[Moments, list[str]]]] = collections.deque()
        for number, entry in enumerate(manifest.shards):
            pending.append(pool.submit(check_shard, storage, manifest.contract, number, entry))
            while len(pending) > cores() or (pending and number == len(manifest.shards) - 1):
                found, bad = pending.popleft().result()
                moments.merge(found)
                problems += bad
                progress.update(1)
    read = sum(entry.read for entry in manifest.shards)
    rejected = sum(sum(entry.rejected.values()) for entry in manifest.shards)
    size = sum(entry.bytes for entry in manifest.shards)
    findings.add("shards", f"{len(manifest.shards)} tars and indexes, {size:,} bytes: every hash right", *problems)
    findings.add("counts", f"{manifest.samples:,} records = {read:,} read - {rejected:,} rejected")
    if problems:
        return
    mean, std = np.array(manifest.statistics.mean), np.array(manifest.statistics.std)
    off = not (np.allclose(moments.mean, mean, atol=1e-6) and np.allclose(moments.std, std, atol=1e-6))
    told = ", ".join(f"{m:+.3f} ± {s:.3f}" for m, s in zip(moments.mean, moments.std, strict=True))
    wrong = f"latents have mean ± std {told} by channel, the manifest says {mean.round(3)} ± {std.round(3)}"
    findings.add("latents", f"mean ± std by channel {told}", *([wrong] if off else []))


def check_shard(storage: Storage, contract: Contract, number: int, entry: ShardEntry) -> tuple[Moments, list[str]]:
    """Reads one shard whole: statistics of its scaled latents, and what is wrong with it."""
    moments, problems = Moments(), list[str]()
    where = f"{storage.url}/{entry.name}"
    if entry.accepted + sum(entry.rejected.values()) != entry.read or entry.accepted != entry.samples:
        problems.append(f"{where}: {entry.read} read is not {entry.accepted} accepted + {entry.rejected} rejected")
    try:
        shard = fetch_shard(storage, entry)
        found = list(find_records(shard.view))
        if [[offset, size] for _, offset, size in found] != [record[:2] for record in shard.records]:
            raise ShardCorrupt("its index places records elsewhere than they are")
        if len(found) != entry.samples:
            raise ShardCorrupt(f"it holds {len(found)} records, the manifest says {entry.samples}")
        for row, (key, offset, size) in enumerate(found):
            data = shard.view[offset : offset + size]
            if hashlib.sha256(data).hexdigest() != shard.records[row][2] or key != record_key(number, row):
                raise ShardCorrupt(f"record {key} in row {row} is not what its index says")
            record = unpack(data)
            check_record(record, contract)
            mean = record.members["moments"][: contract.latent_shape[0]].astype(np.float64)
            moments.add((mean - contract.shift) * contract.scale)
    except (LatentmillError, ValueError) as error:
        problems.append(f"{where}: {error}")
    return moments, problems


def check_record(record: Record, contract: Contract) -> None:
    """Raises ShardCorrupt unless the record's members are those of the contract, and finite."""
    for member in contract.members:
        array = record.members.get(member.name)
        if array is None or array.shape != member.shape or array.dtype.name != member.dtype:
            raise ShardCorrupt(f"record {record.key}: {member.name} is not {member.dtype} {member.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ShardCorrupt(f"record {record.key}: {member.name} holds NaN or infinity")
    if len(record.members) != len(contract.members):
        raise ShardCorrupt(f"record {record.key} has members that the contract does not name")
    if not isinstance(record.meta.get("caption"), str) or not record.meta["caption"]:
        raise ShardCorrupt(f"record {record.key} has no caption")


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


# --------------------------------------------------------------------------------------------------------------------
# The cache beside its source


def check_sources(storage: Storage, manifest: Manifest, config: VerifyConfig, findings: Findings) -> list[Pair]:
    """Takes config.samples records back to their source; pairs of image and decoded latent, worst first."""
    try:
        inputs = expand(config.source or manifest.source)
    except SourceError as error:
        if config.source:
            raise
        findings.add("source", f"not compared, for it is not here ({error}): give source=")
        return []
    if [key.rpartition("/")[2] for _, key in inputs] != [entry.source for entry in manifest.shards]:
        raise SourceError(
            f"{config.source or manifest.source} is not what {config.dataset} was made from: give source= the shards "
            f"{manifest.shards[0].source} to {manifest.shards[-1].source}"
        )
    device = pick_device("auto")
    first_stage, tower = load_encoders(manifest.contract, device)
    pairs, states, latents, problems = list[Pair](), 0.0, list[float](), list[str]()
    chosen = choose(manifest, config.samples)
    with Progress(sum(map(len, chosen.values())), "compare") as progress:
        for number, rows in chosen.items():
            found = _originals(storage, manifest, number, inputs[number], rows, tower, problems)
            while batch := list(itertools.islice(found, ENCODED_TOGETHER)):
                records, samples = [record for record, _ in batch], [sample for _, sample in batch]
                states = max(states, text_difference(tower, records, samples))
                latents += latent_differences(first_stage, records, samples)
                pairs += compare(first_stage, records, samples)
                progress.update(len(batch))
    psnr = np.array([pair.psnr for pair in pairs] or [np.nan])
    findings.add("source", f"{len(chosen)} input shards read again: hashes, keys, captions and crops right", *problems)
    wrong = f"text states differ by up to {states:.3g} from what the contract's text tower gives for their captions"
    findings.add("text", f"re-encoded within {states:.2g}", *([wrong] if states > STATE_TOLERANCE else []))
    worst = max(latents, default=0.0)
    wrong = f"latents differ by up to {worst:.3g} (rms) from what the contract's autoencoder gives for their images"
    findings.add("moments", f"re-encoded within {worst:.2g}", *([wrong] if worst > LATENT_TOLERANCE else []))
    told = f"{len(pairs)} decoded: PSNR median {np.median(psnr):.1f} dB, worst {psnr.min():.1f} dB"
    low = not np.median(psnr) >= config.min_psnr
    findings.add("pixels", told, *([f"{told}; min_psnr={config.min_psnr:g}"] if low else []))
    return sorted(pairs, key=lambda pair: pair.psnr)


def choose(manifest: Manifest, count: int) -> dict[int, list[int]]:
    """Shard number -> rows: about `count` records, evenly over at most SHARDS_COMPARED evenly spaced shards."""
    filled = [number for number, entry in enumerate(manifest.shards) if entry.samples]
    picked = [filled[i] for i in spread(len(filled), min(SHARDS_COMPARED, count))]
    each = -(-count // max(len(picked), 1))
    return {number: spread(manifest.shards[number].samples, each) for number in picked}


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices of a list, evenly, the first and last with them."""
    return sorted(set(np.linspace(0, length - 1, min(length, count)).round().astype(int).tolist()))


def _originals(
    storage: Storage,
    manifest: Manifest,
    number: int,
    place: tuple[Storage, str],
    rows: list[int],
    tower: TextTower,
    problems: list[str],
) -> Iterator[tuple[Record, Prepared]]:
    """Records of one shard, each with its source sample prepared anew; reads the input shard to its end."""
    entry, contract = manifest.shards[number], manifest.contract
    shard = fetch_shard(storage, entry)
    wanted = {record.meta["key"]: record for record in map(shard.record, rows)}
    source = SourceShard(*place, LimitsConfig())
    recipe = EncodeConfig(source="", dest="", resolution=contract.resolution, caption_key=contract.caption_key)
    for sample in source.samples():
        record = wanted.get(sample.key)
        if record is None or sample.problem:
            continue
        del wanted[sample.key]
        try:
            prepared = prepare(sample, recipe, tower.ids)
        except RecordRejected as rejection:
            problems.append(f"{entry.source}: sample {sample.key} cannot be read, yet is cached: {rejection}")
            continue
        if prepared.meta() != record.meta:
            problems.append(f"{storage.url}/{entry.name}: caption, size or crop of {record.key} is not its source's")
        yield record, prepared
    if wanted:
        problems.append(f"{entry.source} lacks {len(wanted)} samples that are cached, such as {next(iter(wanted))}")
    if source.sha256 != entry.source_sha256:
        problems.append(f"{place[0].locate(place[1])} is not the shard that was encoded: its SHA-256 differs")


def text_difference(tower: TextTower, records: list[Record], samples: list[Prepared]) -> float:
    """Largest difference between cached text states and those of the source's captions."""
    states = tower.encode(torch.tensor([sample.ids for sample in samples])).cpu().numpy()
    cached = np.stack([record.members["text"] for record in records]).astype(np.float32)
    return float(np.abs(states - cached).max())


def latent_differences(stage: FirstStage, records: list[Record], samples: list[Prepared]) -> list[float]:
    """Root mean square difference of each cached posterior mean from that of the source's pixels, both scaled."""
    moments = stage.encode_moments(to_unit_range(torch.from_numpy(np.stack([sample.pixels for sample in samples]))))
    fresh = sample_posterior(moments.cpu(), None, stage.scale, stage.shift)
    return (fresh - cached_latents(stage, records)).square().mean(dim=(1, 2, 3)).sqrt().tolist()


def compare(stage: FirstStage, records: list[Record], samples: list[Prepared]) -> list[Pair]:
    """Images beside their decoded latents."""
    decoded = to_uint8(stage.decode(cached_latents(stage, records)))
    return [
        Pair(record.key, sample.caption, sample.pixels, image)
        for record, sample, image in zip(records, samples, decoded)
    ]


def cached_latents(stage: FirstStage, records: list[Record]) -> torch.Tensor:
    """Scaled posterior modes (B, C, h, w) of records."""
    moments = torch.from_numpy(np.stack([record.members["moments"] for record in records]))
    return sample_posterior(moments, None, stage.scale, stage.shift)


if __name__ == "__main__":
    raise SystemExit(cli.main(["verify", *sys.argv[1:]]))
