"""A step's draws, whose hash the ledger holds: with several captions of a record also which one a sample saw."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.data.reading.batch import Batch
from pipeline.distributed.world import World
from pipeline.models.encoders.latents import Latents
from pipeline.runs.ledger import noise_digest
from pipeline.training.engines.base import Engine
from pipeline.training.inputs import Inputs
from pipeline.training.objectives.diffusion import DiffusionObjective


class Idle:
    """An engine that is asked for nothing but its device."""

    world = World()


def digest(chosen: Tensor | None) -> tuple[int, int]:
    """Number of the draws of a step, and the sum of their hashes."""
    inputs = Inputs(Latents("moments", 0.5, 0.1), None, 11)
    objective = DiffusionObjective(DiffusionConfig(), 0.1, engine=cast(Engine, Idle()), inputs=inputs)
    numbers, nowhere = torch.arange(100, 108), torch.zeros(8, dtype=torch.int64)
    tensors: dict[str, Any] = {"moments": torch.ones(8, 8, 4, 4).half(), "tokens": torch.ones(8, 3).int()}
    batch = Batch(100, numbers, tensors, nowhere, nowhere, read_captions=list, chosen=chosen)
    draws = objective.prepare(batch).digest
    return len(draws), int(noise_digest(numbers, draws))


def test_the_ledgers_sum_covers_the_captions_that_were_seen_and_is_as_before_without() -> None:
    first, other = torch.zeros(8, dtype=torch.int64), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    assert digest(None)[0] == 4 and digest(first)[0] == 5
    assert len({digest(chosen)[1] for chosen in (None, first, other)}) == 3
