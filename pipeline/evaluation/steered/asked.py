"""What `latentmill eval` was asked to give images besides their conditioning, checked against the run and the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import EvalRunConfig, TaskConfig
from pipeline.config.tasks.found import facts_of, require_start
from pipeline.config.values.bounds import require
from pipeline.data.format.contract import Contract
from pipeline.evaluation.records import Records
from pipeline.evaluation.steered.keep import KeepJudge, RecordKeep
from pipeline.evaluation.steered.start import RecordStart, StartJudge
from pipeline.evaluation.steering import RecordSteering
from pipeline.evaluation.tasks.judge import Judge
from pipeline.evaluation.validation import Validation
from pipeline.models.encoders.first_stage import FirstStage


@dataclass(frozen=True)
class Asked:
    """Made before any weights are loaded. strength: as Start's, None for none. start, keep: their judges; None for what
    was not asked."""

    strength: float | None
    start: StartJudge | None
    keep: KeepJudge | None

    @property
    def reads(self) -> tuple[str, ...]:
        """Arrays of a record that it needs."""
        judges: list[Judge] = [judge for judge in (self.start, self.keep) if judge is not None]
        return tuple(dict.fromkeys(name for judge in judges for name in judge.reads))

    def steering(self, validation: Validation, first_stage: FirstStage) -> tuple[RecordSteering, ...]:
        """What steers the images. What is kept comes first: it is judged before anything is put back, and all that
        follows after."""
        records, made = Records(validation, first_stage), list[RecordSteering]()
        if self.keep is not None:
            made.append(RecordKeep(self.keep, records))
        if self.start is not None and self.strength is not None:
            made.append(RecordStart(self.start, records, self.strength))
        return tuple(made)


def asked_of(config: EvalRunConfig, contract: Contract, task: TaskConfig, where: str) -> Asked:
    """What was asked. contract: of the cache `where`. Raises ConfigError for what task or cache do not allow."""
    require_start(task, config.strength)
    require(
        not config.keep or "mask" not in facts_of(task).asks,
        f"keep=true: a model of task={task.name} is given the masks, and pictures are put back outside of them: leave "
        "keep out",
    )
    require(
        not config.keep or contract.conditions.mask is not None,
        f"keep=true: {where} holds no masks: leave keep out, or encode it with conditions=[mask] among its conditions",
    )
    return Asked(
        config.strength,
        None if config.strength is None else StartJudge(contract, task),
        KeepJudge(contract, task) if config.keep else None,
    )


def keys_of(steering: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `latentmill eval` that a card's steering comes from. steering: of a card that was parsed."""
    return {"strength": steering.get("strength"), "keep": steering.get("keep", False)}
