"""Units of work through the encoders: reading, decoding, encoding and writing, each in threads of its own.

    reader thread -> decoding threads -> (batches) -> the calling thread: autoencoder, text -> writer thread

Batches never cross units, and the last of a unit is padded to the full size, so a unit's bytes do not depend on what
was encoded before it.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.config import EncodeConfig
from pipeline.data.manifest import canonical_json
from pipeline.data.records import Record, record_key
from pipeline.errors import NonFinite, RecordRejected
from pipeline.models.autoencoder import FirstStage
from pipeline.models.text import TextTower
from pipeline.progress import Progress
from pipeline.storage import Storage
from preprocess.sample import Prepared, hole, prepare
from preprocess.source import Sample, SourceShard
from preprocess.writer import Moments, ShardWriter

CHUNK = 16  # samples that one decoding task takes
QUEUED = 3  # batches kept ready for the encoders, and encoded ones for the writer
STAGES = ("read", "decode", "wait", "autoencoder", "text", "write")


@dataclass(frozen=True)
class Unit:
    """One input shard."""

    number: int
    storage: Storage
    key: str

    @property
    def name(self) -> str:
        """The input shard's file name."""
        return self.key.rpartition("/")[2]

    @property
    def tar_name(self) -> str:
        """Its cached tar."""
        return f"{self.number:06d}.tar"

    @property
    def index_name(self) -> str:
        """Its index."""
        return f"{self.number:06d}.index.json"


@dataclass
class Tally:
    """Seconds of work by stage (of all threads together) and counts."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    accepted: int = 0

    def told(self, seconds: float, workers: int) -> str:
        """A line for people: rate, rejects, and where the time went."""
        parts = ", ".join(f"{stage} {spent:.1f}" for stage, spent in self.seconds.items())
        rejects = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejected.items())) or "none"
        # The reader and the writer work beside the encoders, which matter when they wait for neither.
        busiest = max(
            ("decode", (self.seconds["read"] + self.seconds["decode"]) / workers),
            ("autoencoder", self.seconds["autoencoder"]),
            ("text", self.seconds["text"]),
            ("write", self.seconds["write"]),
            key=lambda stage: stage[1],
        )[0]
        return (
            f"encode: {self.accepted:,} images in {seconds:.1f} s = {self.accepted / max(seconds, 1e-9):.1f} images/s; "
            f"rejected: {rejects}; seconds: {parts} ({workers} decoding threads); bottleneck: {busiest}"
        )


class Encoder:
    """Both encoders, with what the configuration wants of them."""

    def __init__(self, config: EncodeConfig, first_stage: FirstStage, text: TextTower) -> None:
        self.config, self.first_stage, self.text = config, first_stage, text

    def moments(self, pixels: list[np.ndarray]) -> np.ndarray:
        """Up to `batch` images (R, R, 3) uint8 -> moments (n, 2C, h, w) float32; computed on a full batch."""
        stacked = np.zeros((self.config.batch, *pixels[0].shape), dtype=np.uint8)
        stacked[: len(pixels)] = pixels
        return self._encode(to_unit_range(torch.from_numpy(stacked)), len(pixels))

    def masked_mean(self, pixels: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
        """Images and masks (R, R) uint8, 1 = hidden -> posterior means (n, C, h, w) with mid grey there."""
        stacked = np.zeros((self.config.batch, *pixels[0].shape), dtype=np.uint8)
        hidden = np.zeros((self.config.batch, 1, *masks[0].shape), dtype=np.float32)
        stacked[: len(pixels)] = pixels
        hidden[: len(masks), 0] = masks
        x = to_unit_range(torch.from_numpy(stacked)) * (1 - torch.from_numpy(hidden))
        return self._encode(x, len(pixels))[:, : self.first_stage.latent_channels]

    def text_states(self, ids: list[list[int]]) -> np.ndarray:
        """Up to `batch` rows of L ids -> (n, L, D) float16; computed on a full batch."""
        tokens = torch.tensor(ids + [ids[-1]] * (self.config.batch - len(ids)), dtype=torch.int64)
        return self.text.encode(tokens)[: len(ids)].cpu().numpy().astype(np.float16)

    def _encode(self, x_BCHW: torch.Tensor, count: int) -> np.ndarray:
        return self.first_stage.encode_moments(x_BCHW)[:count].cpu().numpy()


def to_unit_range(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return pixels_BHWC.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


@dataclass
class _Batch:
    """Accepted samples of one unit, rows `row` on. position: bytes of the unit read so far."""

    unit: Unit
    row: int
    samples: list[Prepared]
    position: int


@dataclass
class _End:
    """All of a unit has been read and handed over."""

    unit: Unit
    shard: SourceShard
    read: int
    rejected: collections.Counter[str]


def encode_units(units: list[Unit], storage: Storage, encoder: Encoder, contract: str, workers: int, label: str) -> str:
    """Encodes `units` in order and puts each one's tar, then its index. Returns a line that says where time went.

    contract: digest written into each index. workers: decoding threads. label: of the progress, "" for none. Raises
    what goes wrong in any thread; units that were finished stay.
    """
    tally, started = Tally(), time.perf_counter()
    sizes = {unit.number: unit.storage.stat(unit.key).size for unit in units}
    before = 0  # bytes of the units that are done
    feed = _feed(units, encoder, workers, tally)
    with (
        ThreadPoolExecutor(1, "latentmill-read") as reader,
        ThreadPoolExecutor(1, "latentmill-write") as writer,
        Progress(max(1, sum(sizes.values()) // 1_000_000), label, "MB", enabled=bool(label)) as progress,
    ):
        ready = collections.deque(reader.submit(next, feed, None) for _ in range(QUEUED))
        written: collections.deque[Future[None]] = collections.deque()
        output = _Output(storage, encoder, contract, tally)
        try:
            while True:
                waited = time.perf_counter()
                item = ready.popleft().result()
                tally.seconds["wait"] += time.perf_counter() - waited
                if item is None:
                    break
                ready.append(reader.submit(next, feed, None))
                if isinstance(item, _Batch):
                    written.append(writer.submit(output.add, _encode(item, encoder, tally)))
                    tally.accepted += len(item.samples)
                    position = before + item.position
                else:
                    written.append(writer.submit(output.finish, item))
                    tally.rejected.update(item.rejected)
                    position = before = before + sizes[item.unit.number]
                while len(written) > QUEUED:
                    written.popleft().result()
                progress.update(
                    position // 1_000_000 - progress.done,
                    images_s=f"{tally.accepted / (time.perf_counter() - started):.0f}",
                    rejects=tally.rejected.total(),
                )
            for future in written:
                future.result()
        finally:
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
            feed.close()
    return tally.told(time.perf_counter() - started, workers)


def _feed(units: list[Unit], encoder: Encoder, workers: int, tally: Tally) -> Generator[_Batch | _End]:
    """Batches of decoded samples, and an _End after each unit."""
    with ThreadPoolExecutor(workers, "latentmill-decode") as pool:
        for unit in units:
            shard = SourceShard(unit.storage, unit.key, encoder.config.limits)
            end = _End(unit, shard, 0, collections.Counter())
            row, batch = 0, list[Prepared]()
            for result in _decoded(shard, encoder, pool, workers, tally):
                end.read += 1
                if isinstance(result, str):
                    end.rejected[result] += 1
                    continue
                batch.append(result)
                if len(batch) == encoder.config.batch:
                    yield _Batch(unit, row, batch, shard.position)
                    row, batch = row + len(batch), []
            if batch:
                yield _Batch(unit, row, batch, shard.position)
            yield end


def _decoded(
    shard: SourceShard, encoder: Encoder, pool: ThreadPoolExecutor, workers: int, tally: Tally
) -> Iterator[Prepared | str]:
    """Each sample of the shard in order: ready for the encoders, or the reason of its rejection."""
    pending: collections.deque[Future[tuple[list[Prepared | str], float]]] = collections.deque()
    samples = shard.samples()
    more = True
    while more or pending:
        if more and len(pending) < workers + 1:
            started = time.perf_counter()
            chunk = list(itertools.islice(samples, CHUNK))
            tally.seconds["read"] += time.perf_counter() - started
            more = bool(chunk)
            if chunk:
                pending.append(pool.submit(_prepare_chunk, chunk, encoder))
            continue
        results, seconds = pending.popleft().result()
        tally.seconds["decode"] += seconds
        yield from results


def _prepare_chunk(samples: list[Sample], encoder: Encoder) -> tuple[list[Prepared | str], float]:
    started = time.perf_counter()
    results: list[Prepared | str] = []
    for sample in samples:
        try:
            results.append(prepare(sample, encoder.config, encoder.text.ids))
        except RecordRejected as rejection:
            results.append(rejection.reason)
    return results, time.perf_counter() - started


def _encode(batch: _Batch, encoder: Encoder, tally: Tally) -> list[Record]:
    """A batch through both encoders. Raises NonFinite."""
    samples = batch.samples
    keys = [record_key(batch.unit.number, batch.row + i) for i in range(len(samples))]
    pixels = [sample.pixels for sample in samples]
    started = time.perf_counter()
    moments = encoder.moments(pixels).astype(np.float16)
    masked, masks = None, list[np.ndarray]()
    if "mask" in encoder.config.conditions:
        masks = [hole(key, encoder.config.resolution) for key in keys]
        masked = encoder.masked_mean(pixels, masks).astype(np.float16)
    encoded = time.perf_counter()
    states = encoder.text_states([sample.ids for sample in samples])
    tally.seconds["autoencoder"] += encoded - started
    tally.seconds["text"] += time.perf_counter() - encoded
    records = []
    for i, (key, sample) in enumerate(zip(keys, samples, strict=True)):
        members = {"moments": moments[i], "text": states[i]}
        members |= {f"cond.{name}": array for name, array in sample.conditions.items()}
        if masked is not None:
            members |= {"cond.mask": masks[i], "cond.masked": masked[i]}
        for name, array in members.items():
            if array.dtype == np.float16 and not np.isfinite(array).all():
                raise NonFinite(
                    f"{name} of sample {sample.key} in {batch.unit.storage.locate(batch.unit.key)} holds NaN or "
                    "infinity: check the encoders' weights, or encode with encoders.vae_dtype=float32"
                )
        records.append(Record(key, members, sample.meta()))
    return records


class _Output:
    """The unit that is being written, in the writer's thread."""

    def __init__(self, storage: Storage, encoder: Encoder, contract: str, tally: Tally) -> None:
        self.storage, self.contract, self.tally = storage, contract, tally
        self.scale, self.shift = encoder.first_stage.scale, encoder.first_stage.shift
        self.channels = encoder.first_stage.latent_channels
        self._begin()

    def _begin(self) -> None:
        self.tar, self.moments, self.truncated = ShardWriter(), Moments(), 0

    def add(self, records: list[Record]) -> None:
        """Appends a batch."""
        started = time.perf_counter()
        for record in records:
            self.tar.add(record)
            mean = record.members["moments"][: self.channels].astype(np.float64)
            self.moments.add((mean - self.shift) * self.scale)
            self.truncated += record.meta["truncated"]
        self.tally.seconds["write"] += time.perf_counter() - started

    def finish(self, end: _End) -> None:
        """Puts the tar, then the index that makes the unit done."""
        started = time.perf_counter()
        tar, facts = self.tar.finish()
        assert facts["samples"] + end.rejected.total() == end.read, "every sample read is accepted or rejected"
        facts |= {
            "unit": end.unit.number,
            "contract": self.contract,
            "source": {"name": end.unit.name, "sha256": end.shard.sha256, "bytes": end.shard.bytes},
            "read": end.read,
            "accepted": facts["samples"],
            "rejected": dict(end.rejected),
            "passed_over": end.shard.passed_over,
            "truncated": self.truncated,
            "statistics": self.moments.to_json(),
        }
        self.storage.put(end.unit.tar_name, tar)
        self.storage.put(end.unit.index_name, canonical_json(facts))
        self._begin()
        self.tally.seconds["write"] += time.perf_counter() - started
