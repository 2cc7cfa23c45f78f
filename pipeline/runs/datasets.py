"""Opens the datasets of a run in the versions that it began with, and checks that they fit the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config import AutoencoderConfig, RunConfig, TaskConfig, TrainConfig
from pipeline.config.check.first_stage import require_room
from pipeline.data.format.contract import ENCODER_FACTS, require_match
from pipeline.data.format.manifest import find_version, load_manifest
from pipeline.data.format.members import dtypes_of, held
from pipeline.errors import ConfigError, ContractMismatch, RunError
from pipeline.log import log
from pipeline.runs.directory import COLUMNS, RunInfo, committed_digests, dataset_digests, dataset_urls
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.format.contract import Contract
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.order.dataset import Dataset
    from pipeline.data.order.mixture import AnyOrder
    from pipeline.distributed.world import World


def dataset_and_order(run: RunInfo, dataset: str = "", columns: str = "") -> tuple[Dataset, AnyOrder]:
    """The dataset that a run began with, and its order. dataset: its URL, where it is not data.train; for a mixture,
    URLs separated by commas. columns: URLs of its columns, where they are not data.columns. Raises RunError when the
    dataset is not there."""
    data = run.config.data
    urls = dataset_urls(data)
    if dataset:
        urls = (dataset,) if not data.mix else tuple(dataset.strip("[]").split(","))
    opened = dataset_of_run(run, urls, tuple(columns.strip("[]").split(",")) if columns else None)
    return opened, opened.order(run.config.seed, run.config.optim.batch, data.tail, data.weights)


def dataset_of_run(run: RunInfo, urls: Sequence[str], columns: Sequence[str] | None = None) -> Dataset:
    """The datasets at `urls` in the versions that a run is trained on, with its columns. columns: their URLs; None =
    data.columns. Raises ConfigError when their number is not the run's, and RunError when a URL holds another dataset,
    or the columns are others."""
    from pipeline.data.joined.opening import joined
    from pipeline.data.order.dataset import Dataset, part_of

    columns = run.config.data.columns if columns is None else columns
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
        parts.append(part_of(cache, joined(cache, columns, manifest)))
    opened, digest = Dataset(parts), run.manifests.get(COLUMNS, "")
    if opened.columns != digest:
        was, now = (f"the columns {one[:12]}" if one else "no columns" for one in (digest, opened.columns))
        raise RunError(
            f"{run.storage.url} was trained with {was}, and {', '.join(columns) or 'data.columns=[]'} gives {now}: "
            "restore them, or say where they lie: columns=URL"
        )
    return opened


PIXELS = "pixels"
"""Name of the array (3, H, W) uint8 of a record that an autoencoder is trained on."""
EMPTY_TOKENS = 2  # tokens of the empty caption: start and end
FREE = ("variants", "key", "packed", "min_area")  # facts of conditions that do not change what they mean


def training_datasets(config: RunConfig, run: Storage, world: World) -> Dataset:
    """data.train and data.mix with their columns, each in the version that the run began with, even if shards were
    appended since."""
    from pipeline.data.joined.opening import joined
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
        parts.append(part_of(cache, joined(cache, config.data.columns, manifest)))
    return Dataset(parts)


def check_mixture(config: TrainConfig, manifests: Sequence[Manifest]) -> None:
    """Raise ContractMismatch when the caches of data.mix do not fit data.train; sizes of latents may differ."""
    facts = tuple(name for name in ENCODER_FACTS if name != "latent_shape")
    first, ours = manifests[0].contract, f"data.train={config.data.train}"
    train_dtypes, *mix_dtypes = [dtypes_of(manifest.contract) for manifest in manifests]
    for url, manifest, dtypes in zip(config.data.mix, manifests[1:], mix_dtypes, strict=True):
        require_match(first, manifest.contract, f"data.mix={url}", facts)
        require_conditions(config.task.conditions, first, manifest.contract, f"data.mix={url}", ours)
        for name in stored_members(config.task, first):
            if dtypes.get(name) != train_dtypes.get(name):
                raise ContractMismatch(
                    f"data.mix={url} holds {name} as {dtypes.get(name, 'nothing')}, not {train_dtypes.get(name)} as "
                    f"{ours} does. Encode it with the same encoders and conditions"
                )


def check_against_contract(config: TrainConfig, manifest: Manifest, validation: Manifest | None) -> None:
    """Raise ContractMismatch when the caches do not fit the model, the task or each other."""
    contract, cache, task = manifest.contract, f"data.train={config.data.train}", config.task
    channels = contract.latent_shape[0]
    if (config.model.in_channels, config.model.out_channels) != (channels, channels):
        raise ContractMismatch(
            f"{cache} holds latents of {channels} channels, but model.in_channels={config.model.in_channels} and "
            f"model.out_channels={config.model.out_channels}; set both to {channels}, or encode anew"
        )
    require_arrays(config, contract, cache)
    for problem in task.lacking(contract):
        raise ContractMismatch(f"{cache} {problem}")
    if "text" in task.members and contract.text is not None and config.model.context_width != contract.text.width:
        raise ContractMismatch(
            f"{cache} holds text states of width {contract.text.width}, but model.context_width="
            f"{config.model.context_width}; set it to {contract.text.width}, or encode with another text tower"
        )
    if validation is not None:
        name = f"data.val={config.data.val}"
        facts = tuple(fact for fact in ENCODER_FACTS if task.takes_text or fact not in ("text", "text_sha256"))
        require_match(contract, validation.contract, name, facts)
        require_arrays(config, validation.contract, name)
        require_conditions(task.conditions, contract, validation.contract, name, cache)


def require_pixels(config: AutoencoderConfig, contract: Contract, where: str) -> None:
    """Raise ContractMismatch unless a cache holds pixels of sizes that the autoencoder, its crop and its losses take,
    ConfigError where the losses alone do not. where: names the cache, such as data.train=pixels."""
    if PIXELS not in [member.name for member in contract.members]:
        raise ContractMismatch(
            f"{where} holds no pixels, but {contract.stored}: an autoencoder is trained on a cache of latentmill "
            "encode stored=pixels"
        )
    if contract.channel_order != "RGB":
        raise ContractMismatch(f"{where} holds pixels in the order {contract.channel_order}, not RGB: encode it anew")
    crop, factor = config.crop, config.autoencoder.downsampling
    for width, height in contract.buckets:
        if crop > min(width, height):
            raise ContractMismatch(
                f"crop={crop} is larger than pictures of {where}, {width}x{height}: lower crop, or encode larger ones "
                "(resolution=)"
            )
        if crop == 0 and (width % factor or height % factor):
            raise ContractMismatch(
                f"{where} holds pictures of {width}x{height}, whose sides autoencoder.multipliers (levels: "
                f"{len(config.autoencoder.multipliers)}) does not divide by {factor}: set crop to a multiple of "
                f"{factor}, or encode them in such a size (resolution=)"
            )
    if crop == 0:
        try:
            require_room(config, min(side for size in contract.buckets for side in size), "side")
        except ConfigError as error:
            raise ContractMismatch(f"{where} holds pictures of {error}") from None


def require_arrays(config: TrainConfig, contract: Contract, cache: str) -> None:
    """Raise ContractMismatch where a cache lacks arrays that the task reads. cache: names it in the message."""
    task = config.task
    names = held(stored_members(task, contract), contract.text)
    if missing := sorted(set(names) - {member.name for member in contract.members}):
        wanted = [f"conditions=[{','.join(task.conditions)}]"] if "cond" in {name[:4] for name in missing} else []
        wanted += ["captions"] if {"text", "tokens"} & set(missing) else []
        raise ContractMismatch(
            f"{cache} lacks {', '.join(missing)}, which task={task.name} reads; encode it with {' and '.join(wanted)}"
        )


def require_conditions(names: Sequence[str], required: Contract, actual: Contract, cache: str, ours: str) -> None:
    """Raise ContractMismatch where a cache's conditions `names` were made otherwise than those that are required. cache
    and ours name the two in the message. Numbers of variants may differ."""
    for name in names:
        field = {"class": "classes"}.get(name, name)
        one, other = (getattr(contract.conditions, field) for contract in (required, actual))
        differences = [
            f"{fact.name}={getattr(other, fact.name)}, not {getattr(one, fact.name)}"
            for fact in (dataclasses.fields(one) if one is not None and other is not None else ())
            if fact.name not in FREE and getattr(one, fact.name) != getattr(other, fact.name)
        ]
        if differences:
            raise ContractMismatch(
                f"{cache} has {name} made otherwise than {ours}: {'; '.join(differences)}. "
                "Encode it with the same settings"
            )


def empty_caption(cache: Storage, manifest: Manifest) -> Tensor | None:
    """The cache's encoded empty caption (L, D) float32, None of a cache without captions; with trimmed texts, it is
    zero after its end token. Raises ShardCorrupt when it is not what the manifest promises."""
    import numpy as np
    import torch

    from pipeline.data.format.uncond import read_uncond

    if manifest.contract.text is None:
        return None
    empty = torch.from_numpy(read_uncond(cache, manifest).astype(np.float32))
    if manifest.contract.trimmed:
        empty[EMPTY_TOKENS:] = 0
    return empty


def stored_members(task: TaskConfig, contract: Contract) -> tuple[str, ...]:
    """Names of the arrays of a record that training reads: the image's first, then those of the task; token ids
    instead of text states, where the cache stores ids."""
    ids = contract.text is not None and contract.text.storage == "tokens"
    return (contract.stored, *("tokens" if name == "text" and ids else name for name in task.members))
