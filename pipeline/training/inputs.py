"""What a training run reads: its datasets, in the versions that it began with, found to fit model and task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config import RunConfig, TrainConfig
from pipeline.runs.datasets import (
    check_against_contract,
    check_mixture,
    empty_caption,
    stored_members,
    training_datasets,
)
from pipeline.runs.directory import COLUMNS, dataset_urls, roles
from pipeline.runs.distinct import require_distinct
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.data.format.manifest import Manifest
    from pipeline.data.order.dataset import Dataset
    from pipeline.data.reading.batch import Batch
    from pipeline.data.reading.stream import Stream
    from pipeline.distributed.world import World
    from pipeline.models.encoders.latents import Latents
    from pipeline.models.tasks.task import Task


@dataclass(frozen=True)
class Inputs:
    """What is made of a batch. latents: how z is made of the cache's array. task: what draws variants and noise of the
    conditions; None where they are taken as they are. seed: of these draws. text_of: ids (b, L) -> text states
    (b, L, D), where the cache holds ids alone and the task reads states; else None."""

    latents: Latents
    task: Task | None
    seed: int
    text_of: Callable[[Tensor], Tensor] | None = None

    def on_device(self, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """The images' array (b, ...) of a batch, and what the task reads beside it."""
        from pipeline.data.reading.device import to_device

        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
        images = tensors.pop(self.latents.member)
        return images, self.conditions(tensors, self.seed, to_device(batch.numbers, device), images)

    def conditions(self, tensors: dict[str, Tensor], seed: int, numbers: Tensor, images: Tensor) -> dict[str, Tensor]:
        """What the task reads: text states in place of ids, and what is drawn for each sample number (b,)."""
        if self.text_of is not None:
            tensors["text"] = self.text_of(tensors.pop("tokens"))
        if self.task is None:
            return tensors
        return self.task.prepare(tensors, seed, numbers, sides=self.latents.shape(images)[1:])


@dataclass(frozen=True)
class Data:
    """What a run trains on. manifests: digest of each dataset's manifest, by role. mixture: whole weights, () of one
    cache. stream_from: this rank's batches from sample number start_n on."""

    dataset: Dataset
    manifests: dict[str, str]
    mixture: tuple[int, ...]
    stream_from: Callable[..., Stream]

    @property
    def manifest(self) -> Manifest:
        """Of data.train."""
        return self.dataset.parts[0].manifest

    @property
    def digests(self) -> list[str]:
        """Of the manifests of data.train and data.mix, without columns."""
        return [part.manifest.own.digest for part in self.dataset.parts]


@dataclass(frozen=True)
class DiffusionData(Data):
    """The same, found to fit model and task. empty: the encoded empty caption (L, D), None without captions."""

    task: Task
    empty: Tensor | None


def open_data(config: TrainConfig, run: Storage, world: World) -> DiffusionData:
    """Open the datasets of a diffusion model, as one rank. Raises LatentmillError where they do not fit, or are not
    there."""
    from pipeline.models.tasks.choose import make_task

    dataset, validation = datasets(config, run, world)
    cache, manifest = dataset.parts[0].storage, dataset.parts[0].manifest
    contract = manifest.contract
    empty = empty_caption(cache, manifest)
    require_fitting(config, dataset, validation)
    task = make_task(config.task, config.model, contract, empty)
    members = stored_members(config.task, contract)
    return DiffusionData(*streamed(config, dataset, validation, members, world), task, empty)


def open_labelled(config: TrainConfig, run: Storage, world: World) -> Data:
    """Open the datasets of a classifier, as one rank. Raises LatentmillError where they do not fit, or are not
    there."""
    dataset, validation = datasets(config, run, world)
    require_fitting(config, dataset, validation)
    members = stored_members(config.task, dataset.parts[0].manifest.contract)
    return Data(*streamed(config, dataset, validation, members, world))


def require_fitting(config: TrainConfig, dataset: Dataset, validation: Manifest | None) -> None:
    """Raise ContractMismatch where caches do not fit the model, the task or each other."""
    check_against_contract(config, dataset.parts[0].manifest, validation)
    check_mixture(config, [part.manifest for part in dataset.parts])


def datasets(config: RunConfig, run: Storage, world: World) -> tuple[Dataset, Manifest | None]:
    """The training datasets, in the versions that the run began with, and data.val's manifest, None without one; all
    with the columns of data.columns that belong to them."""
    from pipeline.data.joined.opening import joined, require_all_bound

    dataset = training_datasets(config, run, world)
    validation = joined(open_storage(config.data.val), config.data.columns) if config.data.val else None
    opened = [*(part.manifest for part in dataset.parts), *([validation] if validation else [])]
    require_all_bound(config.data.columns, opened, "data.train, data.mix and data.val")
    urls = [f"data.{'mix' if number else 'train'}={url}" for number, url in enumerate(dataset_urls(config.data))]
    named = list(zip(urls, (part.manifest for part in dataset.parts), strict=True))
    require_distinct(named, (f"data.val={config.data.val}", validation) if validation else None)
    return dataset, validation


def streamed(
    config: RunConfig, dataset: Dataset, validation: Manifest | None, members: Sequence[str], world: World
) -> tuple[Dataset, dict[str, str], tuple[int, ...], Callable[..., Stream]]:
    """The fields of Data. members: arrays of a record that training reads."""
    from pipeline.data.reading.disk_cache import DiskCache
    from pipeline.data.reading.stream import Stream

    stream_from = partial(
        Stream,
        dataset,
        dataset.order(config.seed, config.optim.batch, config.data.tail, config.data.weights),
        rank=world.rank,
        world=world.size,
        batch=config.optim.batch,
        seed=config.seed,
        members=members,
        memory_bytes=int(config.data.memory_gb * 1e9),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        cache=DiskCache(config.data.cache, int(config.data.cache_gb * 1e9)) if config.data.cache else None,
        device=world.device,
    )
    names = roles(len(dataset.parts))
    manifests = {name: part.manifest.own.digest for name, part in zip(names, dataset.parts, strict=True)}
    manifests |= {"val": validation.digest} if validation else {}
    manifests |= {COLUMNS: dataset.columns} if dataset.columns else {}
    return dataset, manifests, dataset.whole_weights(config.data.weights), stream_from
