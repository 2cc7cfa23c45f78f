"""Changes of keys that may change when a run goes on, and that the learning rate depends on: said aloud, and kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.config import RunConfig
from pipeline.log import log
from pipeline.runs.directory import committed, last_sample
from pipeline.runs.stored import Change, read_config, read_facts
from pipeline.storage.base import Storage
from pipeline.training.schedule import learning_rate


def changes(config: RunConfig, run: Storage) -> list[dict[str, Any]]:
    """The changes that run.json keeps, with the one, if any, that this start makes, of which a warning is logged. []
    before the first commit. Call it before config.yaml is written anew. Rank 0 only."""
    n = next(iter(committed(run)), 0)
    if not n:
        return []
    kept = list(read_facts(run).get("changes", []))
    change = change_of_rate(read_config(run, forward=True), config, n)
    if change is None:
        return kept
    log.warning(
        f"train: {config.run} goes on at {n:,} samples with {change.key}={change.new:,}, where it was {change.old:,}: "
        f"at {change.at:,} samples the learning rate was to be {change.lr_old:.3g} and is {change.lr_new:.3g}. "
        f"optim.decay_samples={change.old} keeps it as it was"
    )
    return [*kept, dataclasses.asdict(change)]


def change_of_rate(old: RunConfig, new: RunConfig, n: int) -> Change | None:
    """What the change from one configuration to another does to the learning rate from n samples on; None where it
    does nothing."""
    ends = [config.optim.decay_samples or last_sample(config) for config in (old, new)]
    begun = max(n, new.optim.warmup)
    for at in (n, begun, (begun + max(ends)) // 2):
        rates = [learning_rate(at, last_sample(config), config.optim) for config in (old, new)]
        if rates[0] != rates[1]:
            decays = old.optim.decay_samples or new.optim.decay_samples
            key = "optim.decay_samples" if decays else "samples"
            return Change(n=n, key=key, old=ends[0], new=ends[1], at=at, lr_old=rates[0], lr_new=rates[1])
    return None
