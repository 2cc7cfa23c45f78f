"""A cache's tars as a pipeline of webdataset, for loops that are built on it: records whole and verified, without those
that the manifest excludes. It has webdataset's order and not that of training (dataset.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import webdataset as wds
from webdataset.compat import FluidInterface

from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.members import dtypes_of, held
from pipeline.data.joined.opening import joined, require_all_bound
from pipeline.data.reading.captions import of_one_caption
from pipeline.data.reading.shards import read
from pipeline.distributed.place import Place
from pipeline.errors import DatasetError
from pipeline.loops.asked import Url, listed, require_held
from pipeline.loops.opening import as_parameters, place_of
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage


class Records(wds.DataPipeline, FluidInterface):
    """A pipeline of webdataset: `.shuffle(1000)`, `.map(...)`, `.to_tuple("latents", "text")`, `.batched(16)` and the
    other stages of webdataset go on from it."""


def as_webdataset(
    url: Url,
    *,
    members: Sequence[str] | None = None,
    columns: Sequence[Url] = (),
    seed: int | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> Records:
    """A pipeline of webdataset over the tars of a cache, at a folder or URL; no shell pipe is needed.

    A sample is a dict: `__key__` and `__url__` as webdataset has them, `caption` (str, "" without captions), and by
    name the record's arrays as NumPy arrays: moments (2C, h, w), latents (C, h, w) or pixels (3, H, W), text (L, D),
    trimmed ones (l, D), tokens (L,), cond.NAME. Where records hold several captions, the first one is read. Tars are
    read one by one, whole, and compared with the manifest.

    members: names of the arrays; None = all. columns: of `latentmill columns`. seed: tars come in an order that is
    drawn anew for each epoch of an iterating process; None = as the manifest has them. rank, world: as in open_dataset.
    Every rank takes each `world`-th tar, and of these every worker of a DataLoader each W-th, as webdataset has it. So
    ranks come to different numbers of samples: where they wait for each other, say `.with_epoch(nbatches=N)` after
    `.batched(16)`. Arrays whose sizes differ between records are not stacked: `.batched(16, collation_fn=None)`.

    Raises DatasetError where there is no cache, ConfigError for members that it does not hold; in the iteration
    ShardCorrupt for a damaged tar, and DatasetError on a rank or worker for which no tar is left.
    """
    url, columns = os.fspath(url), listed("columns", columns)
    storage = open_storage(url)
    with as_parameters():
        manifest = joined(storage, columns)
        require_all_bound(columns, [manifest], "the cache that is opened")
    names = [name for name in dtypes_of(manifest.contract) if name != "captions"]
    chosen = tuple(names) if members is None else listed("members", members)
    require_held(chosen, names, url)
    kept = KeptRecords(manifest, load_excluded(storage, manifest))
    tars = [number for number, count in enumerate(kept.sizes) if count]
    stages: list[Any] = [_Numbers(tars)]
    if seed is not None:
        stages.append(wds.detshuffle(bufsize=max(len(tars), 1), initial=max(len(tars), 1), seed=seed))
    place = place_of(rank, world)
    return Records(*stages, _Share(place), wds.split_by_worker, _Expand(storage, manifest, kept, chosen, place))


class _Numbers:
    """The first stage: numbers of tars."""

    def __init__(self, tars: Sequence[int]) -> None:
        self._tars = tuple(tars)

    def __call__(self) -> Iterator[int]:
        return iter(self._tars)


class _Share:
    """The stage that leaves a rank its part: webdataset's own knows no tasks of srun."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __call__(self, numbers: Iterable[int]) -> Iterator[int]:
        return islice(numbers, self._place.rank, None, self._place.world)


class _Expand:
    """The stage from numbers of tars to samples."""

    def __init__(
        self, storage: Storage, manifest: Manifest, kept: KeptRecords, members: Sequence[str], place: Place
    ) -> None:
        self._storage, self._manifest, self._kept, self._members = storage, manifest, kept, tuple(members)
        self._place = place

    def __call__(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        text, none = self._manifest.contract.text, True
        for number in numbers:
            none = False
            ordinals = np.arange(self._kept.sizes[number])
            rows = self._kept.rows(np.full_like(ordinals, number), ordinals)
            records = read(self._storage, self._manifest, number, rows.tolist(), held(self._members, text))
            url = self._storage.locate(self._manifest.shards[number].name)
            for record in of_one_caption(records, text):
                # Copies: a view would keep its whole tar in memory as long as a shuffle keeps the sample.
                arrays = {name: np.array(record.members[name]) for name in self._members}
                yield {"__key__": record.key, "__url__": url, "caption": record.meta.get("caption", ""), **arrays}
        if none:
            _, _, worker, workers = wds.utils.pytorch_worker_info()
            reader = f"worker {worker} of {workers} of rank {self._place.rank} of {self._place.world}"
            raise DatasetError(
                f"{self._storage.url} has {sum(size > 0 for size in self._kept.sizes)} tars with records, and none is "
                f"left for {reader}: start fewer, or take open_dataset, which splits batches"
            )
