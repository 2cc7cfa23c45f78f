"""What a training run reads: its datasets, in the versions that it began with, found to fit model and task."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config import TrainConfig
from pipeline.errors import ContractMismatch, ShardCorrupt
from pipeline.storage import Storage, open_storage
from pipeline.training.rundir import begun_with, dataset_urls, roles

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.dataset import Dataset
    from pipeline.data.manifest import Contract, Manifest
    from pipeline.data.stream import Stream
    from pipeline.models.conditioning import Task
    from pipeline.training.distributed import World

EMPTY_TOKENS = 2  # start and end


@dataclass(frozen=True)
class Data:
    """What a run trains on, found to fit it. manifests: digest of each dataset's manifest, by role. mixture: whole
    weights, () of one cache. empty: the encoded empty caption (L, D). stream_from: this rank's batches from sample
    number start_n on."""

    dataset: Dataset
    manifests: dict[str, str]
    mixture: tuple[int, ...]
    task: Task
    empty: Tensor
    stream_from: Callable[..., Stream]

    @property
    def manifest(self) -> Manifest:
        """Of data.train."""
        return self.dataset.parts[0].manifest

    @property
    def digests(self) -> list[str]:
        """Of the manifests of data.train and data.mix."""
        return [part.manifest.digest for part in self.dataset.parts]


def open_data(config: TrainConfig, run: Storage, world: World) -> Data:
    """Open the datasets, as one rank. Raises LatentmillError where they do not fit, or are not there."""
    from pipeline.data.diskcache import DiskCache
    from pipeline.data.manifest import load_manifest
    from pipeline.data.stream import Stream
    from pipeline.models.conditioning import make_task

    dataset = trained_on(config, run, world)
    cache, manifest = dataset.parts[0].storage, dataset.parts[0].manifest
    validation = load_manifest(open_storage(config.data.val)) if config.data.val else None
    contract = manifest.contract
    empty = empty_caption(cache, manifest)
    task = make_task(config.task, contract.latent_shape, empty, trimmed=contract.trimmed)
    check_against_contract(config, manifest, validation, task.members)
    check_mixture(config, [part.manifest for part in dataset.parts], stored_members(task.members, contract))
    stream_from = partial(
        Stream,
        dataset,
        dataset.order(config.seed, config.optim.batch, config.data.tail, config.data.weights),
        rank=world.rank,
        world=world.size,
        batch=config.optim.batch,
        members=("moments", *stored_members(task.members, contract)),
        memory_bytes=int(config.data.memory_gb * 1e9),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        cache=DiskCache(config.data.cache, int(config.data.cache_gb * 1e9)) if config.data.cache else None,
        device=world.device,
    )
    names = roles(len(dataset.parts))
    manifests = {name: part.manifest.digest for name, part in zip(names, dataset.parts, strict=True)}
    manifests |= {"val": validation.digest} if validation else {}
    return Data(dataset, manifests, dataset.whole_weights(config.data.weights), task, empty, stream_from)


def trained_on(config: TrainConfig, run: Storage, world: World) -> Dataset:
    """data.train and data.mix, each in the version that the run began with, though shards were appended."""
    from pipeline.data.dataset import Dataset, part_of
    from pipeline.data.manifest import find_version, load_manifest

    before, parts = begun_with(run), []
    for number, url in enumerate(dataset_urls(config.data)):
        cache = open_storage(url)
        manifest = newest = load_manifest(cache)
        if number < len(before) and before[number] != newest.digest:
            manifest = find_version(cache, before[number]) or newest
        if manifest is not newest and world.rank == 0:
            print(
                f"train: {cache.url} has grown to version {newest.version}; this run goes on with version "
                f"{manifest.version}, which it began with",
                file=sys.stderr,
            )
        parts.append(part_of(cache, manifest))
    return Dataset(parts)


def check_mixture(config: TrainConfig, manifests: Sequence[Manifest], members: Sequence[str]) -> None:
    """Raises ContractMismatch when the caches of data.mix do not fit data.train; sizes of latents may differ. members:
    arrays that are read besides moments."""
    from pipeline.data.manifest import ENCODER_FACTS, require_match

    facts = tuple(name for name in ENCODER_FACTS if name != "latent_shape")
    dtypes = [{m.name: m.dtype for m in manifest.contract.members} for manifest in manifests]
    for url, manifest, mine in zip(config.data.mix, manifests[1:], dtypes[1:], strict=True):
        require_match(manifests[0].contract, manifest.contract, f"data.mix={url}", facts)
        for name in ("moments", *members):
            if mine.get(name) != dtypes[0].get(name):
                raise ContractMismatch(
                    f"data.mix={url} holds {name} as {mine.get(name, 'nothing')}, not {dtypes[0].get(name)} as "
                    f"data.train={config.data.train} does. Encode it with the same encoders and conditions"
                )


def check_against_contract(
    config: TrainConfig, manifest: Manifest, validation: Manifest | None, members: tuple[str, ...]
) -> None:
    """Raises ContractMismatch when the caches do not fit the model, the task or each other."""
    from pipeline.data.manifest import require_match

    contract, cache = manifest.contract, f"data.train={config.data.train}"
    channels = contract.latent_shape[0]
    if (config.model.in_channels, config.model.out_channels) != (channels, channels):
        raise ContractMismatch(
            f"{cache} holds latents of {channels} channels, but model.in_channels={config.model.in_channels} and "
            f"model.out_channels={config.model.out_channels}; set both to {channels}, or encode anew"
        )
    if missing := sorted(set(stored_members(members, contract)) - {member.name for member in contract.members}):
        raise ContractMismatch(
            f"{cache} lacks {', '.join(missing)}, which task={config.task.name} reads; encode it with those conditions"
        )
    if "text" in members and config.model.context_width != contract.text.width:
        raise ContractMismatch(
            f"{cache} holds text states of width {contract.text.width}, but model.context_width="
            f"{config.model.context_width}; set it to {contract.text.width}, or encode with another text tower"
        )
    if validation is not None:
        require_match(contract, validation.contract, f"data.val={config.data.val}")
        held = {member.name for member in validation.contract.members}
        if missing := sorted(set(stored_members(members, validation.contract)) - held):
            raise ContractMismatch(
                f"data.val={config.data.val} lacks {', '.join(missing)}, which task={config.task.name} reads; encode "
                "it with the conditions of data.train"
            )


def empty_caption(cache: Storage, manifest: Manifest) -> Tensor:
    """The cache's encoded empty caption (L, D) float32, its hash checked; of trimmed texts, zeros after its end."""
    import numpy as np
    import torch

    from pipeline.data.manifest import UNCOND

    data = cache.get(UNCOND)
    if hashlib.sha256(data).hexdigest() != manifest.uncond_sha256:
        raise ShardCorrupt(f"{cache.locate(UNCOND)} is not what the manifest promises; restore it or encode again")
    empty = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32))
    if manifest.contract.trimmed:
        empty[EMPTY_TOKENS:] = 0
    return empty


def stored_members(members: tuple[str, ...], contract: Contract) -> tuple[str, ...]:
    """What is read of a record for what a task wants: ids in place of text states where a cache holds those."""
    return tuple("tokens" if name == "text" and contract.text.storage == "tokens" else name for name in members)
