"""An autoencoder's gradients against float64: a step written out with diffusers' classes and two backward passes.

L1 and codebooks have gradients that jump, where x - y changes its sign and where another code becomes the nearest. Away
from such places float32 differs from float64 by rounding alone, whatever the engine (system/test_first_stages.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from made.first_stage_reference import Step, batch_of, distance, objective_of, step_of, weights_of, written_out
from made.pixels import BATCH, KL, VQ, config_of
from pipeline.config import AutoencoderConfig, FirstStageConfig, FirstStageLossConfig
from pipeline.models.first_stage.trainable import PARTS
from pipeline.training.objectives.first_stage import FirstStageObjective, PreparedPictures

BOTH = pytest.mark.parametrize("stage", [KL, VQ], ids=lambda stage: stage.name)
PHASES = pytest.mark.parametrize("n", [0, 3 * BATCH, 5 * BATCH, 6 * BATCH], ids=["rests", "trains", "ramp", "whole"])
ROUNDING = 2e-6
"""Of a part's gradient and of figures, relative."""
OF_A_TENSOR = 2e-5
"""Of the gradient of one parameter."""


def config_with_l1(stage: FirstStageConfig) -> AutoencoderConfig:
    return config_of("c", "r", stage, loss=FirstStageLossConfig(l1=1.0, kl=1e-3))


def prepared_by(objective: FirstStageObjective, n: int, order: torch.Tensor | None = None) -> PreparedPictures:
    numbers = torch.arange(n, n + BATCH)
    return objective.prepare(batch_of(n, numbers if order is None else numbers[order]))


@BOTH
@PHASES
def test_gradients_norms_and_lambda_are_those_of_float64_to_rounding(stage: FirstStageConfig, n: int) -> None:
    config = config_with_l1(stage)
    objective = objective_of(config)
    prepared = prepared_by(objective, n)
    exact, margins = written_out(config, weights_of(config), prepared)
    assert margins.pixel > 1e-6 and margins.code > 1e-6, "at a jump float32 and float64 may differ by any amount"
    found = step_of(objective.engine, objective, prepared)
    assert found.figures == pytest.approx(exact.figures, rel=ROUNDING)
    assert found.norms == pytest.approx(exact.norms, rel=ROUNDING)
    assert found.gradients.keys() == exact.gradients.keys()
    far = distance(found.gradients, exact.gradients, PARTS)
    assert far.pop("tensor") < OF_A_TENSOR
    assert max(far.values()) < ROUNDING, far


@BOTH
def test_micro_batches_have_the_mean_of_their_gradients_each_with_its_own_lambda(stage: FirstStageConfig) -> None:
    config = config_with_l1(stage)
    config = replace(config, optim=replace(config.optim, micro_batch=BATCH // 2))
    objective = objective_of(config)
    prepared = prepared_by(objective, 6 * BATCH)
    exact, _ = written_out(config, weights_of(config), prepared, micro_batches=2)
    found = step_of(objective.engine, objective, prepared)
    assert found.figures == pytest.approx(exact.figures, rel=ROUNDING)
    assert max(distance(found.gradients, exact.gradients, PARTS).values()) < OF_A_TENSOR


@BOTH
def test_the_order_of_a_batch_changes_rounding_alone(stage: FirstStageConfig) -> None:
    config, steps = config_with_l1(stage), list[Step]()
    for order in (torch.arange(BATCH), torch.arange(BATCH).flip(0), torch.tensor([3, 1, 0, 2, 7, 5, 4, 6])):
        objective = objective_of(config)
        steps.append(step_of(objective.engine, objective, prepared_by(objective, 6 * BATCH, order)))
    for other in steps[1:]:
        assert other.figures == pytest.approx(steps[0].figures, rel=ROUNDING)
        assert max(distance(other.gradients, steps[0].gradients, PARTS).values()) < OF_A_TENSOR


@BOTH
@pytest.mark.parametrize("n", [0, 6 * BATCH], ids=["rests", "whole"])
def test_where_a_pixel_is_met_to_a_rounding_its_sign_alone_decides_how_l1s_gradient_jumps(
    stage: FirstStageConfig, n: int
) -> None:
    """One sign among 6,144 changes norms and lambda by thousandths: two runs whose weights differ by roundings differ
    as much, at the step at which an error has another sign in one of them."""
    config = config_with_l1(stage)
    objective = objective_of(config)
    prepared = prepared_by(objective, n)
    place = (2, 1, 5, 7)
    for _ in range(8):  # the encoder sees the pixel too
        with torch.no_grad():
            y = objective.module(prepared.images, prepared.noise).reconstruction
        prepared.images[place] = y[place]
    with torch.no_grad():
        errors = prepared.images - objective.module(prepared.images, prepared.noise).reconstruction
    assert errors[place].abs() < 1e-6 and (errors.abs() < 1e-6).sum() == 1
    exact = {}
    for sign in (-1.0, 0.0, 1.0):
        signs = errors.double().sign()
        signs[place] = sign
        exact[sign], _ = written_out(config, weights_of(config), prepared, signs=signs)
    found = step_of(objective.engine, objective, prepared)
    chosen = exact[float(errors[place].sign())]
    assert found.norms == pytest.approx(chosen.norms, rel=ROUNDING)
    assert found.figures == pytest.approx(chosen.figures, rel=ROUNDING)
    assert distance(found.gradients, chosen.gradients, PARTS)["autoencoder"] < ROUNDING
    assert distance(exact[1.0].gradients, exact[-1.0].gradients, PARTS)["autoencoder"] > 1000 * ROUNDING
