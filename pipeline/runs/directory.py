"""The layout of a run directory, and whether a configuration may resume the run in it.

    config.yaml  run.json  metrics.jsonl  ledger/  lease/  checkpoints/{n:012d}/  evals/{n:012d}/  report.html

Imports no torch, so that a verb can check a run before it starts ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pipeline.config import AutoencoderConfig, DataConfig, RunConfig, TrainConfig
from pipeline.config.loading.merge import to_stored
from pipeline.config.loading.stored import is_same
from pipeline.data.format.contract_json import contract_from_json
from pipeline.errors import NotFound, RunError
from pipeline.runs.names import AVERAGES as AVERAGES
from pipeline.runs.names import CHECKPOINTS as CHECKPOINTS
from pipeline.runs.names import COMMIT as COMMIT
from pipeline.runs.names import FACTS, METRICS, commit_of
from pipeline.runs.names import SNAPSHOT as SNAPSHOT
from pipeline.runs.names import checkpoint_folder as checkpoint_folder
from pipeline.runs.names import evaluation_folder as evaluation_folder
from pipeline.runs.place import require_place
from pipeline.runs.stored import damaged, missing, read_config, read_facts
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

MAY_CHANGE = (
    "run",
    "samples",
    "resume",
    "device",
    "data.train",  # its location; its manifest must be the same
    "data.mix",  # likewise for each of them
    "data.columns",  # likewise
    "data.val",
    "data.memory_gb",
    "data.cache",
    "data.cache_gb",
    "data.workers",
    "data.prefetch",
    "optim.micro_batch",
    "optim.decay_samples",  # as `samples`: what that does to the learning rate is said, and kept in run.json
    "model.name",
    "autoencoder.name",
    "model.checkpointing",
    "model.activation_gb",
    "checkpoint",
    "guard",
    "eval",
    "tracking",
    "encoders",  # their locations; the contract holds the hashes of their weights
    "compile",
    "precision",  # of forward and backward passes: the state between steps is always fp32
    "launch",
    "deepspeed",
    "watchdog_s",
    "step_limit_s",
    "gc_steps",
)
"""Keys of the configuration, or groups of keys, that may change at a resume. All others must be the same."""


def committed(run: Storage) -> list[int]:
    """n of every committed checkpoint, newest first."""
    return sorted((n for info in run.list(CHECKPOINTS) if (n := commit_of(info.key)) is not None), reverse=True)


def is_evaluated(run: Storage, n: int) -> bool:
    """Whether the run's own evaluation at n samples is done, or was handed to a separate job."""
    return any(run.exists(f"{evaluation_folder(n)}/{name}") for name in (METRICS, SNAPSHOT))


def last_sample(config: RunConfig) -> int:
    """n at the end of the run: `samples` rounded up to whole global batches."""
    return -(-config.samples // config.optim.batch) * config.optim.batch


def is_finished(config: RunConfig, run: Storage) -> bool:
    """Whether the run's last sample is committed and, where there are evaluations, evaluated."""
    end = last_sample(config)
    return end in committed(run)[:1] and (not config.data.val or is_evaluated(run, end))


# --------------------------------------------------------------------------------------------------------------------
# May this configuration resume that run?


def require_resumable(config: RunConfig, run: Storage) -> None:
    """Raise RunError where config.resume, or the configuration that the run began with, forbids to go on, and
    DestinationExists where something else than a run lies there."""
    commits = committed(run)
    require_place(run, begun=bool(commits))
    if config.resume == "must" and not commits:
        raise RunError(f"{config.run} has no checkpoint to resume from; resume=auto begins it")
    if config.resume == "never" and commits:
        raise RunError(f"{config.run} has a checkpoint at {commits[0]} samples; resume=auto goes on")
    if not commits:
        return
    stored = _stored_config(run)
    if stored.verb != config.verb:
        raise RunError(f"{config.run} was begun by latentmill {stored.verb}; go on with that, or choose another run=")
    if changed := differences(to_stored(stored), to_stored(config), same=partial(is_same, config, _digests(run))):
        raise RunError(
            f"{config.run} was begun with another configuration: {'; '.join(changed)}; restore it, or choose another "
            "run="
        )
    if commits[0] > last_sample(config):
        raise RunError(
            f"{config.run} has seen {commits[0]} samples already, more than samples={config.samples}; raise samples="
        )


def dataset_urls(data: DataConfig) -> tuple[str, ...]:
    """The URLs of the training caches, in the order of their numbers."""
    return (data.train, *data.mix)


def roles(count: int) -> list[str]:
    """Names of `count` training caches among a run's manifests: train, mix1, mix2, ..."""
    return ["train", *(f"mix{number}" for number in range(1, count))]


COLUMNS = "columns"
"""Role among a run's manifests of the digest of all columns that are read with the training caches."""


def dataset_digests(facts: Mapping[str, Any]) -> list[str]:
    """Digests of the manifests of a run's training caches, in the order of their numbers. facts: its run.json."""
    manifests = facts["manifests"]
    return [manifests[role] for role in roles(len(manifests)) if role in manifests]


def committed_digests(run: Storage) -> list[str]:
    """`dataset_digests` of a run that has a commit; [] of any other."""
    return dataset_digests(_stored_facts(run)) if committed(run) else []


def require_same_datasets(
    config: RunConfig, run: Storage, digests: Sequence[str], mixture: Sequence[int], columns: str = ""
) -> None:
    """Raise RunError unless the run was trained on the datasets with these manifests, in this order.

    digests: of the manifests. mixture: weights of the datasets, in integers, which must be the same too. columns:
    digest of all columns that are read with them, "" without any, which must be the same too.
    """
    from pipeline.data.order.shuffle import ORDER

    stored_digests = committed_digests(run)
    if not stored_digests:
        return
    facts = _stored_facts(run)
    if (order := facts.get("order", 1)) != ORDER:
        raise RunError(
            f"{config.run} took its samples in an order (version {order}) that this latentmill does not know (it has "
            f"version {ORDER}): go on with the one that began it, or choose another run="
        )
    if len(stored_digests) != len(digests):
        raise RunError(
            f"{config.run} was trained on {len(stored_digests)} datasets, but data.train and data.mix name "
            f"{len(digests)}; restore them, or choose another run="
        )
    for number, (old, new, url) in enumerate(zip(stored_digests, digests, dataset_urls(config.data), strict=True)):
        if old == new:
            continue
        where = f"data.mix={url}" if number else f"data.train={url}"
        if old in digests and new in stored_digests:
            raise RunError(
                f"{config.run} was trained on these datasets in another order: {where} was number "
                f"{stored_digests.index(new) + 1} of data.train and data.mix and is number {number + 1}; restore their "
                "order"
            )
        raise RunError(
            f"{config.run} was trained on a dataset whose manifest is {old[:12]}, but that of {where} is {new[:12]}; "
            "restore that dataset, or choose another run="
        )
    if (stored := facts["manifests"].get(COLUMNS, "")) != columns:
        was, now = (f"the columns {digest[:12]}" if digest else "no columns" for digest in (stored, columns))
        raise RunError(
            f"{config.run} was trained with {was}, and data.columns={list(config.data.columns)} gives {now}: restore "
            "data.columns and what lies there, or choose another run="
        )
    if (weights := facts.get("mixture", [])) != list(mixture):
        raise RunError(
            f"{config.run} was trained on a mixture of {' : '.join(map(str, weights))}, but data.weights and the "
            f"datasets give {' : '.join(map(str, mixture))}; restore data.weights, or choose another run="
        )


def _digests(run: Storage) -> Any:
    """Digests of the values that the run's configuration took from the environment, by key, as run.json has them."""
    return read_facts(run).get("environment") if run.exists(FACTS) else None


def _equal(_: str, old: Any, new: Any) -> bool:
    return bool(old == new)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], path: str = "", same: Callable[[str, Any, Any], bool] = _equal
) -> list[str]:
    """One line for each key that differs though it may not, such as "optim.lr was 0.001 and is 0.0001". same: whether
    two values of a key, as they are stored, are the same."""
    lines = []
    for key in sorted({*old, *new}):
        full_key, old_value, new_value = f"{path}{key}", old.get(key), new.get(key)
        if full_key in MAY_CHANGE:
            continue
        if isinstance(old_value, Mapping) and isinstance(new_value, Mapping):
            lines += differences(old_value, new_value, f"{full_key}.", same)
        elif not same(full_key, old_value, new_value):
            becomes = "has another value now" if old_value == new_value else f"is {new_value}"
            lines.append(f"{full_key} was {old_value} and {becomes}")
    return lines


def fixed_keys(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that may not change within a run, as plain data. A commit stores it."""

    def fixed(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        return {
            key: fixed(value, f"{path}{key}.") if isinstance(value, Mapping) else value
            for key, value in tree.items()
            if f"{path}{key}" not in MAY_CHANGE
        }

    return fixed(to_stored(config))


def _stored_config(run: Storage) -> RunConfig:
    """config.yaml of a run that has commits. Raises RunError where it is missing or damaged."""
    try:
        return read_config(run, environ={})  # references as they are: they are compared by their digests
    except NotFound as error:
        raise RunError(f"{run.url} has checkpoints but no config.yaml; restore it, or choose another run=") from error


def _stored_facts(run: Storage) -> dict[str, Any]:
    """run.json of a run that has commits. Raises RunError where it is missing or damaged."""
    try:
        return read_facts(run)
    except NotFound as error:
        raise RunError(f"{run.url} has checkpoints but no run.json; restore it, or choose another run=") from error


# --------------------------------------------------------------------------------------------------------------------
# For verbs that only read a run: eval, sample, export, report

C = TypeVar("C", bound=RunConfig, covariant=True)


@dataclass(frozen=True)
class RunInfo(Generic[C]):
    """A run directory. facts: the contents of run.json, written when the run began (manifest digests, contract,
    versions)."""

    storage: Storage
    config: C
    facts: dict[str, Any]

    @property
    def manifests(self) -> dict[str, str]:
        """Digest of each dataset's manifest, by role: "train", "mix1" and so on, and "val" if there is one."""
        return dict(self.facts["manifests"])

    @property
    def contract(self) -> dict[str, Any]:
        """The training cache's contract, as in its manifest. Raises RunError where it is none."""
        contract = dict(self.facts["contract"])
        try:
            contract_from_json(contract)
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(self.storage, FACTS, f"its contract is damaged: {error}") from error
        return contract


def load_any_run(url: str) -> RunInfo[RunConfig]:
    """Read the run at a folder or URL, whatever it trains. Raises RunError when there is none, or its files are
    damaged."""
    storage = open_storage(url)
    try:
        facts = read_facts(storage)
        return RunInfo(storage, read_config(storage, digests=facts.get("environment")), facts)
    except NotFound as error:
        raise missing(storage, error) from error


def load_run(url: str) -> RunInfo[TrainConfig]:
    """The same, of a diffusion model. Raises RunError also for the run of an autoencoder or a classifier."""
    run = load_any_run(url)
    if isinstance(run.config, TrainConfig):
        if not run.config.task.draws:
            raise RunError(
                f"{url} is the run of a classifier, which draws no pictures: guide=classifier guide.run={url} guides "
                "another run by it, eval measures it"
            )
        return RunInfo(run.storage, run.config, run.facts)
    raise RunError(
        f"{url} is the run of an autoencoder, which draws no pictures: latentmill export makes a folder of it for "
        "encoders.vae=, eval measures it"
    )


def load_classifier_run(url: str) -> RunInfo[TrainConfig]:
    """The same, of a classifier. Raises RunError also for a run that draws pictures, or of an autoencoder."""
    run = load_any_run(url)
    if isinstance(run.config, TrainConfig) and not run.config.task.draws:
        return RunInfo(run.storage, run.config, run.facts)
    raise RunError(f"{url} is not the run of a classifier: latentmill train task=classifier makes one")


def load_autoencoder_run(url: str) -> RunInfo[AutoencoderConfig]:
    """The same, of an autoencoder. Raises RunError also for a diffusion model's run."""
    run = load_any_run(url)
    if isinstance(run.config, AutoencoderConfig):
        return RunInfo(run.storage, run.config, run.facts)
    raise RunError(f"{url} is the run of a diffusion model, and not of an autoencoder (latentmill autoencoder)")
