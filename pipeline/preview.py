"""latentmill data: what ranks and nodes would read, for a seed, a sample number and a world size.

Everything is computed from the dataset's manifest: no tar is read, and the result is exactly what training would read.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import DataConfig, DataVerbConfig, OptimConfig
from pipeline.config.check.groups import check_world
from pipeline.data.joined.opening import joined, require_all_bound
from pipeline.data.order.buckets import Buckets
from pipeline.data.order.dataset import Dataset, part_of
from pipeline.data.order.mixture import AnyOrder, Mixture, orders_of, share
from pipeline.data.order.shuffle import Order, Positions
from pipeline.errors import ConfigError
from pipeline.log import show
from pipeline.runs.datasets import dataset_of_run
from pipeline.runs.directory import RunInfo, committed, load_any_run
from pipeline.runs.distinct import require_distinct
from pipeline.runs.stored import read_rows
from pipeline.storage.urls import open_storage
from pipeline.tracking.terminal import table

CHUNK = 1 << 16  # number of samples that are located at once
EPOCH_SAMPLES = 20_000_000  # largest number of samples of an epoch whose reads are counted
ROWS_BYTES = 1 << 26  # of the end of metrics.jsonl
SHOWN = 4  # number of shards that are named for a node


@dataclass(frozen=True)
class Job:
    """The reading to preview: an order over a dataset's blocks, read by `world` ranks on `nodes` nodes from sample `at`
    on."""

    dataset: Dataset
    order: AnyOrder
    at: int
    world: int
    nodes: int
    images_per_s: float
    memory: int
    """Bytes of records that a rank may keep in memory; 0 = not known."""

    @property
    def batch(self) -> int:
        return self.order.batch


@dataclass(frozen=True)
class Reads:
    """Which blocks each rank reads over some samples. times: (world, blocks), how often a rank reads a block."""

    samples: int
    times: np.ndarray

    @property
    def touched(self) -> np.ndarray:
        return self.times > 0

    def by_node(self, nodes: int, block_bytes: np.ndarray) -> np.ndarray:
        """(nodes,) bytes that each node reads; every rank reads its blocks itself."""
        return self.times.reshape(nodes, -1, len(block_bytes)).sum(axis=1) @ block_bytes


def main(config: DataVerbConfig) -> int:
    """Print the preview; returns 0. Raises ConfigError, DatasetError, RunError."""
    show(describe(job_of(config), config.batches))
    return 0


def job_of(config: DataVerbConfig) -> Job:
    """The reading that a configuration describes; a run provides what is not given. Raises ConfigError for a batch that
    the ranks do not divide, and for a sample number that is no multiple of the batch."""
    run = load_any_run(config.run) if config.run else None
    run_data = run.config.data if run else DataConfig()
    urls = (config.dataset or run_data.train, *(config.mix or run_data.mix))
    if run:
        dataset = dataset_of_run(run, urls, config.columns or None)
    else:
        caches = [open_storage(url) for url in urls]
        dataset = Dataset([part_of(cache, joined(cache, config.columns)) for cache in caches])
        require_all_bound(config.columns, [part.manifest for part in dataset.parts], "dataset and mix")
    batch = config.batch or (run.config.optim.batch if run else 64)
    seed = config.seed if config.seed >= 0 else (run.config.seed if run else 0)
    check_world(OptimConfig(batch=batch), config.world, "batch", f" (world={config.world})")
    keys = ["dataset", *["mix"] * (len(urls) - 1)]
    require_distinct([(f"{key}={url}", part.manifest) for key, url, part in zip(keys, urls, dataset.parts)])
    order = dataset.order(seed, batch, config.tail or run_data.tail, config.weights or run_data.weights)
    at = config.at if config.at >= 0 else next(iter(committed(run.storage)), 0) if run else 0
    if at % batch:
        raise ConfigError(f"at={at}: batches of {batch} start at {at // batch * batch} and {(at // batch + 1) * batch}")
    rate = config.images_per_s or (measured_rate(run) if run else 0.0)
    memory = int(run.config.data.memory_gb * 1e9) if run else 0
    return Job(dataset, order, at, config.world, config.nodes, rate, memory)


def measured_rate(run: RunInfo) -> float:
    """Images/s of all ranks, the median over the run's last rows of metrics; 0 where there are none."""
    rates = [row.images_per_s for row in read_rows(run.storage, ROWS_BYTES) if row.images_per_s]
    return float(statistics.median(rates)) if rates else 0.0


# --------------------------------------------------------------------------------------------------------------------
# Reads


def located(job: Job, first: int, last: int) -> Iterator[Positions]:
    """The positions of samples [first, last), a few batches at a time."""
    size = max(CHUNK // job.batch, 1) * job.batch
    for start in range(first, last, size):
        yield job.order.locate(np.arange(start, min(start + size, last)))


def reads(job: Job, first: int, last: int) -> Reads:
    """What each rank reads for samples [first, last), if it keeps a block until its last use. In a mixture, whose
    datasets have epochs of their own, a block is kept until its last use in an epoch."""
    times = np.zeros((job.world, len(job.dataset)), dtype=np.int64)
    latest = np.full(times.size, -1)  # epoch in which a rank last read a block
    for positions in located(job, first, last):
        rank = np.arange(len(positions.block)) % job.batch // (job.batch // job.world)
        epoch = positions.epoch if isinstance(job.order, Mixture) else np.zeros_like(positions.epoch)
        turn, pair = np.divmod(np.unique((epoch * job.world + rank) * len(job.dataset) + positions.block), times.size)
        np.add.at(times.reshape(-1), pair, turn > latest[pair])
        np.maximum.at(latest, pair, turn)
    return Reads(last - first, times)


# --------------------------------------------------------------------------------------------------------------------
# In words


def describe(job: Job, batches: int) -> str:
    """The text that the verb prints."""
    order, head = job.order, []
    for number, (part, part_order) in enumerate(zip(job.dataset.parts, orders_of(order), strict=True)):
        manifest = part.manifest
        twice = f", {part_order.repeated:,} twice" if part_order.repeated else ""
        head += [
            f"{part.storage.url}: version {manifest.version} ({manifest.digest[:12]}), {part_order.records:,} records "
            f"in {len(manifest.shards):,} shards, {size(int(part.blocks.bytes.sum()))}, read in {len(part.blocks):,} "
            "blocks",
            f"an epoch is {part_order.epoch_samples:,} samples, {part_order.dropped:,} records left out{twice}; "
            f"lanes: {lanes(part_order)}" + share(order, number),
        ]
    epoch = "" if isinstance(order, Mixture) else f" (epoch {job.at // order.epoch_samples})"
    nodes = f"{job.world} ranks on {job.nodes} node{'s' * (job.nodes > 1)}"
    head.append(f"seed {order.seed}, global batch {job.batch:,}{mixed(order)}; {nodes}, from sample {job.at:,}{epoch}")
    return "\n".join([*head, "", upcoming(job, batches), over_an_epoch(job)])


def lanes(order: Order | Buckets) -> str:
    """The number of lanes of an order, in words."""
    return str(order.lanes) if isinstance(order, Order) else "each bucket's own"


def mixed(order: AnyOrder) -> str:
    """How the datasets of a mixture are mixed, in words; "" for a single dataset."""
    if not isinstance(order, Mixture):
        return ""
    return ", mixed within each" if order.item == 1 else ", each of one dataset (sizes of latents differ)"


def upcoming(job: Job, batches: int) -> str:
    """A table with a row for each node: its ranks, and what they read in the next batches."""
    next_reads = reads(job, job.at, job.at + batches * job.batch)
    per_node = next_reads.by_node(job.nodes, job.dataset.bytes)
    ranks = job.world // job.nodes
    rows = []
    for node in range(job.nodes):
        touched = next_reads.touched[node * ranks : (node + 1) * ranks]
        shards = np.unique(job.dataset.shards[touched.any(axis=0)])
        names = ", ".join(job.dataset.shard_name(shard) for shard in shards[:SHOWN].tolist())
        more = f" and {len(shards) - SHOWN} more" if len(shards) > SHOWN else ""
        rows.append(
            [
                f"{node}",
                f"{node * ranks}" if ranks == 1 else f"{node * ranks} to {(node + 1) * ranks - 1}",
                f"{int(touched.sum()):,}",
                size(int(per_node[node])),
                size(int(per_node[node]) / batches),
                f"{len(shards)}: {names}{more}",
            ]
        )
    title = f"The next {batches} batches, samples {job.at:,} to {job.at + batches * job.batch - 1:,}, from a cold start"
    headings = ["node", "ranks", "blocks", "bytes", "per batch", "shards"]
    return f"{title}:\n" + table(headings, rows, left=(5,))


def over_an_epoch(job: Job) -> str:
    """A table of read amplification, bandwidth and memory over an epoch."""
    epoch = sum(order.epoch_samples for order in orders_of(job.order)) // job.batch * job.batch or job.batch
    first = job.at if isinstance(job.order, Mixture) else job.at // epoch * epoch
    last = first + min(epoch, -(-EPOCH_SAMPLES // job.batch) * job.batch)
    epoch_reads = reads(job, first, last)
    touched = epoch_reads.touched
    distinct, total = int(touched.any(axis=0).sum()), int(touched.sum())
    per_node = epoch_reads.by_node(job.nodes, job.dataset.bytes)
    busiest = float(per_node.max()) / epoch_reads.samples
    share = job.batch // job.world
    needed = max(job.order.window_bytes(job.dataset.bytes, rank * share, share) for rank in range(job.world))
    period = "an epoch" if last - first == epoch else f"the first {last - first:,} samples of the epoch"
    if isinstance(job.order, Mixture):
        period = f"{last - first:,} samples from {first:,} on"
    verdict = "enough" if job.memory >= needed else "TOO LITTLE"
    bound = f"; data.memory_gb={job.memory / 1e9:g} is {verdict}" if job.memory else ""
    rows = [
        ["read amplification", f"{total / distinct:.3f}", f"{total:,} reads of {distinct:,} blocks"],
        ["bytes, busiest node", size(float(per_node.max())), f"of {size(float(per_node.sum()))} by all nodes"],
        ["bytes per image", size(float(per_node.sum()) / epoch_reads.samples), "over all nodes"],
    ]
    if job.images_per_s:
        at_rate = f"at {job.images_per_s:,.0f} images/s of all ranks, busiest node"
        rows.append(["bandwidth", f"{size(busiest * job.images_per_s)}/s", at_rate])
    rows.append(["memory of a rank", size(needed), f"at most{bound}"])
    note = "" if job.images_per_s else "images_per_s=N tells the bandwidth that each node needs.\n"
    return f"Over {period}:\n" + table(["", "", ""], rows, left=(0, 2)).partition("\n")[2] + note


def size(count: float) -> str:
    """A number of bytes as text: 950 B, 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["data", *sys.argv[1:]]))
