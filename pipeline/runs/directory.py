"""The run directory: where things lie in it, and whether a configuration may go on with the run that is there.

    config.yaml  run.json  metrics.jsonl  ledger/  lease/  checkpoints/{n:012d}/  evals/{n:012d}/  report.html

Imports no torch, so that a verb can look at a run before it starts ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import DataConfig, TrainConfig
from pipeline.config.loading.merge import from_dict, to_dict
from pipeline.errors import NotFound, RunError
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

CHECKPOINTS = "checkpoints/"
COMMIT = "commit.json"
AVERAGES = "averages"
"""Folder of the kept snapshots of power-function averages."""
SNAPSHOT = "ema.safetensors"
"""In a folder of evals/: the weights that an evaluation outside of training is to be made of."""

MAY_CHANGE = (
    "run",
    "samples",
    "resume",
    "device",
    "data.train",  # where it is; its manifest must be the same
    "data.mix",  # so too, one by one
    "data.val",
    "data.memory_gb",
    "data.cache",
    "data.cache_gb",
    "data.workers",
    "data.prefetch",
    "optim.micro_batch",
    "model.name",
    "model.checkpointing",
    "model.activation_gb",
    "checkpoint",
    "guard",
    "eval",
    "tracking",
    "encoders",  # where they are; the contract holds their weights' hashes
    "compile",
    "precision",  # of forward and backward passes: what is kept between steps is fp32 in all
    "launch",
    "deepspeed",
    "watchdog_s",
)
"""Keys of the configuration, or groups of them, that may change at a resume. Whatever else differs is another run."""


def checkpoint_folder(n: int) -> str:
    """Where the checkpoint at n samples lies, with a slash at its end."""
    return f"{CHECKPOINTS}{n:012d}/"


def evaluation_folder(n: int, name: str = "") -> str:
    """Where an evaluation at n samples is kept in a run directory. name: tells evaluations at the same n apart; "" for
    the one that belongs to training."""
    return f"evals/{n:012d}" + (f"-{name}" if name else "")


def committed(run: Storage) -> list[int]:
    """n of every committed checkpoint, the newest first."""
    keys = [info.key for info in run.list(CHECKPOINTS)]
    return sorted((int(key.split("/")[1]) for key in keys if key.endswith("/" + COMMIT)), reverse=True)


def evaluated(run: Storage, n: int) -> bool:
    """Whether the evaluation that belongs to training at n samples is done, or left to a job of its own."""
    return any(run.exists(f"{evaluation_folder(n)}/{name}") for name in ("metrics.json", SNAPSHOT))


def last_sample(config: TrainConfig) -> int:
    """n at the end of the run: `samples` rounded up to whole global batches."""
    return -(-config.samples // config.optim.batch) * config.optim.batch


def is_finished(config: TrainConfig, run: Storage) -> bool:
    """Whether the run's last sample is committed and, where there are evaluations, evaluated."""
    end = last_sample(config)
    return end in committed(run)[:1] and (not config.data.val or evaluated(run, end))


# --------------------------------------------------------------------------------------------------------------------
# May this configuration go on with that run?


def require_resumable(config: TrainConfig, run: Storage) -> None:
    """Hold the run directory against config.resume and the configuration it was begun with. Raises RunError."""
    commits = committed(run)
    if config.resume == "must" and not commits:
        raise RunError(f"{config.run} has no checkpoint to resume from; resume=auto begins it")
    if config.resume == "never" and commits:
        raise RunError(f"{config.run} has a checkpoint at {commits[0]} samples; resume=auto goes on")
    if not commits:
        return
    if changed := differences(to_dict(from_dict(TrainConfig, _stored_config(run))), to_dict(config)):
        raise RunError(
            f"{config.run} was begun with another configuration: {'; '.join(changed)}; restore it, or another run="
        )
    if commits[0] > last_sample(config):
        raise RunError(f"{config.run} has seen {commits[0]} samples already, more than samples={config.samples}")


def dataset_urls(data: DataConfig) -> tuple[str, ...]:
    """Every cache that is trained on, in the order of their numbers."""
    return (data.train, *data.mix)


def roles(count: int) -> list[str]:
    """The names of `count` caches that are trained on among a run's manifests: train, mix1, mix2, ..."""
    return ["train", *(f"mix{number}" for number in range(1, count))]


def dataset_digests(facts: Mapping[str, Any]) -> list[str]:
    """Digests of the manifests of every cache that a run is trained on, by its run.json."""
    manifests = facts["manifests"]
    return [manifests[role] for role in roles(len(manifests)) if role in manifests]


def begun_with(run: Storage) -> list[str]:
    """`dataset_digests` of a run with something committed; [] for any other."""
    return dataset_digests(json.loads(run.get("run.json"))) if committed(run) else []


def require_same_datasets(config: TrainConfig, run: Storage, digests: Sequence[str], mixture: Sequence[int]) -> None:
    """Raises RunError when the run was trained on other datasets than those with these manifests, in this order, or on
    another mixture of them (weights in integers)."""
    from pipeline.data.order.shuffle import ORDER

    before = begun_with(run)
    if not before:
        return
    facts = json.loads(run.get("run.json"))
    if (order := facts.get("order", 1)) != ORDER:
        raise RunError(
            f"{config.run} took its samples in an order (version {order}) that this latentmill does not know (it has "
            f"version {ORDER}): go on with the one that began it, or choose another run="
        )
    if len(before) != len(digests):
        raise RunError(
            f"{config.run} was trained on {len(before)} datasets, but data.train and data.mix name {len(digests)}; "
            "restore them, or choose another run="
        )
    for number, (old, new, url) in enumerate(zip(before, digests, dataset_urls(config.data), strict=True)):
        if old == new:
            continue
        where = f"data.mix={url}" if number else f"data.train={url}"
        if old in digests and new in before:
            raise RunError(
                f"{config.run} was trained on these datasets in another order: {where} was number "
                f"{before.index(new) + 1} of data.train and data.mix and is number {number + 1}; restore their order"
            )
        raise RunError(
            f"{config.run} was trained on a dataset whose manifest is {old[:12]}, but that of {where} is {new[:12]}; "
            "restore that dataset, or choose another run="
        )
    if (weights := facts.get("mixture", [])) != list(mixture):
        raise RunError(
            f"{config.run} was trained on a mixture of {' : '.join(map(str, weights))}, but data.weights and the "
            f"datasets give {' : '.join(map(str, mixture))}; restore data.weights, or choose another run="
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """One line per key that differs and may not: "optim.lr was 0.001 and is 0.0001"."""
    lines = []
    for key in sorted({*old, *new}):
        where, before, now = f"{path}{key}", old.get(key), new.get(key)
        if where in MAY_CHANGE:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differences(before, now, f"{where}.")
        elif before != now:
            lines.append(f"{where} was {before} and is {now}")
    return lines


def fixed_keys(config: TrainConfig) -> dict[str, Any]:
    """Everything in the configuration that may not change within a run, as plain data: a commit holds it."""

    def fixed(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        return {
            key: fixed(value, f"{path}{key}.") if isinstance(value, Mapping) else value
            for key, value in tree.items()
            if f"{path}{key}" not in MAY_CHANGE
        }

    return fixed(to_dict(config))


def _stored_config(run: Storage) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(run.get("config.yaml"))
    except NotFound as error:
        raise RunError(f"{run.url} has checkpoints but no config.yaml; restore it, or choose another run=") from error


# --------------------------------------------------------------------------------------------------------------------
# For those who only read a run: eval, sample, export, report


@dataclass(frozen=True)
class RunInfo:
    """A run directory. facts: run.json, written when the run began (manifest digests, contract, versions)."""

    storage: Storage
    config: TrainConfig
    facts: dict[str, Any]

    @property
    def manifests(self) -> dict[str, str]:
        """Digest of each dataset's manifest, by role: "train", "mix1" and so on, and "val" when there is one."""
        return dict(self.facts["manifests"])

    @property
    def contract(self) -> dict[str, Any]:
        """The training cache's contract, as its manifest has it."""
        return dict(self.facts["contract"])


def load_run(url: str) -> RunInfo:
    """What the run at this folder or URL is. Raises RunError when there is none."""
    storage = open_storage(url)
    try:
        facts = json.loads(storage.get("run.json"))
        config = from_dict(TrainConfig, _stored_config(storage))
    except NotFound as error:
        raise RunError(
            f"{url} is not a run directory ({error}); give the folder that `latentmill train run=` wrote"
        ) from error
    return RunInfo(storage, config, facts)
