"""The classifier's objective: cross-entropy of what a denoiser would be given, with the noise of its time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.data.reading.batch import Batch
from pipeline.diffusion.objective import Objective, training_randomness
from pipeline.diffusion.process import make_process
from pipeline.diffusion.timesteps import draw_times, quarter_times
from pipeline.distributed.world import World
from pipeline.models.encoders.latents import Latents
from pipeline.training.inputs import Inputs
from pipeline.training.objectives.classifier import ClassifierObjective

CLASSES, SEED = 5, 11
CONFIGS = [
    DiffusionConfig(offset_noise=0.2),
    DiffusionConfig(prediction="v", zero_terminal_snr=True, timestep_sampling="stratified"),
    DiffusionConfig(prediction="flow", timestep_density="logit_normal"),
    DiffusionConfig(prediction="edm", timestep_density="log_normal", timestep_mean=-0.4),
]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.prediction)


class Listening:
    """An engine that says what its module was given, and answers with fixed logits."""

    def __init__(self) -> None:
        self.world = World()
        self.given: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.given.append((x, timestep))
        return torch.arange(len(x) * CLASSES).view(len(x), CLASSES).sin()


def batch_of(numbers: Tensor, moments: Tensor, classes: Tensor) -> Batch:
    tensors, nowhere = {"moments": moments, "cond.class": classes}, torch.zeros(len(numbers), dtype=torch.int64)
    return Batch(int(numbers[0]), numbers, tensors, nowhere, nowhere, read_captions=list)


@EACH
def test_it_is_given_latents_with_the_noise_of_their_times_and_never_clean_ones(config: DiffusionConfig) -> None:
    engine = Listening()
    inputs = Inputs(Latents("moments", 0.5, 0.1), None, SEED)
    objective = ClassifierObjective(config, 0.0, engine=engine, inputs=inputs)  # type: ignore[arg-type]
    numbers = torch.arange(100, 108)
    moments = torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(1)).half()
    classes = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2], dtype=torch.int32)
    prepared = objective.prepare(batch_of(numbers, moments, classes))
    loss = objective.losses(prepared, slice(2, 6))

    draws = training_randomness(SEED, numbers, (4, 4, 4), config, 0.0)
    z = Latents("moments", 0.5, 0.1).draw(moments, draws.posterior)
    alpha, sigma = make_process(config).at(draws.timestep)
    noisy = Objective(config).prediction.scale(alpha * z + sigma * draws.noise, sigma)
    ((x, timestep),) = engine.given
    assert torch.allclose(x, noisy[2:6], atol=1e-6)
    assert not torch.allclose(x, z[2:6], atol=0.1)
    assert torch.equal(timestep, make_process(config).timestep_input(draws.timestep)[2:6])
    assert torch.equal(prepared.digest[1], draws.noise) and torch.equal(prepared.digest[2], draws.timestep)

    logits = torch.arange(4 * CLASSES).view(4, CLASSES).sin()
    expected = F.cross_entropy(logits, classes[2:6].long(), reduction="none")
    assert torch.equal(loss.loss_B, expected) and loss.total == expected.mean()
    assert prepared.bucket_B is not None and len(prepared.bucket_B) == 8


@EACH
def test_quarters_of_the_noise_levels_are_drawn_equally_often_and_do_not_overlap(config: DiffusionConfig) -> None:
    numbers = torch.arange(4000)
    quarters = [quarter_times(SEED, numbers, config, quarter, 4) for quarter in range(4)]
    for lower, upper in pairwise(quarters):
        assert lower.max() <= upper.min()
    drawn = draw_times(SEED, numbers, config)
    for quarter, times in enumerate(quarters):
        share = ((drawn >= times.min()) & (drawn <= times.max())).float().mean()
        assert share == pytest.approx(0.25, abs=0.03)
        spread = times.double().unique()
        assert len(spread) > 200, quarter
