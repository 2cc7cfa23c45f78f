"""A cache in the exact order of training, as an IterableDataset of PyTorch: sample number n has the same record, the
same caption and the same latent as in `latentmill train` with this seed and batch, on any number of ranks and workers.

Which batch comes is a function of its sample number, so the state of the iteration is that number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline import philox
from pipeline.data.format.contract import Contract
from pipeline.data.order.dataset import Dataset
from pipeline.data.order.mixture import AnyOrder
from pipeline.data.order.shuffle import ORDER
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.device import to_device
from pipeline.data.reading.disk_cache import DiskCache
from pipeline.data.reading.stream import Stream
from pipeline.errors import ConfigError
from pipeline.loops.asked import LATENTS, Asked, Url, arrays_of, check, listed, read_beside
from pipeline.loops.opening import as_parameters, open_caches, place_of
from pipeline.models.encoders.latents import Latents
from pipeline.runs.datasets import empty_caption

Item = dict[str, Any]
"""One rank's part of a global batch."""


def open_dataset(
    url: Url | Sequence[Url],
    *,
    batch: int,
    seed: int = 0,
    rank: int | None = None,
    world: int | None = None,
    start: int = 0,
    samples: int | None = None,
    sampled: bool = True,
    members: Sequence[str] | None = None,
    captions: bool = False,
    weights: Sequence[float] = (),
    columns: Sequence[Url] = (),
    tail: Literal["drop", "wrap"] = "drop",
    memory_gb: float = 4.0,
    workers: int = 4,
    prefetch: int = 4,
    cache: Url = "",
    cache_gb: float = 100.0,
    device: str | torch.device = "cpu",
) -> CacheDataset:
    """Open a cache, or several that are mixed, to iterate over one rank's batches in the order of training.

    url: a folder (text or path) or URL that `latentmill encode` wrote; several are mixed as data.train and data.mix
    are. batch: the global batch. seed: of the order, of the latents' noise and of the caption that a sample sees. rank,
    world: this process's place; None = as torch.distributed, or the launcher's environment, says. start: samples seen
    before, a multiple of the batch. samples: where the iteration ends, rounded up to a whole batch; None = never.
    sampled: with `latents` as the network is trained on, in place of the stored array. members: names of the arrays of
    a batch; None = all that the records hold. captions: also the records' keys and captions, as lists of text. device:
    to which batches are copied ahead of their use; only "cpu" in workers of a DataLoader. The others are as the keys
    `data.NAME` of `latentmill train` (docs/reference/keys.md); memory_gb and workers (threads that read) are of each
    process that reads.

    Raises LatentmillError: ConfigError for values that do not fit, DatasetError where there is no such cache; for
    memory_gb that is too small, and a GPU that is missing, at the first batch.
    """
    urls = (os.fspath(url),) if isinstance(url, str | os.PathLike) else listed("url", url)
    place = place_of(rank, world)
    asked = Asked(
        urls=urls,
        batch=batch,
        seed=seed,
        rank=place.rank,
        world=place.world,
        samples=samples,
        sampled=sampled,
        members=None if members is None else listed("members", members),
        captions=captions,
        weights=tuple(weights),
        columns=listed("columns", columns),
        tail=tail,
        memory_gb=memory_gb,
        workers=workers,
        prefetch=prefetch,
        cache=os.fspath(cache),
        cache_gb=cache_gb,
        device=str(device),
    )
    check(asked)
    return CacheDataset(asked, start)


class CacheDataset(IterableDataset[Item]):
    """Iterates over one rank's part of each global batch, without end unless `samples` was given.

    An item is a dict, with b = batch / world samples:

    | name | what |
    |---|---|
    | n | (b,) int64, sample numbers |
    | seen | () int64, samples of all ranks that have been seen once this batch is trained on: the next `start` |
    | latents | (b, C, h, w) float32, scaled, drawn from the posterior where the cache holds one (sampled=True) |
    | moments, latents or pixels | the stored array instead (sampled=False): (b, 2C, h, w) or (b, C, h, w) float16 or |
    | | float32, unscaled, (b, 3, H, W) uint8 |
    | text | (b, L, D) float16 or float32, text states |
    | tokens | (b, L) int32, where the cache holds ids alone, or several captions of a record |
    | cond.class, cond.labels, ... | the conditions as they are stored |
    | chosen | (b,) int64, number of the caption that a sample sees, where records hold several |
    | key, caption | lists of b strings (captions=True) |

    n, seen and chosen are on the CPU, the other tensors on `device`.

    Give it to a DataLoader with batch_size=None. With workers, worker w of W yields every W-th batch from number w on,
    which the DataLoader puts in order again; each reads what it needs, so a block of records is read by several. The
    dataset reads ahead in threads of its own: num_workers=0 is enough to keep a loop supplied.

    Each `iter` begins where the dataset was opened, or at the state that was loaded last.
    """

    def __init__(self, asked: Asked, start: int) -> None:
        self._asked = asked
        self._digests: tuple[str, ...] = ()
        self._dataset: Dataset | None = None
        self._iterations = 0
        self._position: int | None = None
        self._by_workers = torch.zeros(1, dtype=torch.bool).share_memory_()
        """Whether workers of a DataLoader, and not this process, have begun the newest iteration; they share it."""
        self._begin_at(start)
        self._order()

    # What is open ----------------------------------------------------------------------------------------------------

    @property
    def contract(self) -> Contract:
        """The facts of the (first) cache: latent_shape (C, h, w), scale, shift, text, conditions, buckets."""
        return self._open().contract

    @property
    def records(self) -> int:
        """Number of records, without excluded ones."""
        return sum(part.records for part in self._open().parts)

    @property
    def empty(self) -> Tensor | None:
        """The encoded empty caption (L, D) float32, for what a network is given in place of a caption; None of a cache
        without captions. Raises ShardCorrupt when it is not what the manifest promises."""
        part = self._open().parts[0]
        return empty_caption(part.storage, part.manifest)

    def _open(self) -> Dataset:
        asked = self._asked
        if self._dataset is None:
            with as_parameters():
                self._dataset = open_caches(asked.urls, asked.columns, asked.members, self._digests)
            self._digests = tuple(part.manifest.own.digest for part in self._dataset.parts)
            self._arrays = arrays_of(asked, self._dataset.contract)
            contracts = [part.manifest.contract for part in self._dataset.parts]
            self._beside = read_beside(asked, self._arrays, contracts)
        return self._dataset

    def _order(self) -> AnyOrder:
        """A new order: it holds a lock, which a process must not inherit from one that it was forked from."""
        asked = self._asked
        with as_parameters():
            return self._open().order(asked.seed, asked.batch, asked.tail, asked.weights)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None}  # a process that is spawned opens the same version for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._by_workers.share_memory_()  # what came to a spawned worker is shared already

    # Iteration -------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Item]:
        worker, workers = _worker()
        self._by_workers.fill_(get_worker_info() is not None)
        first = self._position = self._first(worker, workers)
        self._iterations += 1
        return self._items(first, workers, self._iterations)

    def _items(self, first: int, workers: int, iteration: int) -> Iterator[Item]:
        asked = self._asked
        device = torch.device(asked.device)
        if device.type != "cpu" and get_worker_info() is not None:
            raise ConfigError(f"device={device} is not for workers of a DataLoader: set num_workers=0, or device='cpu'")
        if device.type != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"device={device}, but PyTorch sees no GPU: set device='cpu', or install a CUDA build")
        dataset = self._open()
        latents = Latents.of(dataset.contract)
        end = None if asked.samples is None else -(-asked.samples // asked.batch) * asked.batch
        if end is not None and first >= end:
            return
        with (
            as_parameters(),
            Stream(
                dataset,
                self._order(),
                rank=asked.rank,
                world=asked.world,
                batch=asked.batch,
                start_n=first,
                every=workers,
                seed=asked.seed,
                members=(*self._arrays, *self._beside),
                memory_bytes=int(asked.memory_gb * 1e9),
                workers=asked.workers,
                prefetch=asked.prefetch,
                cache=DiskCache(asked.cache, int(asked.cache_gb * 1e9)) if asked.cache else None,
                device=device,
            ) as stream,
        ):
            for batch in stream:
                item = self._item(batch, latents)
                if self._iterations == iteration:
                    self._position = batch.n + workers * asked.batch
                yield item
                if end is not None and batch.n + workers * asked.batch >= end:
                    return

    def _item(self, batch: Batch, latents: Latents) -> Item:
        asked, tensors = self._asked, dict(batch.tensors)
        item: Item = {"n": batch.numbers, "seen": torch.tensor(batch.n + asked.batch)}
        if asked.sampled and latents.member in tensors:
            images, noise = tensors.pop(latents.member), None
            if latents.member == "moments":
                numbers = to_device(batch.numbers, images.device)
                noise = philox.normal(asked.seed, philox.Stream.POSTERIOR, numbers, latents.shape(images))
            item[LATENTS] = latents.draw(images, noise)
        item |= {name: tensor for name, tensor in tensors.items() if name not in self._beside}
        if batch.chosen is not None:
            item["chosen"] = batch.chosen
        if asked.captions:
            item |= {"key": batch.keys, "caption": batch.captions}
        return item

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iteration is: `n`, the number of the next batch's first sample, and what n means: seed,
        batch, the manifests, weights and tail, and the version of the order. `worker` of `workers`: whose state it is.

        The same on all ranks after as many batches; any number of ranks goes on from it. Raises ConfigError where
        workers of a DataLoader are who iterates, of whose place this process knows nothing.
        """
        worker, workers = _worker()
        if get_worker_info() is None and self._by_workers:
            raise ConfigError(
                "workers of a DataLoader read this dataset, and this process does not know how far they are: ask "
                "torchdata's StatefulDataLoader for state_dict(), set num_workers=0, or keep the `seen` of the last "
                "batch for start="
            )
        n = self._first(worker, workers) if self._position is None else self._position
        return {"n": n, "worker": worker, "workers": workers, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next `iter` go on from a state. A cache that has grown since is read in the version of the state.

        Raises ConfigError for a state of another seed, batch, order or mixture, DatasetError where the cache's version
        is not there; the dataset is then as it was.
        """
        try:
            n, worker, workers = (int(state[name]) for name in ("n", "worker", "workers"))
            digests = tuple(state["manifests"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                "this is no state of a latentmill dataset: load what its state_dict(), or that of the "
                "StatefulDataLoader around it, has returned"
            ) from None
        former = dict(self.__dict__)
        try:
            if digests != self._digests:
                self._digests, self._dataset = digests, None
            self._require_same(state)
            self._order()
            self._begin_at(n, (worker, workers))
        except BaseException:
            self.__dict__.update(former)  # what is refused leaves the dataset as it was
            raise

    def _require_same(self, state: Mapping[str, Any]) -> None:
        """Raise ConfigError where a state's n means another sample. The dataset is open in the state's version."""
        mine = self._identity()
        differing = [name for name in mine if name != "manifests" and state.get(name) != mine[name]]
        if differing:
            told = ", ".join(f"{name} was {state.get(name)} and is {mine[name]}" for name in differing)
            raise ConfigError(
                f"the state is of another order: {told}; open the dataset with the former values, or begin without it"
            )

    def _identity(self) -> dict[str, Any]:
        asked = self._asked
        return {
            "seed": asked.seed,
            "batch": asked.batch,
            "manifests": list(self._digests),
            "columns": self._open().columns,
            "weights": list(asked.weights),
            "tail": asked.tail,
            "order": ORDER,
        }

    def _begin_at(self, n: int, of: tuple[int, int] = (0, 1)) -> None:
        """Let the next iteration begin with the batch at sample n. of: number and count of the workers whose place it
        is. Raises ConfigError for a number that begins no batch."""
        if n < 0 or n % self._asked.batch:
            raise ConfigError(
                f"start={n}: a global batch begins at a multiple of batch={self._asked.batch}; give the `seen` of the "
                "last batch"
            )
        self._start, self._start_of = n, of
        self._position = None
        self._iterations += 1  # those before no longer say where the dataset is
        if get_worker_info() is None:
            self._by_workers.fill_(False)

    def _first(self, worker: int, workers: int) -> int:
        """The sample number at which the next iteration of a worker begins. Raises ConfigError."""
        if self._start_of == (worker, workers):
            return self._start
        if self._start_of != (0, 1):
            raise ConfigError(
                f"the state is of worker {self._start_of[0]} of {self._start_of[1]}, and this is worker {worker} of "
                f"{workers}: give the loader the former num_workers, or open the dataset with start= the `seen` of the "
                "last batch"
            )
        return self._start + worker * self._asked.batch


def _worker() -> tuple[int, int]:
    """Number and count of the DataLoader's workers; (0, 1) in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
