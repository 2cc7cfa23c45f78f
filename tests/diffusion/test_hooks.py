"""Images to begin from, regions to keep and scores to follow, judged on data whose denoiser is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from made.samplers import CASES, CONFIG, EDM, FLOW, LATENT, NUMBERS, ZERO_SNR, network
from pipeline.config import DiffusionConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.hooks import Keep, Score, Start, Steer
from pipeline.diffusion.levels import Level, first_spread, levels_for
from pipeline.diffusion.prediction import make_prediction, to_eps
from pipeline.diffusion.process import PROCESSES
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.errors import ConfigError, RunError

MEAN, SPREAD = 0.0, 0.5
"""Of the data. Samplers begin from noise of mean 0, so data of another mean would be sampled a little off."""
NOTHING = Conditioning()
PROCESS = {"epsilon": CONFIG, "v": replace(CONFIG, prediction="v"), "zero_snr": ZERO_SNR, "flow": FLOW, "edm": EDM}
STEPS = {"ddim": 250, "euler": 250, "dpmpp_2m": 100, "heun": 50, "unipc": 250}
"""Steps after which a sampler is near its limit."""
Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]


def of_variance_1(config: DiffusionConfig, level: Level) -> Level:
    if PROCESSES[config.prediction] != "discrete":
        return level
    std = (level.alpha**2 + level.sigma**2) ** 0.5
    return replace(level, alpha=level.alpha / std, sigma=level.sigma / std)


def best_x0(x: Tensor, level: Level) -> Tensor:
    """E[x_0 | x] for data N(MEAN, SPREAD^2)."""
    total = level.alpha**2 * SPREAD**2 + level.sigma**2
    return MEAN + level.alpha * SPREAD**2 / total * (x - level.alpha * MEAN)


def best(config: DiffusionConfig, sampler: str, steps: int) -> Denoise:
    """The best network for such data."""
    meaning = make_prediction(config)
    levels = [of_variance_1(config, level) for level in levels_for(config, sampler, steps)]

    def denoise(network_input: Tensor, timestep_B: Tensor, _: Conditioning) -> Tensor:
        level = min(levels[:-1], key=lambda one: abs(one.timestep - float(timestep_B[0])))
        x = network_input / float(meaning.scale(torch.ones(()), level.sigma))
        x0 = best_x0(x, level)
        return meaning.target(x0, to_eps(x0, x, level.alpha, level.sigma), level.alpha, level.sigma)

    return denoise


def noise(count: int = 2048) -> Tensor:
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------------
# steer

WANTED, ERROR = 2.0, 0.4
"""What is measured of x_0, and with what standard deviation."""


def likelihood(x0: Tensor, x: Tensor, level: Level) -> Tensor:
    """log p(WANTED | x), exactly: x_0 given x is normal about its best estimate."""
    variance = SPREAD**2 * level.sigma**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)
    return -((WANTED - x0) ** 2).flatten(1).sum(1) / (2 * (variance + ERROR**2))


def of_x(x0: Tensor, x: Tensor, level: Level) -> Tensor:
    return likelihood(best_x0(x, level), x, level)


def begun(config: DiffusionConfig, sampler: str, steps: int, mean: float, spread: float) -> Tensor:
    """Noise for which x at the first level is that of data N(mean, spread^2): some of x_0 is left there."""
    level = levels_for(config, sampler, steps)[0]
    x = level.alpha * mean + (level.alpha**2 * spread**2 + level.sigma**2) ** 0.5 * noise()
    return x / first_spread(config, level)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PROCESS)
def test_following_a_likelihood_samples_the_posterior_in_every_sampler_and_process(name: str, sampler: str) -> None:
    config, steps = PROCESS[name], STEPS[sampler]
    denoise = best(config, sampler, steps)
    precision = 1 / SPREAD**2 + 1 / ERROR**2
    mean, spread = (MEAN / SPREAD**2 + WANTED / ERROR**2) / precision, precision**-0.5
    first = begun(config, sampler, steps, mean, spread)
    got, away = (
        sample(denoise, config, first, NOTHING, sampler=sampler, steps=steps, steer=[Steer(likelihood, weight)])
        for weight in (1.0, -1.0)
    )
    assert got.mean().item() == pytest.approx(mean, abs=0.03)
    assert got.std().item() == pytest.approx(spread, rel=0.05)
    assert away.mean().item() < MEAN - 0.5, "the other sign leads away"


@pytest.mark.parametrize("name", PROCESS)
def test_a_score_of_x_alone_does_the_same_without_a_gradient_through_the_network(name: str) -> None:
    config = PROCESS[name]
    through = Steer(likelihood, 1.0)
    alone = Steer(of_x, 1.0, through_network=False)
    exact = best(config, "unipc", 20)

    def without_gradients(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        assert not torch.is_grad_enabled()
        return exact(x, timestep_B, conditioning)

    expected = sample(exact, config, noise(64), NOTHING, sampler="unipc", steps=20, steer=[through])
    got = sample(without_gradients, config, noise(64), NOTHING, sampler="unipc", steps=20, steer=[alone])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # samplers read a network in float32


def test_scores_add_up_by_their_weights() -> None:
    denoise = best(CONFIG, "ddim", 20)

    def both(x0: Tensor, x: Tensor, level: Level) -> Tensor:
        return 0.5 * likelihood(x0, x, level) - 0.25 * (x0.flatten(1) ** 2).sum(1)

    def small(x0: Tensor, x: Tensor, level: Level) -> Tensor:
        return -(x0.flatten(1) ** 2).sum(1)

    one = sample(denoise, CONFIG, noise(64), NOTHING, sampler="ddim", steps=20, steer=[Steer(both, 1.0)])
    steers = [Steer(likelihood, 0.5), Steer(small, 0.25)]
    got = sample(denoise, CONFIG, noise(64), NOTHING, sampler="ddim", steps=20, steer=steers)
    torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-5)


def test_an_image_is_steered_the_same_in_any_batch() -> None:
    denoise = best(CONFIG, "dpmpp_2m", 20)

    def go(x: Tensor) -> Tensor:
        return sample(denoise, CONFIG, x, NOTHING, sampler="dpmpp_2m", steps=20, steer=[Steer(likelihood, 1.0)])

    together = go(noise(8))
    torch.testing.assert_close(torch.cat([go(noise(8)[i : i + 1]) for i in range(8)]), together)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (
            lambda x0, x, level: likelihood(x0.detach(), x, level),
            "has no gradient by the image",
        ),
        (lambda x0, x, level: 0 * likelihood(x0, x, level), "gradient of its score is zero everywhere"),
        (lambda x0, x, level: likelihood(x0, x, level) / 0.0, "is not finite"),
    ],
)
def test_a_gradient_that_guides_nothing_is_an_error_and_no_picture(score: Score, words: str) -> None:
    with pytest.raises(RunError, match=f"guide colours: .*{words}"):
        sample(
            network, CONFIG, initial_noise(0, NUMBERS, LATENT), NOTHING, steps=4, steer=[Steer(score, 1.0, "colours")]
        )


# --------------------------------------------------------------------------------------------------------------------
# start


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PROCESS)
def test_a_start_takes_the_last_steps_of_the_whole_walk(name: str, sampler: str, strength: float) -> None:
    config, image = PROCESS[name], torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(1))
    seen: list[float] = []

    def counted(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(float(timestep_B[0]))
        return network(x, timestep_B, conditioning)

    whole = levels_for(config, sampler, 20)
    taken = int(20 * strength)
    first = initial_noise(0, NUMBERS, LATENT)
    got = sample(counted, config, first, NOTHING, sampler=sampler, steps=20, start=Start(image, strength))
    assert list(dict.fromkeys(seen)) == pytest.approx([level.timestep for level in whole[20 - taken : -1]])
    # Where the image is the noise's best explanation, sampling gives it back.
    level = whole[20 - taken]
    assert Start(image, strength).levels(whole)[0] == level
    torch.testing.assert_close(Start(image, strength).x(level, first), level.alpha * image + level.sigma * first)
    assert got.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PROCESS)
def test_images_of_the_data_stay_of_the_data(name: str, sampler: str) -> None:
    config, steps = PROCESS[name], STEPS[sampler]
    image = MEAN + SPREAD * noise().flip(0)
    got = sample(
        best(config, sampler, steps), config, noise(), NOTHING, sampler=sampler, steps=steps, start=Start(image, 0.5)
    )
    assert got.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert got.std().item() == pytest.approx(SPREAD, rel=0.05)


def test_less_strength_leaves_more_of_the_image() -> None:
    image = MEAN + SPREAD * noise().flip(0)
    denoise = best(CONFIG, "ddim", 50)
    changes = [
        (sample(denoise, CONFIG, noise(), NOTHING, sampler="ddim", steps=50, start=Start(image, strength)) - image)
        .square()
        .mean()
        .item()
        for strength in (0.1, 0.3, 0.6, 1.0)
    ]
    assert changes == sorted(changes) and changes[0] < 0.2 * changes[-1]


@pytest.mark.parametrize(("strength", "words"), [(0.0, "more than 0"), (1.5, "at most 1"), (0.01, "at least 0.05")])
def test_a_strength_without_a_step_is_refused(strength: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Start(torch.zeros(1, *LATENT), strength).levels(levels_for(CONFIG, "ddim", 20))


# --------------------------------------------------------------------------------------------------------------------
# keep


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_the_image_to_the_bit_and_the_rest_is_drawn(name: str, sampler: str) -> None:
    config = CASES[name]
    image = torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(1))
    new = torch.zeros(3, 1, 8, 8)
    new[..., 4:] = 1
    first = initial_noise(0, NUMBERS, LATENT)
    got = sample(network, config, first, NOTHING, sampler=sampler, steps=20, keep=Keep(image, new))
    if levels_for(config, sampler, 20)[-1].sigma == 0:  # else the last level has some noise left
        torch.testing.assert_close(got[..., :4], image[..., :4], rtol=1e-6, atol=1e-6)
    without = sample(network, config, first, NOTHING, sampler=sampler, steps=20)
    assert (got - without)[..., 4:].abs().max() > 1e-3, "the network sees what is kept"
    everything = Keep(image, torch.ones(3, 1, 8, 8))
    torch.testing.assert_close(
        sample(network, config, first, NOTHING, sampler=sampler, steps=20, keep=everything), without
    )


def test_what_is_made_anew_does_not_depend_on_what_is_kept_where_the_data_do_not() -> None:
    """Pixels of this data are independent: only the kept ones may change."""
    denoise = best(CONFIG, "unipc", 50)
    image, new = torch.full((2048, 1, 1, 1), 5.0, dtype=torch.float64), torch.ones(2048, 1, 1, 1, dtype=torch.float64)
    new[::2] = 0
    got = sample(denoise, CONFIG, noise(), NOTHING, sampler="unipc", steps=50, keep=Keep(image, new))
    without = sample(denoise, CONFIG, noise(), NOTHING, sampler="unipc", steps=50)
    torch.testing.assert_close(got[1::2], without[1::2])
    assert (got[::2] == 5.0).all()


def test_a_kept_region_has_the_last_word_on_what_is_steered() -> None:
    denoise = best(CONFIG, "heun", 20)
    image, new = torch.full((64, 1, 1, 1), 5.0, dtype=torch.float64), torch.zeros(64, 1, 1, 1, dtype=torch.float64)
    got = sample(
        *(denoise, CONFIG, noise(64), NOTHING), sampler="heun", steps=20,
        keep=Keep(image, new), steer=[Steer(likelihood, 1.0)], start=Start(image, 0.5),
    )  # fmt: skip
    torch.testing.assert_close(got, image)
