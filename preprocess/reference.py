"""latentmill reference: computes feature statistics of real images for FID, and the floors that no generator can beat.

The source images of a cache are read again with the cache's crop. The first half of them (at most 5,000) is held out
for the floors; the features of all others make the reference (pipeline/evaluation/reference.py says why).
Reconstructions are decoded from the cached latents, of posteriors from their means; of pixels they are the pixels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ReferenceConfig
from pipeline.data.format.bounds import MOST_SIDE, Side
from pipeline.data.format.contract import Contract
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import read
from pipeline.distributed.world import pick_device
from pipeline.errors import ContractMismatch, DataError, ParseError, ShardCorrupt, UserError
from pipeline.evaluation.features.networks import Features, load_features
from pipeline.evaluation.measure import clip_identity, clip_scores, merge_accuracies, shapes_accuracy
from pipeline.evaluation.metrics.fid import Statistics
from pipeline.evaluation.reference import FLOOR_SIZES, Reference, ReferenceFacts, require_free_or_own, save_reference
from pipeline.inference.pictures import to_uint8
from pipeline.inference.precision import products
from pipeline.inference.trained import load_encoders
from pipeline.log import show
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.latents import Latents
from pipeline.models.encoders.text import TextTower
from pipeline.parsing.bounds import Whole
from pipeline.parsing.typed import build
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.progress import Progress
from preprocess.proving.records import source_key
from preprocess.source.image import Crop, crop_image, decode_image, open_image, place_crop
from preprocess.source.recipe import Recipe, recipe_of_contract
from preprocess.source.shard import Sample
from preprocess.units.sources import find_inputs

MOST_HELD = 5000  # images that are held out for the floors, at most
BATCH = 64
SCORED = ("real", "reconstruction")
Start = Annotated[int, Whole(0, MOST_SIDE)]


def main(config: ReferenceConfig) -> int:
    """Runs the verb. Returns the exit status."""
    storage = open_storage(config.dataset)
    manifest = load_manifest(storage)
    contract = manifest.contract
    device = pick_device("auto")
    features = load_features(config.features, device, contract.encoder_seed, config.features_weights)
    encoders = load_encoders(contract, device, config.encoders, beside=(config.dataset,))
    dest = config.dest or storage.locate(f"reference-{config.features}.safetensors")
    if len(contract.buckets) > 1:
        raise UserError(f"{config.dataset} has {len(contract.buckets)} aspect-ratio buckets; features need one size")
    available = manifest.samples // (2 if contract.flip else 1)
    images = min(config.images or available, available)
    if images < 4:
        raise UserError(f"{config.dataset} has {images} images; statistics and floors need four at the least")
    made_of = {
        "features_sha256": features.sha256,
        "dataset": manifest.digest,
        "clip_sha256": clip_identity(encoders[1]) if encoders[1] else "",
    }
    require_free_or_own(dest, made_of, images)
    with products(tf32=False):  # as evaluations measure
        reference = make_reference(
            real_images(storage, manifest, config.source, images),
            images,
            manifest,
            features,
            *encoders,
            progress=Progress(images, "reference", "images"),
        )
    save_reference(dest, reference)
    show(summary(dest, reference))
    return 0


# --------------------------------------------------------------------------------------------------------------------
# Real images beside their records


def real_images(storage: Storage, manifest: Manifest, source: str, images: int) -> Iterator[tuple[np.ndarray, Record]]:
    """Yields the first `images` records of a cache, each with the pixels (H, W, 3) uint8 that it was encoded from.

    source: pattern of the input shards, "" for the one in the manifest. Flipped copies and excluded records are
    skipped. Raises SourceError, ContractMismatch or ShardCorrupt when the shards are not those that the manifest names.
    """
    inputs = find_inputs(manifest, source, storage.url)
    recipe = recipe_of_contract(manifest.contract)
    excluded = {tuple(pair) for pair in load_excluded(storage, manifest).tolist()}
    for number, entry in enumerate(manifest.shards):
        if images <= 0:
            return
        given = inputs[entry.unit]
        unit = manifest.units[entry.unit]
        kept = [row for row in range(0, entry.samples, recipe.variants) if (number, row) not in excluded][:images]
        with given.open(recipe.limits) as shard:
            if shard.bytes != unit.source_bytes:
                raise ContractMismatch(
                    f"{given.url} has {shard.bytes} bytes, but {storage.url}/{entry.name} was made from "
                    f"{unit.source} of {unit.source_bytes}: give the source that the cache was encoded from"
                )
            records = read(storage, manifest, number, kept, (Latents.of(manifest.contract).member,))
            keys = list(map(source_key, records))
            matched = 0
            for sample in shard.samples():
                # Rejected samples have no record; the records of the others are in the order of the source.
                if matched < len(kept) and sample.key == keys[matched] and not sample.problem:
                    try:
                        picture = _crop(sample, recipe, records[matched], entry.size)
                    except DataError as error:
                        raise ContractMismatch(
                            f"{given.url}, sample {sample.key}: {error}. It is not what {storage.url}/"
                            f"{entry.name} was made from"
                        ) from None
                    yield picture, records[matched]
                    matched += 1
            if matched < len(kept) or shard.sha256 != unit.source_sha256:
                raise ContractMismatch(
                    f"{given.url} is not what {storage.url}/{entry.name} was made from: its SHA-256 is "
                    f"{shard.sha256[:12]}, the manifest says {unit.source_sha256[:12]}"
                )
        images -= len(kept)


@dataclass(frozen=True)
class _Origin:
    """Facts of a record's json about its pixels."""

    width: Annotated[int, Whole(1, 2**31)]
    height: Annotated[int, Whole(1, 2**31)]
    resized: tuple[Side, Side]
    crop: tuple[Start, Start, Side, Side]


def _crop(sample: Sample, recipe: Recipe, record: Record, size: tuple[int, int]) -> np.ndarray:
    """Crops the pixels of a record from its sample. size: (width, height) of the crop.

    Raises ShardCorrupt when the record says what no crop of this size can be, and RecordRejected.
    """
    try:
        origin = build(_Origin, record.meta, unknown="pass")
    except ParseError as error:
        raise ShardCorrupt(f"record {record.key}: {error}") from None
    crop = Crop(origin.width, origin.height, origin.resized, origin.crop)
    placed = place_crop(origin.width, origin.height, size, "centre", 0, "")
    room = [crop.resized[i] - crop.box[i] - size[i] for i in range(2)]
    data = sample.image()
    image = decode_image(open_image(data, recipe.limits), data, recipe.colour)
    if (
        (crop.resized, crop.size) != (placed.resized, size)
        or min(room) < 0
        or image.size != (crop.width, crop.height)
        or math.prod(crop.resized) > max(recipe.limits.pixels, 4 * math.prod(size))
    ):
        raise ShardCorrupt(
            f"record {record.key} says that it is {crop.box} of {crop.width} x {crop.height} pixels resized to "
            f"{crop.resized}, which cannot be of this image"
        )
    return crop_image(image, crop)


# --------------------------------------------------------------------------------------------------------------------
# Statistics and floors


@dataclass
class _HeldOut:
    """Figures of the held-out images, either real or reconstructed."""

    features: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    accuracies: list[dict[str, Any]] = field(default_factory=list)

    def add(self, pictures: np.ndarray, captions: list[str], features: Features, tower: TextTower | None) -> None:
        """tower: None where there are no captions, which nothing is compared with then."""
        self.features.append(features(pictures))
        if tower is not None:
            self.scores.append(clip_scores(tower, pictures, captions))
            self.accuracies.append(shapes_accuracy(pictures, captions))


def make_reference(
    images: Iterator[tuple[np.ndarray, Record]],
    count: int,
    manifest: Manifest,
    features: Features,
    first_stage: FirstStage,
    tower: TextTower | None,
    progress: Progress,
) -> Reference:
    """Makes the reference of `count` images in one pass over them. tower: None of a cache without captions."""
    contract = manifest.contract
    held_count = min(count // 2, MOST_HELD)
    held_out = {name: _HeldOut() for name in SCORED}
    statistics = Statistics.empty(features.width)
    with progress:
        for place, pictures, records in _batches(images, held_count):
            if place < held_count:
                captions = [record.meta["caption"] for record in records]
                held_out["real"].add(pictures, captions, features, tower)
                held_out["reconstruction"].add(_reconstruct(records, contract, first_stage), captions, features, tower)
            else:
                statistics.add(features(pictures))
            progress.update(len(pictures))
    scores: dict[str, Any] = {}
    for name, figures in held_out.items() if tower is not None else ():
        scores[f"clip_score_{name}"] = float(torch.cat(figures.scores).mean())
        accuracy = merge_accuracies(figures.accuracies)
        if "overall" in accuracy:
            scores[f"attribute_accuracy_{name}"] = accuracy["overall"]
            scores[f"attribute_accuracy_by_objects_{name}"] = accuracy["by_objects"]
    facts = ReferenceFacts(
        features=features.name,
        features_sha256=features.sha256,
        resolution=contract.resolution,
        crop=contract.crop,
        resize=contract.resize,
        dataset=manifest.digest,
        vae_sha256=contract.vae_sha256,
        clip_sha256=clip_identity(tower) if tower is not None else "",
        images=statistics.n,
        held=held_count,
        scores=scores,
    )
    real, reconstruction = (torch.cat(held_out[name].features) for name in SCORED)
    reference = Reference(facts, statistics.gaussian(), real, reconstruction)
    for size in sorted({*(size for size in FLOOR_SIZES if size < held_count), held_count}):
        facts.floors[str(size)] = {name: value for name, value in reference.floors(size).items() if name != "images"}
    return reference


def _batches(images: Iterator[tuple[np.ndarray, Record]], cut: int) -> Iterator[tuple[int, np.ndarray, list[Record]]]:
    """Yields (number of the first image, pictures (B, R, R, 3), records) per batch. No batch crosses image number
    `cut`."""
    start, pictures, records = 0, list[np.ndarray](), list[Record]()
    for picture, record in images:
        pictures.append(picture)
        records.append(record)
        if len(pictures) == BATCH or start + len(pictures) == cut:
            yield start, np.stack(pictures), records
            start, pictures, records = start + len(pictures), [], []
    if pictures:
        yield start, np.stack(pictures), records


def _reconstruct(records: list[Record], contract: Contract, first_stage: FirstStage) -> np.ndarray:
    """Decodes the latents of records, of posteriors their means: (B, R, R, 3) uint8."""
    latents = Latents.of(contract)
    stored = torch.from_numpy(np.stack([record.members[latents.member] for record in records])).to(first_stage.device)
    return to_uint8(first_stage.decode(latents.draw(stored, None)))


def summary(dest: str, reference: Reference) -> str:
    """A description of the written reference, for people."""
    facts = reference.facts
    lines = [
        f"reference: {dest}: {facts.features} of {facts.images:,} images at {facts.resolution} px; "
        f"{facts.held:,} others held out"
    ]
    for size, floors in facts.floors.items():
        real, reconstruction = (floors[kind] for kind in SCORED)
        lines.append(f"  floors with {int(size):,} images: real {real:.4g}, reconstructed {reconstruction:.4g}")
    for name in ("clip_score", "attribute_accuracy"):
        if f"{name}_real" in facts.scores:
            values = [f"{facts.scores[f'{name}_{kind}']:.4g}" for kind in SCORED]
            lines.append(f"  {name}: real {values[0]}, reconstructed {values[1]}")
    return "\n".join(lines)


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["reference", *sys.argv[1:]]))
