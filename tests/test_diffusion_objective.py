from dataclasses import replace
from functools import partial
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig, ModelConfig, TaskConfig
from pipeline.diffusion.objective import (
    LOSSES,
    TARGETS,
    TIMESTEPS,
    TO_X0,
    Objective,
    add_noise,
    stratified_timesteps,
    to_eps,
    training_randomness,
    uniform_timesteps,
)
from pipeline.diffusion.schedule import SCHEDULES, Schedule, scheduler_config
from pipeline.models.compat import declare_torchvision_ops
from pipeline.models.conditioning import Denoiser, make_task

CONFIG = DiffusionConfig()
LATENT = (4, 8, 8)


@pytest.mark.parametrize("name", ["scaled_linear", "linear"])
def test_alpha_bar_equals_diffusers_scheduler_from_the_exported_config(name):
    declare_torchvision_ops()
    from diffusers import DDIMScheduler

    config = replace(CONFIG, schedule=name, beta_start=0.0015, beta_end=0.0195)
    alpha_bar = Schedule(config).alpha_bar
    assert alpha_bar.dtype == torch.float64
    assert torch.allclose(
        alpha_bar.float(), DDIMScheduler.from_config(scheduler_config(config)).alphas_cumprod, rtol=1e-4
    )


def test_stable_diffusions_schedule_has_its_known_ends():
    alpha_bar = Schedule(CONFIG).alpha_bar
    assert alpha_bar[0].item() == pytest.approx(0.99915, abs=1e-12)
    assert alpha_bar[-1].item() == pytest.approx(0.0046601, abs=1e-6)  # Lin et al. 2023, table 1: sqrt is 0.068265
    alpha, sigma = Schedule(CONFIG).at(torch.tensor([0, 999]))
    assert alpha.shape == (2, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(2, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_target_gives_back_latent_and_noise(prediction):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(5, *LATENT, generator=g).double(), torch.randn(5, *LATENT, generator=g).double()
    alpha_bar = Schedule(CONFIG).alpha_bar[[0, 10, 300, 700, 999]].view(5, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x = add_noise(x0, noise, alpha, sigma)
    again = TO_X0[prediction](TARGETS[prediction](x0, noise, alpha, sigma), x, alpha, sigma)
    assert torch.allclose(again, x0, atol=1e-10)
    assert torch.allclose(to_eps(again, x, alpha, sigma), noise, atol=1e-10)


def test_noise_and_v_target_equal_diffusers():
    declare_torchvision_ops()
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=CONFIG.beta_start, beta_end=CONFIG.beta_end)
    x0, noise = torch.randn(2, 3, *LATENT, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    alpha, sigma = Schedule(CONFIG).at(t)
    assert torch.allclose(add_noise(x0, noise, alpha, sigma), theirs.add_noise(x0, noise, t), atol=1e-5)
    assert torch.allclose(TARGETS["v"](x0, noise, alpha, sigma), theirs.get_velocity(x0, noise, t), atol=1e-5)


@pytest.mark.parametrize(("loss", "expected"), [("l2", 4.0), ("l1", 2.0)])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_is_each_samples_mean_distance_to_the_target(prediction, loss, expected):
    objective = Objective(replace(CONFIG, prediction=prediction, loss=loss))
    x0, noise = torch.randn(2, 3, *LATENT, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 500, 998])
    seen = []

    def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x_t, timestep))
        target = TARGETS[prediction](x0, noise, *objective.schedule.at(t))
        return target + torch.tensor([0.0, 2.0, -2.0]).view(3, 1, 1, 1)

    losses = objective.loss(denoise, x0, noise, t)
    assert torch.allclose(losses, torch.tensor([0.0, expected, expected]), atol=1e-5)
    assert torch.equal(seen[0][0], add_noise(x0, noise, *objective.schedule.at(t)))
    assert torch.equal(seen[0][1], t)


def test_the_choices_in_the_configuration_are_those_that_exist():
    choices = get_type_hints(DiffusionConfig)
    for field, known in (
        ("schedule", SCHEDULES),
        ("prediction", TARGETS),
        ("prediction", TO_X0),
        ("timestep_sampling", TIMESTEPS),
        ("loss", LOSSES),
    ):
        assert get_args(choices[field]) == tuple(known)


# --------------------------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_what_a_sample_gets_does_not_depend_on_its_batch(sampling):
    config = replace(CONFIG, timestep_sampling=sampling)
    numbers = torch.arange(24) + 10**10
    whole = training_randomness(1, numbers, LATENT, config, 0.3)
    for rank in range(3):  # interleaved, as no one should but anyone may
        part = training_randomness(1, numbers[rank::3], LATENT, config, 0.3)
        for name in ("posterior", "noise", "timestep", "drop"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rank::3])
    assert not torch.equal(whole.posterior, whole.noise)
    assert not torch.equal(training_randomness(2, numbers, LATENT, config, 0.3).noise, whole.noise)


@pytest.mark.parametrize("sampling", [uniform_timesteps, stratified_timesteps])
def test_timesteps_are_uniform_over_all_noise_levels(sampling):
    t = sampling(0, torch.arange(20_000), 1000)
    assert t.dtype == torch.int64
    assert t.min() == 0
    assert t.max() == 999
    assert (torch.histc(t.float(), bins=10, min=0, max=1000) / 20_000 - 0.1).abs().max() < 0.01


def test_stratified_timesteps_follow_the_exact_fractions():
    numbers = torch.tensor([0, 1, 17, 2**35])
    fractions, _ = philox.stratified_uniform(9, numbers)
    expected = [((fraction % 2**64) >> 32) * 1000 >> 32 for fraction in fractions.tolist()]
    assert stratified_timesteps(9, numbers, 1000).tolist() == expected


def test_stratified_timesteps_make_batch_means_steadier():
    def spread(timesteps: Tensor) -> float:
        return timesteps.view(100, 64).double().mean(dim=1).std().item()

    n = torch.arange(6400)
    assert spread(stratified_timesteps(0, n, 1000)) < 0.3 * spread(uniform_timesteps(0, n, 1000))


def test_conditioning_is_dropped_with_the_given_probability():
    numbers = torch.arange(20_000)
    for drop in (0.0, 0.1, 1.0):
        got = (philox.uniform(0, philox.Stream.DROPOUT, numbers)[:, 0] < drop).float().mean().item()
        assert got == pytest.approx(drop, abs=0.01)
    assert training_randomness(0, numbers[:500], (1, 1, 1), CONFIG, 0.1).drop.sum() == 48


# --------------------------------------------------------------------------------------------------------------------
# Golden loss: a change of the network, its initial weights, the objective or the randomness shows here

GOLDEN = {
    "epsilon": [
        1.0162615,
        0.9596562,
        0.833908,
        0.7851827,
        0.8190671,
        0.7202248,
        0.7149391,
        0.6541555,
        0.7128229,
        0.6786281,
        0.5912195,
        0.5857512,
        0.6412246,
        0.6342942,
        0.606072,
        0.654668,
        0.5367905,
        0.5299854,
        0.4851757,
        0.5017164,
    ],
    "v": [
        0.9950927,
        1.0263309,
        0.9821719,
        0.9770743,
        1.0091882,
        0.9740999,
        0.9633614,
        1.0049647,
        1.0287217,
        0.9844775,
        0.9849657,
        1.0058132,
        1.0125747,
        1.0358844,
        1.0241292,
        1.0378336,
        1.0428262,
        0.9849491,
        0.9834931,
        0.9800335,
    ],
}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_loss_curve_of_a_tiny_model_is_the_held_one(prediction):
    model = ModelConfig(
        channels=16, multipliers=(1, 2), attention=(1, 2), blocks=1, heads=2, context_width=16, norm_groups=8
    )
    denoiser = Denoiser(model, make_task(TaskConfig(), LATENT, torch.zeros(5, 16)))
    denoiser.reset_parameters(0)
    config = replace(CONFIG, prediction=prediction, timestep_sampling="stratified")
    objective = Objective(config)
    numbers = torch.arange(8)
    latents = philox.normal(1, 100, numbers, LATENT)
    members = {"text": philox.normal(1, 101, numbers, (5, 16))}
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.2)
    losses = []
    for step in range(20):
        random = training_randomness(0, numbers + 8 * step, LATENT, config, 0.25)
        denoise = partial(denoiser, inputs=members, drop_B=random.drop)
        loss = objective.loss(denoise, latents, random.noise, random.timestep).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[prediction], rel=1e-5)
