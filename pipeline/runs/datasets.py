"""Opens the datasets of a run in the versions that it began with, and checks that they fit the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config import TrainConfig
from pipeline.data.format.contract import ENCODER_FACTS, require_match
from pipeline.data.format.manifest import find_version, load_manifest
from pipeline.errors import ConfigError, ContractMismatch, RunError
from pipeline.log import log
from pipeline.runs.directory import RunInfo, committed_digests, dataset_digests, dataset_urls
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.format.contract import Contract
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.order.dataset import Dataset
    from pipeline.data.order.mixture import AnyOrder
    from pipeline.distributed.world import World


def dataset_and_order(run: RunInfo, dataset: str = "") -> tuple[Dataset, AnyOrder]:
    """The dataset that a run began with, and its order. dataset: its URL, where it is not data.train; for a mixture,
    URLs separated by commas. Raises RunError when the dataset is not there."""
    data = run.config.data
    urls = dataset_urls(data)
    if dataset:
        urls = (dataset,) if not data.mix else tuple(dataset.strip("[]").split(","))
    opened = dataset_of_run(run, urls)
    return opened, opened.order(run.config.seed, run.config.optim.batch, data.tail, data.weights)


def dataset_of_run(run: RunInfo, urls: Sequence[str]) -> Dataset:
    """The datasets at `urls` in the versions that a run is trained on. Raises ConfigError when their number is not the
    run's, and RunError when a URL holds another dataset."""
    from pipeline.data.order.dataset import Dataset, part_of

    digests = dataset_digests(run.facts)
    if len(urls) != len(digests):
        raise ConfigError(
            f"{run.storage.url} is trained on {len(digests)} datasets, and {len(urls)} are named: say where each lies, "
            "data.train's first"
        )
    parts = []
    for url, digest in zip(urls, digests, strict=True):
        cache = open_storage(url)
        manifest = find_version(cache, digest) or load_manifest(cache)
        if manifest.digest != digest:
            raise RunError(
                f"{run.storage.url} was trained on a dataset whose manifest is {digest[:12]}, which {cache.url} does "
                f"not hold (it has {manifest.digest[:12]}); restore it, or say where it lies: dataset=URL"
            )
        parts.append(part_of(cache, manifest))
    return Dataset(parts)


EMPTY_TOKENS = 2  # tokens of the empty caption: start and end


def training_datasets(config: TrainConfig, run: Storage, world: World) -> Dataset:
    """data.train and data.mix, each in the version that the run began with, even if shards were appended since."""
    from pipeline.data.order.dataset import Dataset, part_of

    initial_digests, parts = committed_digests(run), []
    for number, url in enumerate(dataset_urls(config.data)):
        cache = open_storage(url)
        manifest = newest = load_manifest(cache)
        if number < len(initial_digests) and initial_digests[number] != newest.digest:
            manifest = find_version(cache, initial_digests[number]) or newest
        if manifest is not newest and world.rank == 0:
            log.info(
                f"train: {cache.url} has grown to version {newest.version}; this run goes on with version "
                f"{manifest.version}, which it began with",
            )
        parts.append(part_of(cache, manifest))
    return Dataset(parts)


def check_mixture(config: TrainConfig, manifests: Sequence[Manifest], members: Sequence[str]) -> None:
    """Raise ContractMismatch when the caches of data.mix do not fit data.train; sizes of latents may differ. members:
    arrays that are read besides moments."""
    facts = tuple(name for name in ENCODER_FACTS if name != "latent_shape")
    train_dtypes, *mix_dtypes = [{m.name: m.dtype for m in manifest.contract.members} for manifest in manifests]
    for url, manifest, dtypes in zip(config.data.mix, manifests[1:], mix_dtypes, strict=True):
        require_match(manifests[0].contract, manifest.contract, f"data.mix={url}", facts)
        for name in ("moments", *members):
            if dtypes.get(name) != train_dtypes.get(name):
                raise ContractMismatch(
                    f"data.mix={url} holds {name} as {dtypes.get(name, 'nothing')}, not {train_dtypes.get(name)} as "
                    f"data.train={config.data.train} does. Encode it with the same encoders and conditions"
                )


def check_against_contract(
    config: TrainConfig, manifest: Manifest, validation: Manifest | None, members: tuple[str, ...]
) -> None:
    """Raise ContractMismatch when the caches do not fit the model, the task or each other. members: arrays that the
    task reads besides moments."""
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
        available = {member.name for member in validation.contract.members}
        if missing := sorted(set(stored_members(members, validation.contract)) - available):
            raise ContractMismatch(
                f"data.val={config.data.val} lacks {', '.join(missing)}, which task={config.task.name} reads; encode "
                "it with the conditions of data.train"
            )


def empty_caption(cache: Storage, manifest: Manifest) -> Tensor:
    """The cache's encoded empty caption (L, D) float32; with trimmed texts, it is zero after its end token. Raises
    ShardCorrupt when it is not what the manifest promises."""
    import numpy as np
    import torch

    from pipeline.data.format.uncond import read_uncond

    empty = torch.from_numpy(read_uncond(cache, manifest).astype(np.float32))
    if manifest.contract.trimmed:
        empty[EMPTY_TOKENS:] = 0
    return empty


def stored_members(members: tuple[str, ...], contract: Contract) -> tuple[str, ...]:
    """Names of a record's arrays that hold the members that a task reads: token ids instead of text states, where the
    cache stores ids."""
    return tuple("tokens" if name == "text" and contract.text.storage == "tokens" else name for name in members)
