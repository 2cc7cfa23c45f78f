"""How the discriminator begins when its time comes: the autoencoder's optimizer has counted steps for both until then,
as the optimizers of the paper's code have."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from made.first_stage_reference import batch_of, objective_of, weights_of
from made.pixels import BATCH, GAN, KL, config_of
from pipeline.config import OptimConfig
from pipeline.models.first_stage.discriminator import PatchDiscriminator, hinge
from pipeline.training.engines.base import Engine
from pipeline.training.objectives.first_stage import FirstStageObjective, PreparedPictures

LR, BETAS, EPS = 1e-3, (0.5, 0.9), 1e-8
RESTS = 12
"""Steps before the discriminator's first: so many that their count shows in the correction for bias."""


def made(**optim: object) -> tuple[Engine, FirstStageObjective]:
    settings = OptimConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, batch=BATCH, clip=0.0)
    config = config_of("c", "r", KL, gan=replace(GAN, after=(RESTS + 1) * BATCH), optim=replace(settings, **optim))  # type: ignore[arg-type]
    objective = objective_of(config)
    return objective.engine, objective


def backward(engine: Engine, objective: FirstStageObjective, n: int) -> PreparedPictures:
    prepared = objective.prepare(batch_of(n, torch.arange(n, n + BATCH)))
    engine.backward(objective.losses(prepared, slice(None)).total)
    return prepared


def discriminator_of(objective: FirstStageObjective) -> PatchDiscriminator:
    assert objective.module.discriminator is not None
    return objective.module.discriminator


def test_a_resting_discriminator_keeps_its_weights_and_has_no_moments() -> None:
    engine, objective = made()
    before = copy.deepcopy(discriminator_of(objective)).state_dict()
    for step in range(RESTS):
        backward(engine, objective, step * BATCH)
        engine.step(LR, engine.grad_norms())
    assert all(torch.equal(value, before[name]) for name, value in discriminator_of(objective).state_dict().items())
    for kind, fragments in engine.moments().items():
        for fragment in fragments:
            assert bool(fragment.view.any()) != fragment.name.startswith("discriminator."), (kind, fragment.name)


@pytest.mark.parametrize("betas", [BETAS, (0.9, 0.99)])
def test_the_first_step_of_a_discriminator_is_that_of_moments_of_zero_at_the_steps_count(
    betas: tuple[float, float],
) -> None:
    """Moments have the share 1 - beta of the first gradient, and their correction is that of all steps: after many, the
    step is (1 - 0.5) / sqrt(1 - 0.9) = 1.58 learning rates long with the paper's betas."""
    engine, objective = made(betas=betas)
    for step in range(RESTS):
        backward(engine, objective, step * BATCH)
        engine.step(LR, engine.grad_norms())
    before = {name: p.detach().clone() for name, p in discriminator_of(objective).named_parameters()}
    backward(engine, objective, RESTS * BATCH)
    gradients = {
        name: p.grad.clone() for name, p in discriminator_of(objective).named_parameters() if p.grad is not None
    }
    engine.step(LR, engine.grad_norms())
    count = RESTS + 1
    first, second = (1 - betas[0]) / (1 - betas[0] ** count), (1 - betas[1]) / (1 - betas[1] ** count)
    longest = 0.0
    for name, p in discriminator_of(objective).named_parameters():
        g = gradients[name].double()
        step_taken = (before[name].double() - p.detach().double()) / LR
        expected = first * g / (second**0.5 * g.abs() + EPS)
        torch.testing.assert_close(step_taken, expected, rtol=1e-3, atol=1e-3, msg=name)  # of float32 weights
        longest = max(longest, float(step_taken.abs().max()))
    assert longest == pytest.approx(first / second**0.5, rel=1e-3)
    assert abs(longest - 1) > 0.05, "a count of its own would give a step of one learning rate"


def test_a_discriminator_is_trained_as_by_an_optimizer_of_its_own_that_steps_from_the_first_batch_on() -> None:
    """The paper's code: before disc_start the discriminator's loss has the factor 0, and its optimizer steps."""
    engine, objective = made()
    own = copy.deepcopy(discriminator_of(objective))
    optimizer = torch.optim.Adam(own.parameters(), lr=LR, betas=BETAS, eps=EPS)
    for step in range(RESTS + 4):
        n = step * BATCH
        prepared = objective.prepare(batch_of(n, torch.arange(n, n + BATCH)))
        with torch.no_grad():
            y = objective.module(prepared.images, prepared.noise).reconstruction
        optimizer.zero_grad()
        factor = 1.0 if step >= RESTS else 0.0
        (factor * hinge(own(prepared.images), own(y)).mean()).backward()
        optimizer.step()
        engine.backward(objective.losses(prepared, slice(None)).total)
        engine.step(LR, engine.grad_norms())
    moved = 0.0
    fresh = weights_of(objective.config)
    for name, p in discriminator_of(objective).named_parameters():
        torch.testing.assert_close(p.detach(), dict(own.named_parameters())[name].detach(), rtol=1e-4, atol=2e-6)
        moved = max(moved, float((p.detach() - fresh[f"discriminator.{name}"]).abs().max()))
    assert moved > 2 * LR


def test_weight_decay_shrinks_a_resting_discriminator_too() -> None:
    """AdamW's decay is decoupled from gradients; the paper's weight decay is 0."""
    engine, objective = made(weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in discriminator_of(objective).named_parameters()}
    backward(engine, objective, 0)
    engine.step(LR, engine.grad_norms())
    for name, p in discriminator_of(objective).named_parameters():
        factor = 1 - LR * 0.1 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)
