"""Runs that only consume data: the real stream, ledger and run directory without a network, all ranks in one process.

They are killed at the point that a test chooses, and continue on another number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig, OptimConfig, TrainConfig
from pipeline.data.format.records import record_key
from pipeline.data.joined.opening import joined
from pipeline.data.order.dataset import Dataset, part_of
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.runs.directory import COLUMNS, COMMIT, checkpoint_folder, committed, dataset_urls, roles
from pipeline.runs.ledger import Ledger, noise_digest, truncate_ledgers
from pipeline.storage.urls import open_storage
from pipeline.training.life import describe_run

SIZES = [7, 12, 5, 9, 11]  # 44 records, of which an epoch uses 40
BATCH = 8
EVERY = 3 * BATCH  # samples between commits
END = 30 * BATCH
WORLDS = (1, 2, 4)

Seen = dict[int, tuple[str, str]]
"""By sample number: the key of its record and the hash of its moments."""
Change = Callable[[int, Batch], list[Batch]]
"""(rank, batch) -> the batches that the rank trains on instead."""


def begin(
    folder: Path | str,
    cache: str,
    seed: int = 3,
    mix: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
    columns: tuple[str, ...] = (),
) -> TrainConfig:
    """Make a run directory in which nothing has been trained."""
    data = DataConfig(train=cache, mix=mix, weights=weights, columns=columns)
    config = TrainConfig(run=str(folder), data=data, optim=OptimConfig(batch=BATCH), seed=seed)
    dataset = dataset_of(config)
    manifests = [part.manifest for part in dataset.parts]
    digests = dict(zip(roles(len(manifests)), [manifest.own.digest for manifest in manifests], strict=True))
    digests |= {COLUMNS: dataset.columns} if dataset.columns else {}
    describe_run(config, open_storage(config.run), manifests[0], digests, dataset.whole_weights(weights))
    return config


def dataset_of(config: TrainConfig) -> Dataset:
    """The dataset that a run reads."""
    caches = [open_storage(url) for url in dataset_urls(config.data)]
    return Dataset([part_of(cache, joined(cache, config.data.columns)) for cache in caches])


def live(
    config: TrainConfig,
    world: int,
    seen: Seen,
    *,
    steps: int = 10**6,
    torn: int = 0,
    change: Change = lambda rank, batch: [batch],
) -> None:
    """One execution of a run on `world` ranks: it resumes, consumes, commits every EVERY samples, and is killed after
    `steps` steps unless it reaches END first. torn: the number of ranks that had written their ledgers when the kill
    came in the middle of a commit; the next rank's line is written in part."""
    run, dataset = open_storage(config.run), dataset_of(config)
    order = dataset.order(config.seed, BATCH, weights=config.data.weights)
    starts = dataset.shard_starts
    members = ("moments", "tokens", "column.extra") if dataset.columns else ("moments", "text")
    n = next(iter(committed(run)), 0)
    truncate_ledgers(run, n)
    with ExitStack() as stack:
        streams = [
            stack.enter_context(
                Stream(
                    dataset,
                    order,
                    rank=rank,
                    world=world,
                    batch=BATCH,
                    start_n=n,
                    seed=config.seed,
                    prefetch=1,
                    members=members,
                )
            )
            for rank in range(world)
        ]
        ledgers = [Ledger(run, Path(config.run), rank, world, dataset.columns) for rank in range(world)]
        for ledger in ledgers:
            ledger.start(n)
        while n < END and steps > 0:
            for rank in range(world):
                batch_of_rank = next(streams[rank])
                shard_numbers = (
                    batch_of_rank.shards.numpy()
                    - starts[np.searchsorted(starts, batch_of_rank.shards.numpy(), side="right") - 1]
                )
                places = zip(shard_numbers.tolist(), batch_of_rank.rows.tolist())
                assert batch_of_rank.keys == [record_key(shard, row) for shard, row in places]
                for batch in change(rank, batch_of_rank):
                    draws = [batch.numbers * 3, *([] if batch.chosen is None else [batch.chosen])]
                    ledgers[rank].add(batch.numbers, batch.shards, batch.rows, noise_digest(batch.numbers, draws))
                    for number, key, moments in zip(batch.numbers.tolist(), batch.keys, batch.tensors["moments"]):
                        record = key, hashlib.sha256(moments.numpy().tobytes()).hexdigest()
                        assert seen.setdefault(number, record) == record
            n, steps = n + BATCH, steps - 1
            if n % EVERY == 0 or n == END:
                for ledger in ledgers:
                    ledger.commit(n)
                run.put(f"{checkpoint_folder(n)}{COMMIT}", b"{}")
    if torn and n < END:
        for ledger in ledgers[:torn]:
            ledger.commit(n)
        path = Path(config.run) / "ledger" / f"rank{torn % world:05d}.jsonl"
        with open(path, "a") as file:
            file.write('{"first": 7, "la')
