import itertools
import math
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig, SamplerConfig
from pipeline.diffusion.sampler import (
    LEVELS,
    SAMPLERS,
    Level,
    ddim,
    dpmpp_2m,
    even_levels,
    initial_noise,
    leading_levels,
    sample,
)
from pipeline.diffusion.schedule import Schedule, scheduler_config
from pipeline.errors import ConfigError
from pipeline.models.compat import declare_torchvision_ops
from pipeline.models.conditioning import Conditioning

CONFIG = DiffusionConfig()
LATENT = (4, 8, 8)
NUMBERS = torch.arange(3)


def network(x: Tensor, timestep_B: Tensor, conditioning: Conditioning | None = None) -> Tensor:
    """A fixed nonlinear function of latent, timestep and context, in a network's place."""
    shift = torch.zeros(())
    if conditioning is not None and conditioning.context is not None:
        shift = conditioning.context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    level = timestep_B.view(-1, 1, 1, 1) / 1000
    return torch.sin(x.roll(1, dims=-1)) * (0.3 + 0.7 * level) + 0.2 * x + shift


def diffusers_sample(scheduler: Any, noise: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 5, 20, 30, 250])
def test_ddim_equals_diffusers_with_the_exported_config(prediction, steps):
    declare_torchvision_ops()
    from diffusers import DDIMScheduler

    config = replace(CONFIG, prediction=prediction)
    noise = initial_noise(0, NUMBERS, LATENT)
    if steps == 1:  # one leading step starts without noise: diffusers computes something, we refuse
        with pytest.raises(ConfigError, match="start at timestep 1 of 1000"):
            sample(network, config, noise, Conditioning(), sampler="ddim", steps=1)
        return
    expected = diffusers_sample(DDIMScheduler.from_config(scheduler_config(config)), noise, steps)
    got = sample(network, config, noise, Conditioning(), sampler="ddim", steps=steps)
    assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
def test_dpm_solver_equals_diffusers(prediction, steps):
    declare_torchvision_ops()
    from diffusers import DPMSolverMultistepScheduler

    config = replace(CONFIG, prediction=prediction)
    exported = scheduler_config(config)
    theirs = DPMSolverMultistepScheduler(
        **{
            k: exported[k]
            for k in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
        },
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        timestep_spacing="linspace",
    )
    noise = initial_noise(0, NUMBERS, LATENT)
    expected = diffusers_sample(theirs, noise, steps)
    got = sample(network, config, noise, Conditioning(), sampler="dpmpp_2m", steps=steps)
    assert (got - expected).norm() < 1e-4 * expected.norm()


MEAN, SPREAD = 0.7, 0.5


def gaussian_x0(x: Tensor, level: Level) -> Tensor:
    """E[x_0 | x] for data N(MEAN, SPREAD^2): the best denoiser, in closed form."""
    total = level.alpha**2 * SPREAD**2 + level.sigma**2
    return MEAN + level.alpha * SPREAD**2 / total * (x - level.alpha * MEAN)


def even_in_log_snr(steps: int) -> list[Level]:
    levels = []
    for i in range(steps + 1):
        log_snr = -2.5 + 5.0 * i / steps
        alpha = 1 / math.sqrt(1 + math.exp(-2 * log_snr))
        levels.append(Level(i, alpha, math.sqrt(1 - alpha**2)))
    return levels


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2)])
def test_samplers_converge_on_a_gaussian_at_their_order(sampler, order):
    x = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80, 160):
        levels = even_in_log_snr(steps)
        start, end = levels[0], levels[-1]
        # Along the exact flow (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays what it is.
        scale = [math.sqrt(level.alpha**2 * SPREAD**2 + level.sigma**2) for level in (start, end)]
        exact = end.alpha * MEAN + (x - start.alpha * MEAN) * scale[1] / scale[0]
        errors.append((sampler(gaussian_x0, levels, x) - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_sampling_with_the_exact_denoiser_gives_the_data(sampler, prediction):
    schedule = Schedule(CONFIG)

    def exact(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        t = int(timestep_B[0])
        alpha, sigma = schedule.alpha_bar[t].sqrt().item(), (1 - schedule.alpha_bar[t]).sqrt().item()
        x0 = gaussian_x0(x, Level(t, alpha, sigma))
        eps = (x - alpha * x0) / sigma
        return eps if prediction == "epsilon" else alpha * eps - sigma * x0

    noise = initial_noise(0, torch.arange(20), LATENT)
    config = replace(CONFIG, prediction=prediction)
    latents = sample(exact, config, noise, Conditioning(), sampler=sampler, steps=50)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert latents.std().item() == pytest.approx(SPREAD, rel=0.1)


def conditionings() -> tuple[Conditioning, Conditioning]:
    g = torch.Generator().manual_seed(0)
    return Conditioning(torch.randn(3, 5, 16, generator=g)), Conditioning(torch.zeros(3, 5, 16))


def test_guidance_extrapolates_from_null_in_one_pass_of_twice_the_rows():
    given, null = conditionings()
    rows = []

    def counted(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        rows.append(len(x))
        return network(x, timestep_B, conditioning)

    def mixed(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        without, with_text = network(x, timestep_B, null), network(x, timestep_B, conditioning)
        return without + 3.0 * (with_text - without)

    noise = initial_noise(0, NUMBERS, LATENT)
    guided = sample(counted, CONFIG, noise, given, null, steps=5, guidance=3.0)
    assert rows == [6] * 5
    assert torch.allclose(guided, sample(mixed, CONFIG, noise, given, steps=5), atol=1e-4)
    assert not torch.allclose(guided, sample(network, CONFIG, noise, given, steps=5), atol=1e-2)


def test_guidance_of_one_skips_the_null_pass():
    given, null = conditionings()
    rows = []

    def counted(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        rows.append(len(x))
        return network(x, timestep_B, conditioning)

    noise = initial_noise(0, NUMBERS, LATENT)
    sample(counted, CONFIG, noise, given, null, steps=4, guidance=1.0)
    assert rows == [3] * 4


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    given, null = conditionings()
    noise = initial_noise(4, NUMBERS, LATENT)
    whole = sample(network, CONFIG, noise, given, null, sampler=sampler, steps=10, guidance=2.0)
    for i in range(3):
        alone = sample(
            network,
            CONFIG,
            initial_noise(4, torch.tensor([i]), LATENT),
            given.rows(slice(i, i + 1)),
            null.rows(slice(i, i + 1)),
            sampler=sampler,
            steps=10,
            guidance=2.0,
        )
        assert torch.allclose(alone[0], whole[i], atol=1e-5)


def test_initial_noise_is_the_seeds_and_the_image_numbers():
    noise = initial_noise(0, torch.arange(10), LATENT)
    assert torch.equal(noise[3:7], initial_noise(0, torch.arange(3, 7), LATENT))
    assert not torch.equal(noise, initial_noise(1, torch.arange(10), LATENT))


def test_timesteps_are_those_documented():
    schedule = Schedule(CONFIG)
    assert [level.timestep for level in leading_levels(schedule, 5)] == [801, 601, 401, 201, 1, 0]
    assert [level.timestep for level in even_levels(schedule, 5)] == [999, 799, 599, 400, 200, -1]
    assert even_levels(schedule, 5)[-1].sigma == 0


def test_the_samplers_in_the_configuration_are_those_that_exist():
    assert get_args(get_type_hints(SamplerConfig)["sampler"]) == tuple(SAMPLERS) == tuple(LEVELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least one"),
        ({"sampler": "ddim", "steps": 600}, "start at timestep 600 of 1000"),
        ({"sampler": "ddim", "steps": 1001}, "at most 500"),
        ({"sampler": "dpmpp_2m", "steps": 1000}, "fewer steps"),
    ],
)
def test_numbers_of_steps_that_a_sampler_cannot_take_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sample(network, CONFIG, initial_noise(0, NUMBERS, LATENT), Conditioning(), **arguments)
