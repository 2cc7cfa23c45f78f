"""`latentmill encode dry_run=true`: estimates the size and time of a whole source from a few of its samples."""

from __future__ import annotations

import collections
import itertools
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pipeline.config import EncodeConfig
from pipeline.data.format.records import pack
from pipeline.distributed.place import cores, threads_per_rank, worker_place
from pipeline.distributed.world import pick_device
from pipeline.errors import SourceError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.text import load_text
from pipeline.models.encoders.tokenizer import Tokenizer
from pipeline.parsing.tar import BLOCK
from pipeline.tracking.terminal import duration
from preprocess.encoding.encoder import Batch, Encoder, Item, encoder_of, item
from preprocess.encoding.plan import Unit
from preprocess.encoding.rejects import hints
from preprocess.filters.clip import ClipFilter, clip_filter_of
from preprocess.source.conditions import draw_holes
from preprocess.source.recipe import Recipe, recipe_of
from preprocess.source.rejected import Rejected
from preprocess.source.sample import Prepared
from preprocess.source.worker import prepare_all
from preprocess.units.given import Cut, look

TRIED = 256  # samples that are tried, at most
SHARDS = 4  # input shards that they come from, at most
TEXT = ("full", "trimmed", "tokens")


@dataclass
class Trial:
    """A few samples, read and prepared. rejected: counts by reason. decode_s: seconds of one core spent on preparing.
    source_bytes: bytes of the source that were read for them. members: names of the first files."""

    samples: list[Prepared]
    rejected: collections.Counter[str]
    decode_s: float
    source_bytes: int
    members: list[str] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Samples tried."""
        return len(self.samples) + self.rejected.total()


@dataclass
class Estimate:
    """The estimated content and cost of a source.

    samples, accepted: samples of the whole source. record_bytes: bytes of an accepted sample in the tars, by text
    storage. rate: images/s of one process. tars: number of cached tars.
    """

    config: EncodeConfig
    recipe: Recipe
    shards: int
    total_bytes: int
    trial: Trial
    record_bytes: dict[str, float]
    rate: float
    processes: int

    @property
    def samples(self) -> float:
        return self.total_bytes * self.trial.read / self.trial.source_bytes

    @property
    def accepted(self) -> float:
        return self.samples * len(self.trial.samples) / self.trial.read

    @property
    def tars(self) -> int:
        samples_per_shard = max(1, round(self.accepted / self.shards))
        return sum(min(len(target.sizes), samples_per_shard) for target in self.recipe.targets) * self.shards

    def told(self) -> str:
        """A page of text."""
        variants, datasets = self.recipe.variants, len(self.recipe.targets)
        rejects = ", ".join(f"{count} {reason}" for reason, count in self.trial.rejected.most_common()) or "none"
        seconds = self.accepted / self.rate
        objects = 2 * self.tars + (self.shards + 4) * datasets
        return "\n".join(
            [
                f"{self.config.source}: {self.shards:,} shards, {_bytes(self.total_bytes)}, about "
                f"{self.samples:,.0f} samples",
                f"tried {self.trial.read} samples of {min(self.shards, SHARDS)} shards: {len(self.trial.samples)} "
                f"accepted; rejected: {rejects}",
                "",
                "  text_storage   bytes a sample   in all",
                *(
                    f"{'*' if kind == self.config.text_kind else ' '} {kind:<12} {size * variants:>16,.0f}   "
                    f"{_bytes(size * variants * self.accepted)}"
                    for kind, size in self.record_bytes.items()
                ),
                "",
                f"about {self.accepted * variants * datasets:,.0f} records in {self.tars:,} tars; with indexes and "
                f"reports {objects:,} objects",
                f"about {self.rate:,.1f} images/s a process here: {duration(seconds / self.processes)} with "
                f"{self.processes}, {duration(seconds)} of process time",
                "nothing was written",
            ]
        )


def estimate(config: EncodeConfig) -> str:
    """The estimate as text. Raises SourceError when none of the tried samples is usable."""
    inputs = look(config.source, Cut(config.unit_size, config.image_column)).units()
    recipe, place = recipe_of(config), worker_place()
    device = pick_device(config.device, place.local_rank)
    here = max(config.launch.processes, place.local_world)
    threads = threads_per_rank(config.launch.threads, here)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    stage = load_autoencoder(config.used_encoders, device)
    text = load_text(config.encoders, device) if recipe.caption_key else None
    spaced = np.linspace(0, len(inputs) - 1, min(SHARDS, len(inputs))).round().astype(int).tolist()
    units = [Unit(i, inputs[i].storage, inputs[i].key, inputs[i].key, 0, inputs[i].contents) for i in spaced]
    trial = try_samples(units, recipe, text.tokenizer if text else None)
    similar = clip_filter_of(config, recipe, text)
    score_s = refuse_unlike(trial, similar) if similar else 0.0
    if not trial.samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in trial.rejected.most_common()) or "none"
        raise SourceError(
            f"{config.source}: none of the first {trial.read} samples is usable (rejected: {reasons}); "
            f"{hints(trial.rejected, trial.members, recipe.caption_key)}"
        )
    sizes_by_kind = {
        kind: record_bytes(Encoder(stage, text, 1, text_storage=kind), recipe, units[0], trial)
        for kind in (TEXT if text else ("none",))
    }
    encoder = encoder_of(config, recipe, stage, text)
    encode_s = seconds_per_image(encoder, recipe, units[0], trial) * recipe.variants + score_s
    decode_s = trial.decode_s / trial.read
    workers = config.workers or max(1, cores() // here)
    if device.type == "cpu":  # decoding and encoding share the cores
        rate = 1 / (encode_s + decode_s / threads)
    else:
        rate = min(workers / decode_s, 1 / encode_s)
    processes = max(config.launch.processes, place.world)
    return Estimate(
        config, recipe, len(inputs), sum(one.bytes for one in inputs), trial, sizes_by_kind, rate, processes
    ).told()


def try_samples(units: list[Unit], recipe: Recipe, tokenizer: Tokenizer | None) -> Trial:
    """Prepares the first samples of each unit, at most TRIED in total."""
    trial = Trial([], collections.Counter(), 0.0, 0)
    for unit in units:
        with unit.open(recipe.limits) as shard:
            samples = list(itertools.islice(shard.samples(), TRIED // len(units)))
            trial.source_bytes += shard.position
            trial.members = trial.members or shard.first
        results, seconds = prepare_all(samples, recipe, tokenizer)
        trial.decode_s += seconds
        for result in results:
            if isinstance(result, Rejected):
                trial.rejected[result.reason] += 1
            else:
                trial.samples.append(result)
    return trial


def refuse_unlike(trial: Trial, similar: ClipFilter) -> float:
    """Rejects the samples whose captions do not fit. Returns the seconds that a sample takes."""
    started, results = time.perf_counter(), list(similar.judged(trial.samples))
    seconds = (time.perf_counter() - started) / max(len(results), 1)
    trial.samples = [result for result in results if isinstance(result, Prepared)]
    trial.rejected.update(result.reason for result in results if isinstance(result, Rejected))
    return seconds


def items(encoder: Encoder, recipe: Recipe, unit: Unit, trial: Trial, target: int) -> dict[int, list[Item]]:
    """The samples as items of one target, by bucket."""
    items_by_bucket = collections.defaultdict(list)
    for row, sample in enumerate(trial.samples):
        record = item(row, sample, target, recipe.conditions, encoder.first_stage.downsampling)
        if recipe.conditions.mask is not None:
            record.take(draw_holes(record.holes(unit.number), recipe.conditions.mask), recipe.conditions.mask)
        items_by_bucket[record.picture.bucket].append(record)
    return items_by_bucket


def record_bytes(encoder: Encoder, recipe: Recipe, unit: Unit, trial: Trial) -> float:
    """Mean bytes of one sample in the tars, summed over all targets."""
    states = encoder.text_states([trial.samples[0].ids]) if encoder.text else None
    total = 0
    for target in range(len(trial.samples[0].pictures)):
        for bucket, bucket_items in items(encoder, recipe, unit, trial, target).items():
            encoded = encoder.encode(Batch(unit, target, bucket, bucket_items[:1], 0))
            for one in bucket_items:
                batch = Batch(unit, target, bucket, [one], 0)
                same = np.zeros(len(one.sample.captions), dtype=int)
                text = None if states is None or encoded.text is None else states[same]
                made = replace(encoded, batch=batch, text=text)
                record = made.records(encoder.text_storage, max(recipe.captions, 1))[0]
                total += sum(BLOCK + len(data) + -len(data) % BLOCK for _, data in pack(record))
    return total / len(trial.samples)


def seconds_per_image(encoder: Encoder, recipe: Recipe, unit: Unit, trial: Trial) -> float:
    """Seconds that both encoders take for one sample in full batches, summed over all targets."""
    seconds = 0.0
    for target in range(len(trial.samples[0].pictures)):
        by_bucket = items(encoder, recipe, unit, trial, target)
        bucket, bucket_items = max(by_bucket.items(), key=lambda place: len(place[1]))
        batch_items = list(itertools.islice(itertools.cycle(bucket_items), encoder.batch))
        batch = Batch(unit, target, bucket, batch_items, 0)
        encoder.encode(batch)  # warms up
        started = time.perf_counter()
        encoder.encode(batch)
        seconds += (time.perf_counter() - started) / encoder.batch
    return seconds


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
