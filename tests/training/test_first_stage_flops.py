"""FLOPs that a run of an autoencoder records: those of the step that it takes, by the plan's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from made.first_stage_reference import batch_of, objective_of
from made.pixels import BATCH, GAN, KL, VQ, config_of
from pipeline.config import FirstStageConfig, GanConfig
from pipeline.models.perceptual.network import Perceptual
from pipeline.planning.first_stage import step_cost
from pipeline.training.objectives.first_stage import FirstStageObjective

SIDE = 32
BOTH = pytest.mark.parametrize("stage", [KL, VQ], ids=lambda stage: stage.name)


def made(stage: FirstStageConfig, perceptual: Perceptual | None = None, **changes: Any) -> FirstStageObjective:
    return objective_of(config_of("c", "r", stage, crop=0, **changes), perceptual)


def counted(objective: FirstStageObjective, n: int) -> tuple[float, int]:
    """(FLOPs that the run records, FLOPs that PyTorch counts) of the step at n samples."""
    prepared = objective.prepare(batch_of(n, torch.arange(n, n + BATCH), SIDE))
    with FlopCounterMode(display=False) as counter:
        objective.engine.backward(objective.losses(prepared, slice(None)).total)
    return objective.flops(prepared) * BATCH, counter.get_total_flops()


@BOTH
def test_a_steps_flops_are_those_of_torchs_counter_before_and_after_the_discriminator_begins(
    stage: FirstStageConfig,
) -> None:
    objective = made(stage)
    recorded = []
    # it rests; is trained alone; its weight is 0 yet; the autoencoder feels it
    for n in (0, 3 * BATCH, 4 * BATCH, 5 * BATCH, 8 * BATCH):
        flops, exact = counted(objective, n)
        assert flops == pytest.approx(exact, rel=0.01), n
        recorded.append(flops)
    assert recorded[0] < recorded[1] == recorded[2] < recorded[3] == recorded[4]
    whole = step_cost(objective.config.autoencoder, GAN, BATCH, SIDE, SIDE)
    assert recorded[-1] == pytest.approx(sum(whole.training_flops().values()), rel=1e-9), "a plan has another step"


def test_a_step_without_a_discriminator_or_with_a_perceptual_distance_is_counted_too() -> None:
    assert counted(made(KL, gan=GanConfig()), 8 * BATCH)[0] == counted(made(KL), 0)[0]
    distance = Perceptual("alex")
    for parameter in distance.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    for n in (0, 8 * BATCH):
        flops, exact = counted(made(KL, distance), n)
        assert flops == pytest.approx(exact, rel=0.01)
        assert flops > 1.1 * counted(made(KL), n)[0]
