"""Compares a few records of a cache with the images and captions that they were made from."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.config import VerifyConfig
from pipeline.data.format.contract import TextFacts
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import fetch_shard, image_of
from pipeline.distributed.world import pick_device
from pipeline.errors import RecordRejected, SourceError
from pipeline.inference.pictures import to_uint8
from pipeline.inference.trained import load_encoders
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.latents import Latents
from pipeline.models.encoders.text import TextTower
from pipeline.storage.base import Storage
from pipeline.tracking.progress import Progress
from preprocess.encoding.encoder import text_arrays, to_unit_range
from preprocess.proving.conditions import LATENT_TOLERANCE, add_conditions, masked_differences, other_conditions
from preprocess.proving.filters import add_filters, held_looks, other_looks, unlike, with_whole
from preprocess.proving.findings import Findings
from preprocess.proving.originals import Original, by_size
from preprocess.proving.page import Pair
from preprocess.proving.records import source_key
from preprocess.source.recipe import recipe_of_contract
from preprocess.source.sample import prepare
from preprocess.units.inputs import Input
from preprocess.units.naming import option
from preprocess.units.sources import find_inputs

SHARDS_COMPARED = 8  # input shards that are read again, at most
ENCODED_TOGETHER = 64
STATE_TOLERANCE = 0.02  # of text states, whose values are about 1; fp16 and other batch sizes cause 0.002


def check_sources(storage: Storage, manifest: Manifest, config: VerifyConfig, findings: Findings) -> list[Pair]:
    """Compares config.samples records with their source. Returns pairs of image and decoded latent, worst first."""
    try:
        inputs = find_inputs(manifest, config.source, config.dataset)
    except SourceError as error:
        if config.source:
            raise
        findings.add("source", f"not compared, for it is not here ({error}): give source=")
        return []
    device, beside = pick_device("auto"), (config.dataset,)
    first_stage, tower = load_encoders(manifest.contract, device, config.encoders, beside=beside)
    contract, stored = manifest.contract, Latents.of(manifest.contract)
    pairs, worst_text, latents, problems = list[Pair](), 0.0, list[float](), list[str]()
    masked, other, looks, scores = list[float](), list[str](), list[str](), list[str]()
    chosen = choose(manifest, config.samples)
    with Progress(sum(map(len, chosen.values())), "compare") as progress:
        for number, rows in chosen.items():
            held = held_looks(storage, manifest, manifest.shards[number].unit)
            originals = _originals(
                storage, manifest, number, inputs[manifest.shards[number].unit], rows, tower, problems
            )
            while batch := list(itertools.islice(originals, ENCODED_TOGETHER)):
                if tower is not None and contract.text is not None:
                    worst_text = max(worst_text, text_difference(tower, batch, contract.text))
                latents += latent_differences(first_stage, batch, stored)
                other += other_conditions(batch, contract)
                looks += other_looks(batch, held, 2 if contract.flip else 1)
                scores += unlike(batch, contract, tower)
                masked += masked_differences(first_stage, batch, contract)
                pairs += compare(first_stage, batch, stored)
                progress.update(len(batch))
    psnr = np.array([pair.psnr for pair in pairs] or [np.nan])
    right = "hashes, keys, captions and crops right" if contract.text else "hashes, keys and crops right"
    findings.add("source", f"{len(chosen)} input shards read again: {right}", *problems)
    if contract.text is not None:
        problem = (
            f"text states differ by up to {worst_text:.3g} from what the contract's text tower gives for their captions"
        )
        far = [problem] if worst_text > STATE_TOLERANCE else []
        findings.add("text", f"encoded again within {worst_text:.2g}", *far)
    add_conditions(findings, contract, other, masked)
    add_filters(findings, contract, tower, looks, scores)
    worst_latent = max(latents, default=0.0)
    problem = (
        f"latents differ by up to {worst_latent:.3g} (rms) from what the contract's autoencoder gives for their images"
    )
    if contract.stored == "pixels":
        add_pixels(findings, pairs)
        return sorted(pairs, key=lambda pair: pair.psnr)
    findings.add(
        "moments" if contract.stored == "moments" else "encoder",
        f"encoded again within {worst_latent:.2g}",
        *([problem] if worst_latent > LATENT_TOLERANCE else []),
    )
    summary = f"{len(pairs)} decoded: PSNR median {np.median(psnr):.1f} dB, worst {psnr.min():.1f} dB"
    if not np.median(psnr) >= config.min_psnr:
        findings.poor = f"{summary}, below min_psnr={config.min_psnr:g}"
    findings.add("pixels", findings.poor or summary)
    return sorted(pairs, key=lambda pair: pair.psnr)


def add_pixels(findings: Findings, pairs: list[Pair]) -> None:
    """Records whether stored pixels are those of their sources, to the bit. Pairs: source and decoded pixels."""
    wrong = [pair.key for pair in pairs if not np.array_equal(pair.image, pair.decoded)]
    problems = [f"pixels of {key} are not those of its source's crop" for key in wrong]
    findings.add("pixels", f"{len(pairs)} made again, equal to the bit", *problems)


def choose(manifest: Manifest, count: int) -> dict[int, list[int]]:
    """Chooses about `count` records, evenly over at most SHARDS_COMPARED evenly spaced shards: rows by shard number."""
    filled = [number for number, entry in enumerate(manifest.shards) if entry.samples]
    picked = [filled[i] for i in spread(len(filled), min(SHARDS_COMPARED, count))]
    rows_per_shard = -(-count // max(len(picked), 1))
    return {number: spread(manifest.shards[number].samples, rows_per_shard) for number in picked}


def spread(length: int, count: int) -> list[int]:
    """Up to `count` evenly spaced indices of a list of this length, including the first and the last."""
    return sorted(set(np.linspace(0, length - 1, min(length, count)).round().astype(int).tolist()))


def _originals(
    storage: Storage,
    manifest: Manifest,
    number: int,
    given: Input,
    rows: list[int],
    tower: TextTower | None,
    problems: list[str],
) -> Iterator[Original]:
    """Yields records of one shard with their source samples. Reads the input shard to its end."""
    entry, contract = manifest.shards[number], manifest.contract
    unit = manifest.units[entry.unit]
    shard = fetch_shard(storage, entry, contract)
    records_by_key: dict[str, list[Record]] = collections.defaultdict(list)
    for record in map(shard.record, rows):
        records_by_key[source_key(record)].append(record)
    recipe = with_whole(recipe_of_contract(contract), contract, tower)
    with given.open(recipe.limits) as source:
        for sample in source.samples():
            if sample.key not in records_by_key or sample.problem:
                continue
            records = records_by_key.pop(sample.key)
            try:
                prepared = prepare(sample, recipe, tower.ids if tower else None)
            except RecordRejected as rejection:
                problems.append(f"{unit.source}: sample {sample.key} cannot be read, yet is cached: {rejection}")
                continue
            for record in records:
                if contract.pixels == "png":
                    record.members["pixels"] = image_of(record, contract, entry.size)
                flipped = bool(record.meta.get("flipped"))
                if prepared.meta(flipped=flipped) != record.meta:
                    problems.append(
                        f"{storage.url}/{entry.name}: caption, size or crop of {record.key} is not its source's"
                    )
                picture = prepared.pictures[0]
                yield Original(record, prepared, picture.flipped() if flipped else picture)
        if source.sha256 != unit.source_sha256:
            problems.append(
                f"{given.url} is not the shard that was encoded: its SHA-256 differs. Put "
                "back the former one; or, to encode this one in its place, run the `latentmill encode` of this "
                f"dataset once with {option('forget', [unit.source])}, then again without"
            )
    if records_by_key:
        problems.append(
            f"{unit.source} lacks {len(records_by_key)} samples that are cached, such as {next(iter(records_by_key))}"
        )


def text_difference(tower: TextTower, originals: list[Original], text: TextFacts) -> float:
    """Largest absolute difference between the cached text states and those of the source's captions. Of token ids: 0,
    or infinite if any differs."""
    ids = [one.ids for original in originals for one in original.sample.captions]
    parts = (ids[first : first + ENCODED_TOGETHER] for first in range(0, len(ids), ENCODED_TOGETHER))
    states = None
    if text.storage != "tokens":
        states = np.concatenate([tower.encode(torch.tensor(part)).cpu().numpy() for part in parts])
    worst, first = 0.0, 0
    for original in originals:
        count = len(original.sample.captions)
        own = None if states is None else states[first : first + count]
        wanted = text_arrays(original.sample, own, text.storage, text.captions, tower.eot)
        first += count
        for name, array in wanted.items():
            cached = original.record.members[name]
            if cached.shape != array.shape or (name != "text" and not np.array_equal(cached, array)):
                return float("inf")
            if name == "text":
                worst = max(worst, float(np.abs(array - cached.astype(np.float32)).max()))
    return worst


def latent_differences(stage: FirstStage, originals: list[Original], stored: Latents) -> list[float]:
    """Root mean square difference between each cached latent and that of the source's pixels, of a posterior its mean,
    both scaled."""
    differences = []
    for group in by_size(originals):
        pixels = torch.from_numpy(np.stack([original.picture.pixels for original in group]))
        fresh = (stage.mean(to_unit_range(pixels)).cpu() - stage.shift) * stage.scale
        differences += (fresh - cached_latents(group, stored)).square().mean(dim=(1, 2, 3)).sqrt().tolist()
    return differences


def compare(stage: FirstStage, originals: list[Original], stored: Latents) -> list[Pair]:
    """Pairs of source image and decoded cached latent."""
    pairs = []
    for group in by_size(originals):
        decoded = to_uint8(stage.decode(cached_latents(group, stored)))
        pairs += [
            Pair(original.record.key, original.sample.caption, original.picture.pixels, image)
            for original, image in zip(group, decoded, strict=True)
        ]
    return pairs


def cached_latents(originals: list[Original], stored: Latents) -> torch.Tensor:
    """Scaled latents (B, C, h, w) of the cached records; of posteriors their means."""
    arrays = torch.from_numpy(np.stack([original.record.members[stored.member] for original in originals]))
    return stored.draw(arrays, None)
