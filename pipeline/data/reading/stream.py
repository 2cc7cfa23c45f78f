"""The stream of batches that the trainer reads, from verified shards.

One thread runs ahead of the training loop, in the sequence that `Order` determines, and asks a few others to fetch the
next blocks, as far ahead as the memory bound allows. A record is used only after its SHA-256 has matched its index, and
the index's SHA-256 the manifest. Nothing is random here: a batch depends only on (order, rank, world, n), and which of
a record's captions a sample sees on (seed, sample number).
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from pipeline.data.format.members import OF_CAPTIONS, has_several, held
from pipeline.data.format.present import require_shards
from pipeline.data.order.dataset import Dataset
from pipeline.data.order.mixture import AnyOrder
from pipeline.data.reading.batch import Batch, collate
from pipeline.data.reading.device import BatchTransfer, PendingBatch
from pipeline.data.reading.disk_cache import DiskCache
from pipeline.data.reading.memory import Pool
from pipeline.data.reading.reader import Block, Reader
from pipeline.errors import ConfigError, DatasetError, ShardCorrupt

PLAN_BATCHES = 64  # batches whose samples are located together, or
PLAN_SAMPLES = 4096  # as many as hold this many samples of the rank, if that is more
HORIZON_BATCHES = 2048  # batches located ahead, at most: up to there it is known which blocks are needed again
HORIZON_SAMPLES = 1 << 20  # samples of this rank in them, at most
POLL = 0.1  # seconds between checks whether the stream was closed
CPU = torch.device("cpu")


@dataclass
class _Plan:
    """A coming batch, and the positions of its samples."""

    n: int
    numbers: np.ndarray
    blocks: list[int]
    places: list[int]
    needs: list[int]  # numbers of its blocks, each once


class Stream:
    """Endless iterator over one rank's batches from sample number start_n on.

    batch: the global batch; rank r takes numbers n + r b to n + (r + 1) b - 1 of the batch that begins at n, where
    b = batch / world. every: 1 = each global batch is read, W = every W-th. members: arrays to read; of captions one is
    read, which `seed` draws for each sample where records hold several. memory_bytes: bound on the blocks in memory.
    workers: threads that fetch and verify, and as many that decode PNGs. prefetch: batches kept ready. order: of
    `dataset`. cache: keeps blocks on a disk. device: to which tensors are copied ahead of their use.
    Errors in any thread are raised by `next`. Use it as a context manager, or call close().

    Raises DatasetError for missing shards (of a bucket on rank 0 alone), members or records, and ConfigError for sizes
    that do not fit.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: AnyOrder,
        *,
        rank: int = 0,
        world: int = 1,
        batch: int,
        start_n: int = 0,
        every: int = 1,
        seed: int = 0,
        members: Sequence[str] = ("moments", "text"),
        memory_bytes: int = 2 << 30,
        workers: int = 1,
        prefetch: int = 4,
        cache: DiskCache | None = None,
        device: torch.device = CPU,
    ) -> None:
        if batch % world or start_n % batch:
            raise ConfigError(
                f"a global batch of {batch} must be divisible by the {world} ranks and start at a multiple of itself"
            )
        for part in dataset.parts:
            contract = part.manifest.contract
            missing = sorted(set(held(members, contract.text)) - {member.name for member in contract.members})
            if missing:
                raise DatasetError(f"{part.storage.url} holds no {', '.join(missing)}: encode it with those conditions")
            if rank == 0 or part.storage.local_path("x") is not None:  # a bucket shows all ranks the same
                require_shards(part.storage, part.manifest)
        self._share, self._offset, self._stride = batch // world, rank * (batch // world), batch * every
        needed = order.window_bytes(dataset.bytes, self._offset, self._share)
        if needed > memory_bytes:
            raise ConfigError(
                f"data.memory_gb={memory_bytes / 1e9:.3g} is too small: this rank shuffles {needed / 1e9:.3g} GB of "
                f"{dataset.url} at a time; give each rank at least that"
            )
        pool = self._pool = Pool()
        self._dataset, self._order, self._transfer = dataset, order, BatchTransfer(device, pool)
        self._reader = Reader(dataset, cache, members=members, pool=pool)
        self._members, self._memory = tuple(members), memory_bytes
        several = any(has_several(part.manifest.contract.text) for part in dataset.parts)
        self._seed = seed if several and set(OF_CAPTIONS) & set(members) else None
        self._next_n = start_n
        self._plan_batches = max(PLAN_BATCHES, PLAN_SAMPLES // self._share)
        self._horizon = max(min(HORIZON_BATCHES, HORIZON_SAMPLES // self._share), self._plan_batches)
        # Located batches whose blocks are not requested yet, and those whose blocks are.
        self._located_plans: collections.deque[_Plan] = collections.deque()
        self._requested_plans: collections.deque[_Plan] = collections.deque()
        self._blocks: dict[int, Future[Block]] = {}
        # For each block, the numbers n of the located batches that need it, the next one first.
        self._uses: collections.defaultdict[int, collections.deque[int]] = collections.defaultdict(collections.deque)
        self._block_bytes = 0
        self._closed = threading.Event()
        self._ready: queue.Queue[PendingBatch | BaseException] = queue.Queue(maxsize=max(prefetch, 1))
        self._fetchers = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="latentmill-fetch")
        # Others decode PNGs: a batch that is due must not wait for blocks that are fetched ahead.
        self._decoders = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="latentmill-pixels")
        self._producer = threading.Thread(target=self._produce, name="latentmill-stream", daemon=True)
        self._producer.start()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises the error of a worker, and StopIteration once the stream is closed."""
        started = time.perf_counter()
        while not self._closed.is_set():
            try:
                item = self._ready.get(timeout=POLL)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self.close()
                raise item
            batch = self._transfer.receive(item)
            batch.wait_s = time.perf_counter() - started
            return batch
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and free the blocks. Batches that were handed out stay valid."""
        self._closed.set()
        self._producer.join()
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._blocks.clear()

    # The producer thread ---------------------------------------------------------------------------------------------

    def _produce(self) -> None:
        try:
            while not self._closed.is_set():
                self._plan_ahead()
                plan = self._requested_plans.popleft()
                blocks = {number: self._await(self._blocks[number]) for number in plan.needs}
                if self._closed.is_set():
                    return
                self._hand_over(self._collate(plan, blocks))
                self._done_with(plan)
        except BaseException as error:  # the training loop must learn of every error
            self._hand_over(error)

    def _await(self, block: Future[Block]) -> Block | None:
        """The block, or None if the stream is closed first."""
        while not self._closed.is_set():
            try:
                return block.result(timeout=POLL)
            except TimeoutError:
                if block.done():
                    raise  # an error of the fetch, not of this wait
        return None

    def _hand_over(self, item: PendingBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=POLL)
            except queue.Full:
                continue

    def _plan_ahead(self) -> None:
        """Request the blocks of coming batches, in order, while they fit; those of the next batch in any case."""
        while self._located_plans or len(self._requested_plans) < self._horizon:
            if not self._located_plans or len(self._located_plans) + len(self._requested_plans) < self._horizon:
                self._locate()
            plan = self._located_plans[0]
            missing_blocks = [number for number in plan.needs if number not in self._blocks]
            if (
                missing_blocks
                and not self._make_room(int(self._dataset.bytes[missing_blocks].sum()), plan)
                and self._requested_plans
            ):
                return
            for number in missing_blocks:
                self._blocks[number] = self._fetchers.submit(self._reader.read, number)
                self._block_bytes += int(self._dataset.bytes[number])
            self._requested_plans.append(self._located_plans.popleft())

    def _make_room(self, size: int, plan: _Plan) -> bool:
        """Drop blocks until `size` bytes fit: first those of no located batch, then those that are needed last, but
        none that is needed before the plan's batch. Returns whether they fit."""
        excess = self._block_bytes + size - self._memory
        if excess <= 0:
            return True
        no_use = self._next_n
        next_use = {number: (self._uses.get(number) or (no_use,))[0] for number in self._blocks}
        plan_blocks = set(plan.needs)
        for number in sorted(next_use, key=next_use.__getitem__, reverse=True):
            if excess <= 0 or next_use[number] <= plan.n:
                break
            if number not in plan_blocks:
                del self._blocks[number]
                self._block_bytes -= int(self._dataset.bytes[number])
                excess -= int(self._dataset.bytes[number])
        return excess <= 0

    def _locate(self) -> None:
        """Find the positions of the samples of the next batches."""
        starts = self._next_n + self._stride * np.arange(self._plan_batches, dtype=np.int64)
        numbers = starts[:, None] + self._offset + np.arange(self._share, dtype=np.int64)
        positions = self._order.locate(numbers.reshape(-1))
        blocks, places = positions.block.reshape(numbers.shape), positions.place.reshape(numbers.shape)
        for n, sample_numbers, block_numbers, block_places in zip(
            starts.tolist(), numbers, blocks.tolist(), places.tolist(), strict=True
        ):
            # In order of first use, so that blocks are fetched in the order in which they are needed.
            plan = _Plan(n, sample_numbers, block_numbers, block_places, list(dict.fromkeys(block_numbers)))
            self._located_plans.append(plan)
            for number in plan.needs:
                self._uses[number].append(n)
        self._next_n += self._stride * self._plan_batches

    def _done_with(self, plan: _Plan) -> None:
        for number in plan.needs:
            uses = self._uses[number]
            uses.popleft()
            if not uses:
                del self._uses[number]

    def _collate(self, plan: _Plan, blocks: dict[int, Block | None]) -> PendingBatch:
        records = []
        for number, place in zip(plan.blocks, plan.places, strict=True):
            block = blocks[number]
            assert block is not None, "the stream was closed"
            records.append((block, place))
        length = self._dataset.contract.padded_text
        try:
            batch = collate(
                plan.n,
                plan.numbers,
                records,
                self._members,
                length,
                self._transfer.take,
                self._decoders.map,
                seed=self._seed,
            )
        except ShardCorrupt as error:
            raise ShardCorrupt(f"{self._dataset.url}: {error}") from None
        return self._transfer.send(batch)
