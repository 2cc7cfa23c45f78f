import itertools
import json
import math
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from made.samplers import CASES, CONFIG, EDM, FLOW, LATENT, NUMBERS, ZERO_SNR, conditionings, network
from pipeline.config import DiffusionConfig, SamplerConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.levels import (
    LEVELS,
    LOWEST_LOG_SNR,
    Level,
    even_flow_levels,
    even_levels,
    first_spread,
    flow_levels,
    karras_levels,
    leading_levels,
    levels_for,
    trailing_levels,
)
from pipeline.diffusion.objective import Objective, training_randomness
from pipeline.diffusion.prediction import make_prediction, to_eps
from pipeline.diffusion.process import make_process
from pipeline.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, heun, unipc
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.interchange.scheduler import scheduler_config
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops


def diffusers_sample(scheduler: Any, noise: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [5, 20, 50, 250])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["epsilon", "v", "x0", "cosine-epsilon", "cosine-v", "zero_snr-v", "zero_snr-x0",
                                  "zero_snr-cosine", "flow", "edm", "edm-1"])  # fmt: skip
def test_every_sampler_equals_diffusers_with_the_exported_config(name, sampler, steps):
    """If no scheduler of diffusers is the same, the export says so. With zero_snr, numbers of steps that divide T,
    because diffusers' DDIM always steps by T // steps."""
    declare_torchvision_ops()
    import diffusers

    config = CASES[name]
    if (name, sampler) in UNLIKE:
        with pytest.raises(ConfigError, match=f"no scheduler of diffusers samples .* as sampler={sampler}"):
            scheduler_config(config, sampler)
        return
    exported = scheduler_config(config, sampler)
    json.loads(json.dumps(exported, allow_nan=False))
    if (name, sampler, steps) == ("zero_snr-cosine", "euler", 5):
        return  # their float32 tables are off by 2.8e-4 over strides from sigma 4096
    noise = initial_noise(0, NUMBERS, LATENT)
    expected = diffusers_sample(getattr(diffusers, exported["_class_name"]).from_config(exported), noise, steps)
    got = sample(network, config, noise, Conditioning(), sampler=sampler, steps=steps)
    assert (got - expected).norm() < 1e-4 * expected.norm()


UNLIKE = {
    *((name, sampler) for name in ("zero_snr-v", "zero_snr-x0", "zero_snr-cosine")
      for sampler in ("dpmpp_2m", "heun", "unipc")),
    *(("cosine-epsilon", sampler) for sampler in ("euler", "heun", "unipc")),
    *(("flow", sampler) for sampler in ("dpmpp_2m", "unipc")),
    *((name, sampler) for name in ("edm", "edm-1") for sampler in ("heun", "unipc")),
}  # fmt: skip
"""What no scheduler of diffusers does."""


def test_one_leading_step_would_start_without_noise_and_is_refused():
    with pytest.raises(ConfigError, match="start at timestep 1 of 1000"):
        sample(network, CONFIG, initial_noise(0, NUMBERS, LATENT), Conditioning(), sampler="ddim", steps=1)


def test_heun_of_edm_is_the_papers_algorithm_1():
    """Karras et al. 2022, algorithm 1 without noise, line by line."""
    meaning, noise = make_prediction(EDM), initial_noise(0, NUMBERS, LATENT).double()

    def denoised(x: Tensor, sigma: float) -> Tensor:
        timestep_input = torch.full((len(x),), math.log(sigma) / 4)
        return meaning.to_x0(network(meaning.scale(x, sigma), timestep_input), x, 1.0, sigma)

    t = [level.sigma for level in karras_levels(EDM, 9)]
    x = math.hypot(1, t[0]) * noise
    for i in range(9):
        d = (x - denoised(x, t[i])) / t[i]
        there = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d = (d + (there - denoised(there, t[i + 1])) / t[i + 1]) / 2
        x = x + (t[i + 1] - t[i]) * d
    got = sample(network, EDM, noise, Conditioning(), sampler="heun", steps=9)
    assert (got - x).norm() < 1e-5 * x.norm()


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


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2), (heun, 2), (unipc, 3)])
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


def interpolated(config: DiffusionConfig, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the discrete process between its timesteps: log(sigma / alpha) is interpolated."""
    alpha_bar = Schedule(config).alpha_bar.clone()
    alpha_bar[-1] = alpha_bar[-1].clamp(min=2.0**-24)
    known = ((1 - alpha_bar) / alpha_bar).log() / 2
    low = timestep.double().floor().long().clamp(max=len(known) - 2)
    ratio = torch.lerp(known[low], known[low + 1], timestep.double() - low).exp().view(-1, 1, 1, 1)
    return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()


def exact_network(config: DiffusionConfig) -> Any:
    """The network that predicts E[x_0 | x] exactly, in the configuration's parameterization: the limit of training."""
    process, meaning = make_process(config), make_prediction(config)

    def network(scaled: Tensor, told_B: Tensor, conditioning: Conditioning | None = None) -> Tensor:
        time = told_B
        if config.prediction == "flow":
            time = told_B.double() / config.timesteps
        elif config.prediction == "edm":
            time = (4 * told_B.double()).exp()
        between = told_B.is_floating_point() and config.prediction not in ("flow", "edm")
        at = interpolated(config, told_B) if between else process.at(time)
        alpha, sigma = (value.double() for value in at)
        x = scaled.double() / meaning.scale(torch.ones_like(sigma), sigma)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        return meaning.target(x0, to_eps(x0, x, alpha, sigma), alpha, sigma)

    return network


@pytest.mark.parametrize("name", CASES)
def test_the_exact_denoiser_is_what_the_loss_asks_for(name):
    """An error d of the conditional mean costs exactly d^2. So training converges to the network with which samplers
    are exact, with the same timestep inputs."""
    config, numbers = CASES[name], torch.arange(4096)
    draws = training_randomness(0, numbers, LATENT, config, 0.0)
    x0 = MEAN + SPREAD * draws.posterior
    network = exact_network(config)
    objective = Objective(config)
    best = objective.loss(network, x0, draws.noise, draws.timestep).double().mean().item()
    for error in (0.2, -0.2):

        def wrong(x: Tensor, told_B: Tensor, error: float = error) -> Tensor:
            return network(x, told_B) + error

        worse = objective.loss(wrong, x0, draws.noise, draws.timestep)
        assert worse.double().mean().item() - best == pytest.approx(error**2, rel=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", CASES)
def test_sampling_with_the_exact_denoiser_gives_the_data(name, sampler):
    noise = initial_noise(0, torch.arange(20), LATENT)
    steps = 200 if sampler == "euler" else 50  # of first order, over levels that begin at sigma 20,000 for cosine
    latents = sample(exact_network(CASES[name]), CASES[name], noise, Conditioning(), sampler=sampler, steps=steps)
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert latents.std().item() == pytest.approx(SPREAD, rel=0.1)


@pytest.mark.parametrize(
    ("name", "sampler", "order", "steps", "error"),
    [
        ("zero_snr-v", "ddim", 1, 640, 0.01),
        ("zero_snr-v", "dpmpp_2m", 1, 640, 0.003),
        ("zero_snr-x0", "ddim", 1, 640, 0.01),
        ("zero_snr-x0", "dpmpp_2m", 1, 640, 0.003),
        ("flow", "ddim", 1, 160, 0.01),
        ("flow", "dpmpp_2m", 2, 640, 1e-4),
        ("edm", "ddim", 1, 160, 0.02),
        ("edm", "dpmpp_2m", 2, 160, 1e-3),
    ],
)
def test_samplers_converge_over_each_process_own_levels(name, sampler, order, steps, error):
    """They converge to the flow's exact end, MEAN + SPREAD (x - alpha MEAN) / sqrt((alpha SPREAD)^2 + sigma^2), from
    pure noise or from sigma_max to zero noise.

    Timesteps of equal strides leave the discrete process at sigma^2 = O(1 / steps), and the step from there to no noise
    is of first order in sigma^2, so no sampler is of second order on them. Its T is large here, against rounding.
    """
    config = CASES[name]
    if name.startswith("zero"):
        config = replace(config, timesteps=80_000, beta_start=CONFIG.beta_start / 80, beta_end=CONFIG.beta_end / 80)
    network = exact_network(config)
    noise = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    errors = []
    for count in (steps // 2, steps):
        first = levels_for(config, sampler, count)[0]
        x = math.hypot(first.alpha, first.sigma) * noise
        scale = SPREAD / math.hypot(first.alpha * SPREAD, first.sigma)
        exact = MEAN + scale * (x - first.alpha * MEAN)
        got = sample(network, config, noise, Conditioning(), sampler=sampler, steps=count)
        errors.append((got - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    assert errors[1] < error


@pytest.mark.parametrize(("sampler", "order", "steps"), [("euler", 1, 320), ("heun", 2, 160)])
@pytest.mark.parametrize("name", ["epsilon", "v", "x0", "cosine-v", "flow", "edm"])
def test_eulers_and_heuns_method_converge_at_their_order_for_every_prediction(name, sampler, order, steps):
    """They converge to the flow's exact state at the last level with noise, and then take the one remaining step."""
    config = CASES[name]
    noise = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    errors = []
    for count in (steps // 2, steps):
        levels = levels_for(config, sampler, count)
        first, last = levels[0], levels[-2]
        x = first_spread(config, first) * noise
        scale = math.hypot(last.alpha * SPREAD, last.sigma) / math.hypot(first.alpha * SPREAD, first.sigma)
        exact = gaussian_x0(last.alpha * MEAN + scale * (x - first.alpha * MEAN), last)
        got = sample(exact_network(config), config, noise, Conditioning(), sampler=sampler, steps=count)
        errors.append((got - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), errors


def test_unipc_needs_fewer_steps_than_dpm_solver_on_a_mixture():
    """The reason to have it: with 10 steps its error on 40 sharp Gaussians in 16 dimensions is two thirds of the
    other's."""
    centres = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.9
    noise = torch.randn(200, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def mixture_x0(x: Tensor, level: Level) -> Tensor:
        total = level.alpha**2 * 0.25**2 + level.sigma**2
        apart = x[:, None] - level.alpha * centres
        weights = (-apart.square().sum(-1) / (2 * total)).softmax(-1)
        return (weights[..., None] * (centres + level.alpha * 0.25**2 / total * apart)).sum(1)

    exact = heun(mixture_x0, levels_for(CONFIG, "unipc", 600), noise)
    errors = {
        name: (SAMPLERS[name](mixture_x0, levels_for(CONFIG, name, 10), noise) - exact).norm().item()
        for name in ("dpmpp_2m", "unipc")
    }
    assert errors["unipc"] < 0.75 * errors["dpmpp_2m"]


def test_steps_of_the_solver_from_no_signal_at_all_are_its_limits():
    """As alpha goes to 0, the solver's first step converges to DDIM's, and the influence of the first prediction on the
    second step vanishes (r goes to infinity). At alpha = 0 both steps are DDIM's, and tiny alphas are close to that."""
    x = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    rest = [Level(0, 0.6, 0.8), Level(0, 0.8, 0.6)]
    limit = dpmpp_2m(gaussian_x0, [Level(0, 0.0, 1.0), *rest], x)
    assert torch.allclose(limit, ddim(gaussian_x0, [Level(0, 0.0, 1.0), *rest], x), rtol=1e-12)
    gaps = [
        (dpmpp_2m(gaussian_x0, [Level(0, alpha, (1 - alpha**2) ** 0.5), *rest], x) - limit).abs().max().item()
        for alpha in (1e-2, 1e-20, 1e-200)
    ]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] > 0


@pytest.mark.parametrize("config", [FLOW, EDM])
def test_ddim_is_eulers_method_on_the_flow(config):
    """x + (t' - t) v for rectified flow; x + (sigma' - sigma) (x - D) / sigma for EDM (Karras et al. 2022, algorithm 1
    without its second half), on any network."""
    levels = levels_for(config, "ddim", 7)
    meaning = make_prediction(config)
    x = initial_noise(0, NUMBERS, LATENT).double()

    def output(x: Tensor, level: Level) -> Tensor:
        return torch.sin(x.roll(1, dims=-1)) + level.sigma / (1 + level.sigma) * x

    def predict(x: Tensor, level: Level) -> Tensor:
        return meaning.to_x0(output(x, level), x, level.alpha, level.sigma)

    expected = x
    for now, then in itertools.pairwise(levels):
        d = output(expected, now) if config is FLOW else (expected - predict(expected, now)) / now.sigma
        expected = expected + (then.sigma - now.sigma) * d
    assert torch.allclose(ddim(predict, levels, x), expected, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler):
    given, null = conditionings()
    noise = initial_noise(4, NUMBERS, LATENT)
    whole = sample(network, CONFIG, noise, given, null, sampler=sampler, steps=10, guidance=2.0)
    contexts = [context for context in (given.context, null.context) if context is not None]
    for i in range(3):
        alone = sample(
            network,
            CONFIG,
            initial_noise(4, torch.tensor([i]), LATENT),
            *(Conditioning(context[i : i + 1]) for context in contexts),
            sampler=sampler,
            steps=10,
            guidance=2.0,
        )
        assert torch.allclose(alone[0], whole[i], atol=1e-5)


def test_initial_noise_is_the_seeds_and_the_image_numbers():
    noise = initial_noise(0, torch.arange(10), LATENT)
    assert torch.equal(noise[3:7], initial_noise(0, torch.arange(3, 7), LATENT))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, initial_noise(1, torch.arange(10), LATENT))


def test_timesteps_are_those_documented():
    assert [level.timestep for level in leading_levels(CONFIG, 5)] == [801, 601, 401, 201, 1, 0]
    assert [level.timestep for level in even_levels(CONFIG, 5)] == [999, 799, 599, 400, 200, -1]
    assert even_levels(CONFIG, 5)[-1].sigma == 0
    assert [level.timestep for level in trailing_levels(ZERO_SNR, 5)] == [999, 799, 599, 399, 199, -1]
    assert [level.timestep for level in trailing_levels(ZERO_SNR, 3)] == [999, 666, 332, -1]  # table 2 from T = 1000
    assert levels_for(ZERO_SNR, "ddim", 5)[0].log_snr == -math.inf
    assert [level.sigma for level in even_flow_levels(FLOW, 4)] == [1, 0.75, 0.5, 0.25, 0]
    assert [level.sigma for level in flow_levels(FLOW, 4)] == pytest.approx([1, 0.667, 0.334, 0.001, 0])
    assert flow_levels(FLOW, 4)[0].timestep == 1000
    assert isinstance(flow_levels(FLOW, 4)[0].timestep, float)


def test_levels_of_edm_are_equation_5():
    """Karras et al. 2022: (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho, then 0."""
    levels = karras_levels(EDM, 18)
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert [level.sigma for level in levels] == pytest.approx([*((a + i / 17 * (b - a)) ** 7 for i in range(18)), 0])
    assert [level.timestep for level in levels[:-1]] == pytest.approx([math.log(x.sigma) / 4 for x in levels[:-1]])
    assert [level.sigma for level in karras_levels(EDM, 1)] == pytest.approx([80, 0])


def test_a_second_order_walk_of_epsilon_begins_where_epsilon_still_says_something():
    cosine = replace(CONFIG, schedule="cosine")
    begins = {config.prediction: even_levels(config, 10)[0] for config in (cosine, replace(cosine, prediction="v"))}
    assert LOWEST_LOG_SNR <= begins["epsilon"].log_snr < LOWEST_LOG_SNR + 0.3
    assert begins["v"].timestep == 999
    assert even_levels(CONFIG, 10)[0].timestep == 999  # Stable Diffusion's schedule is not cut


def test_the_samplers_in_the_configuration_are_those_that_exist():
    choices = get_args(get_type_hints(SamplerConfig)["sampler"])
    assert choices == tuple(SAMPLERS)
    assert all(set(choices) == set(levels) for levels in LEVELS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least one"),
        ({"sampler": "ddim", "steps": 600}, "start at timestep 600 of 1000"),
        ({"sampler": "ddim", "steps": 1001}, "at most 500"),
        ({"sampler": "dpmpp_2m", "steps": 1000}, "fewer steps"),
        ({"sampler": "ddim", "steps": 1001, "config": ZERO_SNR}, "at most as many steps"),
    ],
)
def test_numbers_of_steps_that_a_sampler_cannot_take_are_refused(arguments, message):
    config = arguments.pop("config", CONFIG)
    with pytest.raises(ConfigError, match=message):
        sample(network, config, initial_noise(0, NUMBERS, LATENT), Conditioning(), **arguments)
