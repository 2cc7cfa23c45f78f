"""A small cache and runs of `latentmill train` on it for tests in which the data fail; also a rank of such runs:
`python -m ranks.faulty_run FOLDER URL SCENARIO...`, started by pipeline.distributed.ranks.

There are so many shards, and so little memory, that a run reads from its store until it ends. Stream, UNet, engine,
checkpoints and ledger are the real ones.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from made import cache as small_cache
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EmaConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.data.format.manifest import load_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Batch, Stream
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import guarded, leave
from pipeline.distributed.world import World
from pipeline.runs import lease
from pipeline.runs.checkpoint import read_commit, verify
from pipeline.runs.directory import committed
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage import patience
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import parse_rows
from pipeline.training.trainer import Trainer

SIZES = [8] * 12
UNEVEN = [20, 17, 9]
BATCH = 8
EVERY = 5 * BATCH  # samples between commits
END = 20 * BATCH  # in the second epoch
MOVE = 10 * BATCH
LONG = 2 * MOVE + 50 * BATCH
MODEL = ModelConfig(
    channels=8, multipliers=(1,), blocks=1, attention=(1,), heads=2, context_width=small_cache.WIDTH, norm_groups=4
)
TWO = DeepSpeedConfig(stage=2)


def make_cache(folder: Path, sizes: list[int] | None = None) -> str:
    small_cache.make_cache(str(folder), sizes or SIZES)
    return str(folder)


def upload(cache: str, url: str) -> Storage:
    """Copy a cache from a disk to a URL."""
    storage = open_storage(url)
    for info in open_storage(cache).list():
        storage.put(info.key, open_storage(cache).get(info.key))
    return storage


def config_of(run: str, cache: str, like: str = "", world: int = 1, **changes: Any) -> TrainConfig:
    """A run whose ranks have memory for one window each. like: a copy of the cache to read the manifest from, if not
    `cache`. changes: fields, and `every`, the samples between commits."""
    storage = open_storage(like or cache)
    blocks = dataset_of(storage, load_manifest(storage))
    order, share = blocks.order(3, BATCH), BATCH // world
    window_bytes = max(order.window_bytes(blocks.bytes, rank * share, share) for rank in range(world))
    base = TrainConfig(
        run=run,
        seed=3,
        data=DataConfig(train=cache, memory_gb=(window_bytes + 1) / 1e9, prefetch=1),
        model=MODEL,
        optim=OptimConfig(lr=1e-3, warmup=80, batch=BATCH),
        ema=EmaConfig(half_life=200.0),
        deepspeed=DeepSpeedConfig(engine="torch") if world == 1 else TWO,
        checkpoint=CheckpointConfig(every=changes.pop("every", EVERY), keep=20),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=END,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )
    return replace(base, **changes)


def users(cache: str, shard: str, n: int, world: int) -> list[int]:
    """Ranks whose share of the global batch at n contains a record of a shard."""
    storage = open_storage(cache)
    manifest = load_manifest(storage)
    blocks = dataset_of(storage, manifest)
    located = blocks.order(3, BATCH).locate(np.arange(n, n + BATCH))
    names = [manifest.shards[number].name for number in blocks.shards[located.block].tolist()]
    return sorted({place // (BATCH // world) for place, name in enumerate(names) if name == shard})


def late_shard(cache: str, world: int) -> tuple[str, int]:
    """The shard that is needed latest, and the n of the batch that needs it first."""
    first_needed = {
        entry.name: next(n for n in range(0, END, BATCH) if users(cache, entry.name, n, world))
        for entry in load_manifest(open_storage(cache)).shards
    }
    name = max(first_needed, key=lambda name: first_needed[name])
    return name, first_needed[name]


def damaged(data: bytes, how: str, other: bytes) -> bytes:
    """The bytes of a shard with a flipped bit, truncated, or replaced by another shard."""
    middle = len(data) // 2
    if how == "flip":
        return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    return data[: middle - 100] if how == "cut" else other


# --------------------------------------------------------------------------------------------------------------------
# The results of a run


def state(url: str, n: int = 0) -> tuple[int, list[str], tuple[int, int, int]]:
    """Returns n, the hashes of a commit's files (weights, both moments, EMA), and the totals of the ledger up to it
    (samples, records, noise). n: 0 for the newest commit. Verifies that the files are what the commit says."""
    run = open_storage(url)
    commit = read_commit(run, n or committed(run)[0])
    verify(run, commit)
    lines = [line for line in read_ledger(run) if line.last <= commit.n]
    return commit.n, [entry["sha256"] for entry in commit.files], totals(lines)


def rows(url: str) -> dict[int, dict[str, Any]]:
    """Rows of training metrics, one per step, by n."""
    return {row["n"]: row for row in parse_rows(open_storage(url).get("metrics.jsonl")) if row["kind"] == "train"}


def losses(url: str) -> dict[int, float]:
    return {n: row["loss"] for n, row in rows(url).items()}


# --------------------------------------------------------------------------------------------------------------------
# Ranks


def attempt(config: TrainConfig, world: World) -> list[Any]:
    """Train as a rank of a world that lives on. Returns how the run ended, and whether all ranks ended in this way."""
    try:
        train.train(config, world)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # the frames hold the engine
        return [type(error).__name__, str(error), distributed.is_shared(error)]
    return ["finished", "", True]


def straight(world: World, folder: Path, url: str) -> None:
    """Trains undisturbed from the disk."""
    attempt(config_of(f"{folder}/straight", f"{folder}/cache", world=world.size, samples=LONG), world)


def damages(world: World, folder: Path, url: str) -> None:
    """Damages a shard that is needed late (flip, cut or swap) before the first batch; then repairs it and runs the same
    command again."""
    name, _ = late_shard(f"{folder}/cache", world.size)
    good, other = (Path(folder, "cache", shard).read_bytes() for shard in (name, "000000.tar"))
    next_batch = Trainer._next_batch
    for how in ("flip", "cut", "swap"):
        cache = open_storage(f"{url}/{how}")

        def damage(self: Trainer, stream: Stream, how: str = how, cache: Storage = cache) -> Batch:
            if self.n == 0:
                world.barrier()  # every rank has checked that its shards exist
                if world.rank == 0:
                    cache.put(name, damaged(good, how, other))
                world.barrier()
            return next_batch(self, stream)

        config = config_of(f"{folder}/{how}", cache.url, f"{folder}/cache", world.size)
        Trainer._next_batch = damage  # type: ignore[method-assign]
        outcome: dict[str, Any] = {"damaged": attempt(config, world)}
        Trainer._next_batch = next_batch  # type: ignore[method-assign]
        if world.rank == 0:
            outcome |= {"committed": state(config.run)[0], "steps": max(rows(config.run))}
            cache.put(name, good)
        world.barrier()
        outcome["mended"] = attempt(config, world)
        tell(Path(config.run), world, outcome)


def missing(world: World, folder: Path, url: str) -> None:
    """Trains on a cache that lacks a shard."""
    config = config_of(f"{folder}/missing", f"{url}/missing", f"{folder}/cache", world.size)
    tell(Path(config.run), world, attempt(config, world))


def absent(world: World, folder: Path, url: str) -> None:
    """Trains on a cache that does not exist."""
    config = config_of(f"{folder}/absent", f"{url}/absent", f"{folder}/cache", world.size)
    tell(Path(config.run), world, attempt(config, world))


def uneven(world: World, folder: Path, url: str) -> None:
    """Trains on three uneven shards, with one reading thread per rank and with four."""
    for workers in (1, 4):
        config = config_of(f"{folder}/uneven{workers}", f"{url}/uneven", f"{folder}/uneven", world.size)
        attempt(replace(config, data=replace(config.data, workers=workers)), world)


def flaky(world: World, folder: Path, url: str) -> None:
    """Trains on a cache for which the proxy injects temporary faults."""
    attempt(config_of(f"{folder}/flaky", f"{url}/flaky", f"{folder}/cache", world.size), world)


def gone(world: World, folder: Path, url: str) -> None:
    """Trains while the store of cache and run is gone, until an object "back" is written; then runs the same command
    again."""
    config = config_of(f"{url}/gone/run", f"{url}/gone", f"{folder}/cache", world.size)
    outcome: dict[str, Any] = {"gone": attempt(config, world)}
    if world.rank == 0:
        open_storage(f"{url}/gone").put("back", b"")
        outcome["committed"] = state(config.run)[0]
    world.barrier()
    outcome["back"] = attempt(config, world)
    tell(folder / "gone", world, outcome)


def moves(world: World, folder: Path, url: str) -> None:
    """Trains MOVE samples on all ranks, MOVE more on one of them, and the rest on all ranks again."""
    for size, samples in ((world.size, MOVE), (1, 2 * MOVE), (world.size, LONG)):
        config = config_of(f"{folder}/moved", f"{folder}/cache", world=size, samples=samples, every=MOVE)
        if size > 1 or world.rank == 0:
            attempt(config, world if size > 1 else World())
        world.barrier()


def tell(run: Path, world: World, outcome: Any) -> None:
    """Writes what a rank saw, for the test."""
    run.mkdir(parents=True, exist_ok=True)
    (run / f"outcome{world.rank}.json").write_text(json.dumps(outcome))


def main(argv: list[str]) -> int:
    """`patient` as the first scenario keeps the default patience with S3; `verb=RUN` as the last one runs the verb."""
    folder, url, *scenarios = argv
    if scenarios[0] == "patient":
        del scenarios[0]
    else:
        patience.PATIENCE_SECONDS, patience.PAUSES = 3.0, (0.1, 0.4)
        lease.PAUSE_SECONDS = 0.05
    world = distributed.start("cpu", threads=1)
    for scenario in scenarios:
        if scenario.startswith("verb="):
            run = scenario.removeprefix("verb=")
            config = config_of(run, f"{url}/verb", f"{folder}/cache", world.size)
            return guarded("train", partial(train.main, config))  # which leaves the world
        globals()[scenario](world, Path(folder), url)
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
