"""A run of a billion samples on thousands of ranks, simulated: what it asks of the bucket, what it loses to faults, and
which of its limits it meets.

.venv/bin/python -m benchmarks.at_scale [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, keep, machine, table
from benchmarks.scale.bucket import Asked
from benchmarks.scale.committing import Commits, commits_of
from benchmarks.scale.dataset import Reads, Start, manifest_of, reads_of, start_of
from benchmarks.scale.running import Outcome, Phases, run
from benchmarks.scale.trace import slowest, trace_of
from benchmarks.scale.world import World
from pipeline.data.format.manifest import LARGEST, manifest_bytes
from pipeline.distributed.exits import guarded
from pipeline.runs.checkpoint import COMMIT_BYTES
from pipeline.runs.lease import BEAT_SECONDS

EPILOG = """\
keys: those of World (benchmarks/scale/world.py), such as samples=1000000000 shards=100000 ranks=4096 batch=16384
days=14 seed=0 preemptions=1.0 mtbf_days=264 latency_ms=20. No GPU and no network is used: order, blocks, manifest,
commits, retention, resume and lease are the program's own code on a bucket in memory that counts; steps, faults and
seconds of requests are arithmetic on the keys.
"""
SEEDS = 5
"""Traces, of which the goodput's spread is shown."""
COPY_GB_S = 10.0
"""Of a rank's memory, for the copy that a commit waits for."""


@dataclass(frozen=True)
class Found:
    """Everything that was found out about a world."""

    world: World
    start: Start
    reads: Reads
    commits: Commits
    phases: Phases
    outcomes: list[Outcome]
    waits: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.at_scale",
        description="A billion samples on thousands of ranks with faults, simulated.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.at_scale", *options.overrides])
    return guarded("benchmarks.at_scale", lambda: show(changed(World(), options.overrides), command, options.write))


def show(world: World, command: str, write: bool) -> int:
    """Simulate, and print."""
    import torch

    text = f"# {command}\n\n" + "\n".join(machine(torch.device("cpu"), 1)) + "\n\n" + told(found_of(world)) + "\n"
    print(text)
    if write:
        path = keep(f"at-scale-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def found_of(world: World) -> Found:
    """Simulates a world. The rank that is looked at runs in a process that has done nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        path.write_bytes(manifest_bytes(manifest_of(world)))
        with new_process() as pool:
            start = pool.submit(start_of, world, path).result()
        with new_process() as pool:
            reads = pool.submit(reads_of, world, path).result()
    commits = commits_of(world)
    phases = phases_of(world, start, commits, reads)
    seeds = [replace(world, seed=world.seed + i) for i in range(SEEDS)]
    waits = slowest(world)
    outcomes = [run(one, trace_of(one), phases, waits) for one in seeds]
    return Found(world, start, reads, commits, phases, outcomes, waits)


def new_process() -> ProcessPoolExecutor:
    """A process that shares no memory with this one, as a fork would."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


# --------------------------------------------------------------------------------------------------------------------
# Seconds


def by_all(world: World, asked: Asked) -> float:
    """Seconds until every rank has asked for it: one request after the other, at no more than the bucket answers of one
    prefix, and its bytes through the networks."""
    return max(
        asked.seconds,
        world.ranks * asked.reads / world.gets,
        world.ranks * asked.writes / world.puts,
        8e-9 * world.ranks_per_node * asked.bytes / world.node_gbit,
        8e-9 * world.ranks * asked.bytes / world.bucket_gbit,
    )


def phases_of(world: World, start: Start, commits: Commits, reads: Reads) -> Phases:
    """Seconds of the phases of a life."""
    computing = start.load_s + start.order_s + start.check_s
    first_window = 8e-9 * reads.window * world.ranks_per_node / world.node_gbit
    state = 8e-9 * world.state_bytes / world.bucket_gbit
    begin = (
        by_all(world, start.asked)
        + start.looked.seconds
        + computing
        + by_all(world, commits.resume)
        + 2 * state
        + first_window
    )
    copy = 1e-9 * world.state_bytes / world.ranks / COPY_GB_S
    write = by_all(world, commits.part) + 2 * state + commits.commit.seconds  # written, and read back
    return Phases(world.group_s + begin, copy, write, commits.tidy.seconds)


# --------------------------------------------------------------------------------------------------------------------
# In words


def told(found: Found) -> str:
    """The tables."""
    parts = [
        ("The dataset and its reads", ["what", "value"], of_reads(found)),
        ("A rank, when it starts", ["what", "value"], of_start(found)),
        ("Commits, resume and lease", ["what", "requests", "seconds"], of_commits(found)),
        ("The bucket's prefixes", ["what", "prefix", "requests", "a second", "S3 takes"], of_prefixes(found)),
        (f"{found.world.days:g} days with faults", ["what", "value"], of_run(found)),
        ("Limits", ["what", "value", "limit", "verdict"], limits(found)),
    ]
    return "\n\n".join(f"## {title}\n\n{table(head, rows)}" for title, head, rows in parts)


def of_reads(found: Found) -> list[list[str]]:
    world, reads, cache = found.world, found.reads, found.world.cache
    seconds = reads.samples / (world.ranks * world.images_per_s)
    return [
        ["records, tars, objects", f"{cache.records:,}, {cache.tars:,}, {cache.objects:,}"],
        ["bytes, of a record", f"{cache.total / 1e12:.1f} TB, {cache.record_bytes:,.0f} B"],
        ["blocks, lanes", f"{reads.all_blocks:,} of {reads.block_bytes / 1e6:.1f} MB, {reads.lanes}"],
        ["reads of blocks by ranks, over one each", f"{reads.blocks * reads.block_bytes / wanted(found):.2f}"],
        ["the same where ranks of a node would share", f"{reads.node_blocks * reads.block_bytes / wanted(found):.2f}"],
        ["images/s of all ranks", f"{world.ranks * world.images_per_s:,.0f}"],
        ["reads of blocks a second", f"{reads.blocks / seconds:,.0f}"],
        ["reads of indexes a second", f"{reads.indexes / seconds:,.1f}"],
        ["bandwidth of a node, of all", f"{node_gbit(found):.2f}, {world.nodes * node_gbit(found):,.0f} Gbit/s"],
        ["memory for blocks of a rank, at most", f"{reads.window / 1e9:.2f} GB"],
    ]


def wanted(found: Found) -> float:
    """Bytes of the samples that were read."""
    return found.reads.samples * found.world.cache.record_bytes


def node_gbit(found: Found) -> float:
    """Gbit/s that a node reads."""
    seconds = found.reads.samples / (found.world.ranks * found.world.images_per_s)
    return 8e-9 * found.reads.bytes / seconds / found.world.nodes


def of_start(found: Found) -> list[list[str]]:
    start, world = found.start, found.world
    return [
        ["manifest", f"{start.manifest_bytes / 1e6:.1f} MB, read by every rank"],
        ["seconds of its processor to read and check it", f"{start.load_s:.2f}"],
        ["for blocks, order and the first samples", f"{start.order_s:.2f}"],
        ["to compare a listing with it (the first rank)", f"{start.check_s:.2f}"],
        ["then, for each sample", f"{start.locate_us:.2f} us"],
        ["memory of a rank, of a node", f"{start.rss / 1e6:,.0f} MB, {start.rss * world.ranks_per_node / 1e9:.1f} GB"],
        ["requests of a rank", kinds(start.asked)],
        ["of the first rank besides", f"{kinds(start.looked)}, {start.looked.seconds:,.0f} s"],
        ["of all ranks", f"{world.ranks * start.asked.total:,}, {by_all(world, start.asked):,.0f} s"],
    ]


def kinds(asked: Asked) -> str:
    """Requests by kind."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(asked.by_kind.items()))


def of_commits(found: Found) -> list[list[str]]:
    world, commits = found.world, found.commits
    rows = [
        ("part of a rank", commits.part, by_all(world, commits.part)),
        ("rank 0, until commit.json", commits.commit, commits.commit.seconds),
        ("rank 0, removing the oldest", commits.tidy, commits.tidy.seconds),
        ("resume, by every rank", commits.resume, by_all(world, commits.resume)),
        ("lease: taken", commits.take, commits.take.seconds),
        ("lease: every 30 s", commits.beat, commits.beat.seconds),
    ]
    return [[what, kinds(asked), f"{seconds:,.1f}"] for what, asked, seconds in rows]


def of_prefixes(found: Found) -> list[list[str]]:
    """Requests of all ranks by the prefix that most of them go to: while training, and at once at other times."""
    world, start, commits = found.world, found.start.asked, found.commits
    root, folder, writes = "(the dataset's root)", "checkpoints/N/", world.ranks * commits.part.writes
    training = world.ranks * world.images_per_s / found.reads.samples * (found.reads.blocks + found.reads.indexes)
    resume = world.ranks * commits.resume.reads
    return [
        ["training: blocks and indexes", root, "", f"{training:,.0f}", f"{world.gets:,.0f} reads"],
        ["training: lease", "lease/", "", f"{commits.beat.total / BEAT_SECONDS:.2f}", f"{world.puts:,.0f} writes"],
        ["a start, at once", root, f"{world.ranks * start.reads:,}", "all at once", f"{world.gets:,.0f} reads"],
        ["a commit, at once", folder, f"{writes:,}", "all at once", f"{world.puts:,.0f} writes"],
        ["a resume, at once", folder, f"{resume:,}", "all at once", f"{world.gets:,.0f} reads"],
    ]


def of_run(found: Found) -> list[list[str]]:
    world, first, phases = found.world, found.outcomes[0], found.phases
    step, again = world.step_s, phases.write + phases.tidy
    goodputs = sorted(one.goodput for one in found.outcomes)
    shares = [
        [f"- {what}", f"{100 * seconds / first.clock:.2f} %"]
        for what, seconds in sorted(first.seconds.items(), key=lambda item: -item[1])
    ]
    return [
        ["a step, undisturbed and for the slowest node", f"{1e3 * step:.1f}, {1e3 * step * found.waits:.1f} ms"],
        ["a life until its first step", f"{phases.start:,.0f} s"],
        ["a commit until it is there, until the next may begin", f"{phases.write:,.1f}, {again:,.1f} s"],
        ["commits, lives", f"{first.commits:,}, {first.lives}"],
        ["failures of nodes, preemptions", f"{first.failures}, {first.preemptions}"],
        ["preemptions whose commit came too late", f"{first.late} of {first.preemptions}"],
        ["samples, epochs", f"{first.samples:,}, {first.samples / world.samples:.2f}"],
        ["goodput", f"{first.goodput:.3f} ({goodputs[0]:.3f} to {goodputs[-1]:.3f} of {SEEDS} traces)"],
        *shares,
    ]


def limits(found: Found) -> list[list[str]]:
    """What has a bound, and whether this world keeps it."""
    world, reads, phases = found.world, found.reads, found.phases
    seconds = reads.samples / (world.ranks * world.images_per_s)
    gets = (reads.blocks + reads.indexes) / seconds
    prefixes = math.ceil(gets / world.gets)
    # The signal may come when a commit has just begun, which must be there and tidied up after before the next one.
    last = 2 * phases.write + phases.tidy + phases.copy
    checks = [
        ("reads a second of one prefix", gets, world.gets, f"spread over {prefixes} prefixes (data.mix)"),
        ("Gbit/s of a node", node_gbit(found), world.node_gbit, "larger batch, or data.cache"),
        ("Gbit/s of the bucket", world.nodes * node_gbit(found), world.bucket_gbit, "larger batch, or data.cache"),
        ("GB for blocks of a rank", reads.window / 1e9, world.memory_gb, "raise data.memory_gb"),
        ("seconds to look at the dataset", by_all(world, found.start.asked), 300.0, "fewer, larger tars"),
        ("seconds to read a commit's headers", by_all(world, found.commits.resume), 300.0, "fewer ranks that write"),
        ("seconds of a commit at a preemption, at most", last, world.grace_s, "a longer grace"),
        ("seconds between commits, at the least", phases.write + phases.tidy, world.every_s, "commit less often"),
        ("MB of the manifest", found.start.manifest_bytes / 1e6, LARGEST / 1e6, "larger tars"),
        ("MB of commit.json", found.commits.commit_bytes / 1e6, COMMIT_BYTES / 1e6, "fewer ranks"),
    ]
    return [
        [what, f"{value:,.1f}", f"{bound:,.0f}", "kept" if value <= bound else f"MISSED: {remedy}"]
        for what, value, bound, remedy in checks
    ]


if __name__ == "__main__":
    raise SystemExit(main())
