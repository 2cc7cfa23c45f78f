"""What a commit, a resume and a lease ask of the bucket, by running their own code for as many ranks, whose files have
a few bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.scale.bucket import Asked, Bucket
from benchmarks.scale.world import World
from pipeline.distributed import world as distributed
from pipeline.runs import lease as leases
from pipeline.runs.checkpoint import Reader, newest_good
from pipeline.runs.directory import committed
from pipeline.runs.fragments import Fragment
from pipeline.runs.names import COMMIT, checkpoint_folder
from pipeline.runs.retention import Retention, retain
from pipeline.training.saver import Saver, Stamp

KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
LIFE = "0a1b2c3d"
RUN = "s3://scale/run"


@dataclass(frozen=True)
class Commits:
    """part: what each rank asks for to store its part. commit: what rank 0 asks for, its part included, until
    commit.json is there. tidy: and then, to remove the oldest checkpoint. resume: what rank 0 asks for to find the
    newest commit, to verify its own file and to read where values lie, which each rank does. take, beat: of the lease.
    commit_bytes: of commit.json."""

    part: Asked
    commit: Asked
    tidy: Asked
    resume: Asked
    take: Asked
    beat: Asked
    commit_bytes: int


def commits_of(world: World) -> Commits:
    """Commits of the world's ranks, with `keep` checkpoints there before."""
    run, stamp = Bucket(world.latency_ms / 1e3, RUN), stamp_of(world)
    numbers = [world.every * (i + 1) for i in range(world.keep + 1)]
    for n in numbers[:-1]:
        store_others(run, stamp, world, n)
        save(run, stamp, world, n)
    store_others(run, stamp, world, numbers[-1])
    with run.counting() as part:
        store(run, stamp, world, world.ranks - 1, numbers[-1])
    with run.counting() as commit:
        save(run, stamp, world, numbers[-1])
    with run.counting() as tidy:
        retain(run, Retention(world.keep))
    assert committed(run) == numbers[:0:-1], "the oldest commit alone is removed"
    with run.counting() as resume:
        found = newest_good(run, distributed.World(0, world.ranks))
        assert found is not None and found.n == numbers[-1]
        Reader(run, found)
    with run.counting() as take:
        lease = take_lease(run)
    with run.counting() as beat:
        lease.require_held()
        lease._put(lease.holder)
    lease.release("stopped")
    commit_bytes = len(run.objects[checkpoint_folder(numbers[-1]) + COMMIT])
    assert len(found.files) == world.ranks
    return Commits(part, commit, tidy, resume, take, beat, commit_bytes)


def stamp_of(world: World) -> Stamp:
    """What all commits of the run share: of each rank a parameter of its own."""
    return Stamp("zero2", {}, {"train": "0" * 64}, {f"p{rank}": [2] for rank in range(world.ranks)})


def store_others(run: Bucket, stamp: Stamp, world: World, n: int) -> None:
    """Stores the parts of all ranks but the first."""
    for rank in range(1, world.ranks):
        store(run, stamp, world, rank, n)


def store(run: Bucket, stamp: Stamp, world: World, rank: int, n: int) -> None:
    """Stores the part of a rank. Its peers are not asked: ranks meet through the bucket."""
    saver = Saver(run, distributed.World(rank, world.ranks), stamp, background=False, life=LIFE)
    saver._write_file(run, n, {f"{kind}/p{rank}@0": torch.zeros(2) for kind in KINDS})


def save(run: Bucket, stamp: Stamp, world: World, n: int) -> None:
    """Stores rank 0's part, and commits."""
    with Saver(run, distributed.World(0, world.ranks), stamp, background=False, life=LIFE) as saver:
        saver.begin(n, n // world.batch, {kind: [Fragment("p0", 0, torch.zeros(2))] for kind in KINDS})


def take_lease(run: Bucket) -> leases.Lease:
    """Takes the lease of a run that another process left."""
    former = replace(leases.this_process(), state="stopped")
    run.objects["lease/000001.json"] = leases.holder_bytes(former)
    pause, leases.PAUSE_SECONDS = leases.PAUSE_SECONDS, 0.0
    try:
        return leases.Lease.take(run)
    finally:
        leases.PAUSE_SECONDS = pause
