"""Cost of finding the record of a sample number among a billion samples, and a proof over all of them.

.venv/bin/python -m benchmarks.order [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, keep, machine, table
from pipeline.data.order.shuffle import Order
from pipeline.data.reading.stream import PLAN_BATCHES, PLAN_SAMPLES
from pipeline.distributed.exits import guarded
from pipeline.errors import ConfigError

EPILOG = """\
keys: samples=1000000000 shards=100000 ranks=4096 ranks_per_node=8 batch=16384
blocks=5 (of a shard) processes=2 simulate=1 (0 leaves the simulation out)
It prints the time to start one rank anywhere, its memory, the time for each sample after that, and, from a simulation
of every sample of one epoch, that each record is one sample, and how many shards the nodes read.
"""
CHUNK = 1 << 18  # samples located together
STARTS = 20


@dataclass(frozen=True)
class World:
    """A dataset and the ranks that read it."""

    samples: int = 1_000_000_000
    shards: int = 100_000
    blocks: int = 5
    ranks: int = 4096
    ranks_per_node: int = 8
    batch: int = 16_384
    processes: int = 2
    simulate: int = 1

    def order(self, seed: int = 0) -> Order:
        """The dataset's order, with blocks of nearly equal sizes."""
        count = self.shards * self.blocks
        sizes = np.diff(np.arange(count + 1) * self.samples // count)
        return Order(sizes, seed, self.batch, block_shards=np.repeat(np.arange(self.shards), self.blocks))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.order",
        description="What it costs to know which record a sample is, in a world of a billion samples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the table to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.order", *options.overrides])
    return guarded("benchmarks.order", lambda: run(changed(World(), options.overrides), command, write=options.write))


def run(world: World, command: str, *, write: bool) -> int:
    """Measure and print. Raises ConfigError for ranks that do not divide the batch."""
    import torch

    if world.batch % world.ranks or world.ranks % world.ranks_per_node:
        raise ConfigError(f"ranks={world.ranks} must divide batch={world.batch}, and ranks_per_node the ranks")
    with ProcessPoolExecutor(1) as pool:  # a process that has done nothing else
        rows = pool.submit(one_rank, world).result()
    rows += simulated(world) if world.simulate else []
    head = f"# {command}\n\n" + "\n".join(machine(torch.device("cpu"), 1))
    text = f"{head}\n\n{table(['what', 'measured', 'target'], rows)}\n"
    print(text)
    if write:
        path = keep(f"order-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def one_rank(world: World) -> list[list[str]]:
    """Rows about one rank: its start at random places, its memory, and the time per sample afterwards."""
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(0)
    share = world.batch // world.ranks
    batches_per_call = max(PLAN_BATCHES, PLAN_SAMPLES // share)  # the stream locates so many batches in one call
    starts, rates = [], []
    for rank in rng.integers(0, world.ranks, STARTS).tolist():
        began = time.perf_counter()
        order = world.order()
        batch = int(rng.integers(0, 3 * order.epoch_samples // world.batch))
        first = batch * world.batch + rank * share
        order.locate(first + np.arange(share))
        starts.append(time.perf_counter() - began)
        batches = (
            first
            + world.batch * np.arange(1, 1 + 16 * batches_per_call).reshape(16, batches_per_call, 1)
            + np.arange(share)
        )
        order.locate(batches[0].reshape(-1))  # into the epoch of these batches
        began = time.perf_counter()
        for numbers in batches:
            order.locate(numbers.reshape(-1))
        rates.append((time.perf_counter() - began) / batches.size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    return [
        [
            "to start one rank anywhere: median of 20, and slowest",
            f"{np.median(starts):.2f}, {max(starts):.2f} s",
            "1 s",
        ],
        ["its memory, over that of its imports", f"{peak / 1e3:.0f} MB", "200 MB"],
        [f"then, for each sample ({batches_per_call * share:,} at a time)", f"{np.median(rates) * 1e6:.2f} us", "1 us"],
    ]


def simulated(world: World) -> list[list[str]]:
    """Rows about one whole epoch of all ranks."""
    order = world.order()
    began = time.perf_counter()
    batches = order.epoch_samples // world.batch
    borders = [batches * i // world.processes for i in range(world.processes + 1)]
    spans = list(pairwise(borders))
    with ProcessPoolExecutor(world.processes) as pool:
        parts = list(pool.map(part_of_epoch, [world] * len(spans), *zip(*spans)))
    seen_bits = np.zeros(-(-world.samples // 8), dtype=np.uint8)
    twice = 0
    for bits, _ in parts:
        twice += int(np.bitwise_count(seen_bits & bits).sum())
        seen_bits |= bits
    once = int(np.bitwise_count(seen_bits).sum())
    touched = np.logical_or.reduce([nodes for _, nodes in parts])
    per_node = touched.sum(axis=1)
    nodes, shards = touched.shape
    each_once = once == order.epoch_samples and not twice
    seconds = time.perf_counter() - began
    return [
        [
            f"an epoch of {order.epoch_samples:,} samples",
            f"{once:,} different records, {order.dropped:,} left out; {'each once' if each_once else 'NOT EACH ONCE'}",
            "each once",
        ],
        [
            f"shards that a node reads in it ({nodes} nodes, {order.lanes} lanes)",
            f"{int(np.median(per_node)):,} ({per_node.min():,} to {per_node.max():,}) of {shards:,}",
            "",
        ],
        ["shards that all nodes read, over those that there are", f"{per_node.sum() / shards:.2f}", ""],
        [f"all of that, by {world.processes} processes", f"{seconds:.0f} s", ""],
    ]


def part_of_epoch(world: World, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches first to last - 1 of epoch 0: (a bit for each record seen; (nodes, shards) bool, which nodes read which
    shards). Raises SystemExit when a record occurs twice."""
    order = world.order()
    starts = np.cumsum(order.sizes) - order.sizes
    nodes = world.ranks // world.ranks_per_node
    seen = np.zeros(-(-world.samples // 8) * 8, dtype=bool)
    touched = np.zeros((nodes, world.shards), dtype=bool)
    size = max(CHUNK // world.batch, 1)
    node = np.arange(world.batch) * nodes // world.batch
    for start in range(first, last, size):
        count = min(size, last - start)
        positions = order.locate(np.arange(start * world.batch, (start + count) * world.batch))
        record = starts[positions.block] + positions.place
        if seen[record].any() or len(np.unique(record)) != len(record):
            raise SystemExit(f"a record comes twice in batches {start} to {start + count - 1}")
        seen[record] = True
        touched[np.tile(node, count), order.shards[positions.block]] = True
    return np.packbits(seen), touched


if __name__ == "__main__":
    raise SystemExit(main())
