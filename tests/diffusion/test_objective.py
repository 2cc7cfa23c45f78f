from dataclasses import replace
from functools import partial
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from made.facts import Facts
from pipeline import philox
from pipeline.config import DiffusionConfig, ModelConfig, TextTask
from pipeline.diffusion.objective import LOSSES, Objective, training_noise, training_randomness
from pipeline.diffusion.prediction import PREDICTIONS, add_noise, make_prediction, min_snr_weight, to_eps
from pipeline.diffusion.process import PROCESSES, make_process
from pipeline.diffusion.schedule import SCHEDULES, Schedule
from pipeline.diffusion.timesteps import DENSITIES, WORDS
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.tasks.choose import make_task

CONFIG = DiffusionConfig()
LATENT = (4, 8, 8)


def made(prediction: str, **changes: Any) -> DiffusionConfig:
    """A configuration with this prediction, and the density that it needs."""
    density = "log_normal" if prediction == "edm" else "uniform"
    return replace(CONFIG, **({"prediction": prediction, "timestep_density": density} | changes))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_gives_back_latent_and_noise(prediction):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(5, *LATENT, generator=g).double(), torch.randn(5, *LATENT, generator=g).double()
    config = made(prediction)
    if PROCESSES[prediction] == "discrete":
        alpha_bar = Schedule(config).alpha_bar[[0, 10, 300, 700, 999]].view(5, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    else:
        times = torch.tensor([0.002, 0.1, 0.5, 0.9, 1.0 if prediction == "flow" else 80.0], dtype=torch.float64)
        alpha, sigma = make_process(config).at(times)
    meaning = make_prediction(config)
    x = add_noise(x0, noise, alpha, sigma)
    again = meaning.to_x0(meaning.target(x0, noise, alpha, sigma), x, alpha, sigma)
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
    target = make_prediction(made("v")).target(x0, noise, alpha, sigma)
    assert torch.allclose(target, theirs.get_velocity(x0, noise, t), atol=1e-5)


@pytest.mark.parametrize(("loss", "expected"), [("l2", 4.0), ("l1", 2.0)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_each_samples_mean_distance_to_the_target(prediction, loss, expected):
    objective = Objective(made(prediction, loss=loss))
    x0, noise = torch.randn(2, 3, *LATENT, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 500, 998] if PROCESSES[prediction] == "discrete" else [0.1, 0.5, 0.9])
    alpha, sigma = objective.process.at(t)
    seen = []

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x, timestep))
        target = objective.prediction.target(x0, noise, alpha, sigma)
        return target + torch.tensor([0.0, 2.0, -2.0]).view(3, 1, 1, 1)

    losses = objective.loss(denoise, x0, noise, t)
    assert torch.allclose(losses, torch.tensor([0.0, expected, expected]), atol=1e-5)
    assert torch.equal(seen[0][0], objective.prediction.scale(alpha * x0 + sigma * noise, sigma))
    timestep_input = {"flow": 1000 * t, "edm": t.log() / 4}.get(prediction, t)
    assert torch.equal(seen[0][1], timestep_input)


@given(st.floats(1e-3, 0.999), st.floats(0.5, 20), st.sampled_from(["epsilon", "v", "x0"]))
def test_min_snr_weights_are_the_papers(alpha_bar, gamma, prediction):
    """Hang et al. 2023, section 3.4, in the paper's form."""
    snr = alpha_bar / (1 - alpha_bar)
    paper = {"x0": min(snr, gamma), "epsilon": min(snr, gamma) / snr, "v": min(snr, gamma) / (snr + 1)}[prediction]
    alpha, sigma = torch.tensor([alpha_bar, 1 - alpha_bar], dtype=torch.float64).sqrt()
    assert min_snr_weight(prediction, gamma, alpha, sigma).item() == pytest.approx(paper, rel=1e-12)


def test_min_snr_is_one_weight_of_the_error_in_x0_whatever_is_predicted():
    """The same wrong x_0, expressed in each prediction, costs the same: min(SNR, 5) times its squared error."""
    x0, noise = torch.randn(2, 4, *LATENT, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 100, 400, 900])
    alpha, sigma = Schedule(CONFIG).at(t)
    x = add_noise(x0, noise, alpha, sigma)
    wrong = x0 + 0.3 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    expected = ((alpha / sigma) ** 2).clamp(max=5).view(-1) * (wrong - x0).square().mean(dim=(1, 2, 3))
    for prediction in ("epsilon", "v", "x0"):
        objective = Objective(made(prediction, min_snr_gamma=5.0))
        output = objective.prediction.target(wrong, to_eps(wrong, x, alpha, sigma), alpha, sigma)

        def network(x: Tensor, told_B: Tensor, output: Tensor = output) -> Tensor:
            return output

        losses = objective.loss(network, x0, noise, t)
        assert torch.allclose(losses, expected, rtol=2e-3), prediction
    unweighted = Objective(made("v")).loss(lambda x, t: torch.zeros_like(x), x0, noise, t)
    weighted = Objective(made("v", min_snr_gamma=5.0)).loss(lambda x, t: torch.zeros_like(x), x0, noise, t)
    assert torch.equal(weighted, unweighted * min_snr_weight("v", 5.0, alpha, sigma).view(-1))


def test_the_edm_loss_is_karras_weighted_error_of_the_denoiser():
    """lambda(sigma) ||D(x) - x_0||^2 with lambda = (sigma^2 + s^2) / (sigma s)^2 (Karras et al. 2022, equations 2 and
    8, table 1), where D is made of c_skip, c_out, c_in and c_noise as in the table."""
    s = 0.7
    sigma = torch.tensor([0.01, 0.5, 3.0, 60.0])
    x0, noise = torch.randn(2, 4, *LATENT, generator=torch.Generator().manual_seed(0)).double()
    x = x0 + sigma.view(-1, 1, 1, 1) * noise

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.sin(3 * x) + c_noise.view(-1, 1, 1, 1)

    def column(values: Tensor) -> Tensor:
        return values.double().view(-1, 1, 1, 1)

    c_skip, c_out = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2).sqrt()
    c_in, c_noise = 1 / (sigma**2 + s**2).sqrt(), sigma.log() / 4
    d = column(c_skip) * x + column(c_out) * network(column(c_in) * x, c_noise)
    weight = (sigma**2 + s**2) / (sigma * s) ** 2
    expected = weight * (d - x0).square().mean(dim=(1, 2, 3))
    losses = Objective(made("edm", sigma_data=s)).loss(network, x0.float(), noise.float(), sigma)
    assert torch.allclose(losses.double(), expected, rtol=1e-3)


def test_edm_preconditioning_equals_diffusers():
    declare_torchvision_ops()
    from diffusers import EDMEulerScheduler

    theirs: Any = EDMEulerScheduler(sigma_data=0.7)
    ours = make_prediction(made("edm", sigma_data=0.7))
    x, output = torch.randn(2, 3, *LATENT, generator=torch.Generator().manual_seed(0))
    sigma_B = torch.tensor([0.004, 1.0, 50.0])
    alpha, sigma = make_process(made("edm")).at(sigma_B)
    assert torch.equal(alpha, torch.ones(3, 1, 1, 1))
    assert torch.allclose(ours.scale(x, sigma), theirs.precondition_inputs(x, sigma))
    assert torch.allclose(ours.to_x0(output, x, alpha, sigma), theirs.precondition_outputs(x, output, sigma))
    assert torch.allclose(make_process(made("edm")).timestep_input(sigma_B), theirs.precondition_noise(sigma_B))


def test_edm_inputs_and_targets_have_unit_variance_at_every_level():
    """The purpose of preconditioning (Karras et al. 2022, appendix B.6), on data with the assumed standard
    deviation."""
    x0, noise = torch.randn(2, 4, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    ours, sigma = make_prediction(made("edm")), torch.tensor([0.002, 0.3, 2.0, 80.0]).view(4, 1, 1, 1)
    x0 = 0.5 * x0
    for values in (ours.scale(x0 + sigma * noise, sigma), ours.target(x0, noise, 1.0, sigma)):
        assert torch.allclose(values.std(dim=(1, 2, 3)), torch.ones(4), atol=0.02)


def test_flow_noise_and_time_equal_diffusers():
    declare_torchvision_ops()
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs: Any = FlowMatchEulerDiscreteScheduler()
    process = make_process(made("flow"))
    x0, noise = torch.randn(2, 4, *LATENT, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.001, 0.25, 0.5, 1.0])
    timestep_input = process.timestep_input(t)
    assert timestep_input.tolist() == pytest.approx([1, 250, 500, 1000])
    alpha, sigma = process.at(t)
    timesteps = theirs.timesteps[[999, 750, 500, 0]]
    assert torch.allclose(timesteps, timestep_input)
    assert torch.allclose(add_noise(x0, noise, alpha, sigma), theirs.scale_noise(x0, timesteps, noise), atol=1e-6)
    h = 1e-3  # the target is the velocity of the path
    later = add_noise(x0.double(), noise.double(), *process.at(t.double() + h))
    now = add_noise(x0.double(), noise.double(), *process.at(t.double()))
    target = make_prediction(made("flow")).target(x0, noise, alpha, sigma)
    assert torch.allclose(target.double(), (later - now) / h, atol=1e-6)


def test_the_choices_in_the_configuration_are_those_that_exist():
    choices = get_type_hints(DiffusionConfig)
    for field, known in (
        ("schedule", SCHEDULES),
        ("prediction", PREDICTIONS),
        ("prediction", PROCESSES),
        ("timestep_sampling", WORDS),
        ("timestep_density", DENSITIES),
        ("loss", LOSSES),
    ):
        assert get_args(choices[field]) == tuple(known)


# --------------------------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
@pytest.mark.parametrize("prediction", ["epsilon", "flow", "edm"])
def test_what_a_sample_gets_does_not_depend_on_its_batch(prediction, sampling, density):
    density = "log_normal" if prediction == "edm" else density
    config = made(prediction, timestep_sampling=sampling, timestep_density=density, offset_noise=0.1)
    numbers = torch.arange(24) + 10**10
    whole = training_randomness(1, numbers, LATENT, config, 0.3)
    for rank in range(3):  # interleaved, as no one should but anyone may
        part = training_randomness(1, numbers[rank::3], LATENT, config, 0.3)
        for name in ("posterior", "noise", "timestep", "drop"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rank::3])
    alone = [training_randomness(1, numbers[i : i + 1], LATENT, config, 0.3) for i in range(24)]
    assert torch.equal(torch.cat([one.timestep for one in alone]), whole.timestep)
    assert torch.equal(torch.cat([one.noise for one in alone]), whole.noise)
    assert not torch.equal(whole.posterior, whole.noise)
    assert not torch.equal(training_randomness(2, numbers, LATENT, config, 0.3).noise, whole.noise)


def test_offset_noise_has_its_covariance():
    """E[n n^T] is 1 + 0.3^2 on the diagonal, 0.3^2 within a channel, 0 between channels and samples (Guttenberg
    2023)."""
    shape = (2, 2, 2)
    noise = training_noise(0, torch.arange(200_000), shape, 0.3).double().flatten(1)
    covariance = noise.T @ noise / len(noise)
    channel = torch.arange(8) // 4
    expected = torch.eye(8) + 0.09 * (channel[:, None] == channel[None])
    assert (covariance - expected).abs().max() < 0.012  # of each entry, 5 standard errors of 1.09 sqrt(2 / N)
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.005


def test_offset_noise_is_added_to_the_same_noise_and_is_off_by_default():
    numbers = torch.arange(6) + 10**11
    plain = training_noise(3, numbers, LATENT, 0.0)
    assert torch.equal(plain, philox.normal(3, philox.Stream.NOISE, numbers, LATENT))
    assert torch.equal(training_randomness(3, numbers, LATENT, CONFIG, 0.1).noise, plain)
    config = replace(CONFIG, offset_noise=0.1)
    added = training_randomness(3, numbers, LATENT, config, 0.1).noise - plain
    offset = 0.1 * philox.normal(3, philox.Stream.OFFSET, numbers, (4, 1, 1))
    assert torch.allclose(added, offset.expand(6, *LATENT), atol=1e-6)


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
    denoiser = Denoiser(model, make_task(TextTask(), model, Facts(), torch.zeros(5, 16)))
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
