"""The noise levels of samples: they have the stated distribution, evenly spread, and depend only on (seed, n)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.timesteps import WORDS, draw_times, logit_normal

CONFIG = DiffusionConfig()
FLOW = replace(CONFIG, prediction="flow")
EDM = replace(CONFIG, prediction="edm", timestep_density="log_normal", timestep_mean=-1.2, timestep_std=1.2)
N = 20_000
UNIFORM, STRATIFIED = [634, 618, 29, 871], [634, 252, 141, 612]


@pytest.mark.parametrize("sampling", WORDS)
def test_timesteps_are_uniform_over_all_noise_levels(sampling):
    t = draw_times(0, torch.arange(N), replace(CONFIG, timestep_sampling=sampling))
    assert t.dtype == torch.int64
    assert t.min() == 0
    assert t.max() == 999
    assert (torch.histc(t.float(), bins=10, min=0, max=1000) / N - 0.1).abs().max() < 0.01


def test_the_timesteps_of_saved_runs_never_change():
    """Timesteps of a version without densities: a resumed run continues with them."""
    numbers = torch.tensor([0, 1, 17, 2**35])
    assert draw_times(9, numbers, CONFIG).tolist() == UNIFORM
    assert draw_times(9, numbers, replace(CONFIG, timestep_sampling="stratified")).tolist() == STRATIFIED


def test_stratified_timesteps_follow_the_exact_fractions():
    numbers = torch.tensor([0, 1, 17, 2**35])
    fractions, _ = philox.stratified_uniform(9, numbers)
    expected = [((fraction % 2**64) >> 32) * 1000 >> 32 for fraction in fractions.tolist()]
    config = replace(CONFIG, timestep_sampling="stratified")
    assert draw_times(9, numbers, config).tolist() == expected


def expected_distribution(config: DiffusionConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Distribution function of a float time, from scipy."""
    normal = scipy.stats.norm(config.timestep_mean, config.timestep_std)
    if config.timestep_density == "logit_normal":
        return lambda t: normal.cdf(scipy.special.logit(t))
    if config.timestep_density == "log_normal":
        return lambda sigma: normal.cdf(np.log(sigma))
    return scipy.stats.uniform().cdf


@pytest.mark.parametrize("sampling", WORDS)
@pytest.mark.parametrize(
    "config",
    [
        FLOW,
        replace(FLOW, timestep_density="logit_normal"),
        replace(FLOW, timestep_density="logit_normal", timestep_mean=-0.5, timestep_std=0.6),
        EDM,
    ],
)
def test_continuous_times_have_the_stated_distribution(config, sampling):
    """Kolmogorov-Smirnov distance: independent draws are within the 0.1% critical value 1.95 / sqrt(N); low-discrepancy
    draws, whose distance is O(log N / N), are a hundred times closer."""
    times = draw_times(2, torch.arange(N) + 10**12, replace(config, timestep_sampling=sampling))
    assert times.dtype == torch.float32
    distance = scipy.stats.kstest(times.double().numpy(), expected_distribution(config)).statistic
    assert distance < (1.95 / N**0.5 if sampling == "uniform" else 3e-4)


@pytest.mark.parametrize("sampling", WORDS)
@pytest.mark.parametrize("timesteps", [7, 1000])
def test_discrete_logit_normal_timesteps_have_the_stated_probabilities(sampling, timesteps):
    config = replace(
        CONFIG,
        timesteps=timesteps,
        timestep_sampling=sampling,
        timestep_density="logit_normal",
        timestep_mean=0.3,
        timestep_std=0.8,
    )
    t = draw_times(4, torch.arange(N), config)
    assert t.dtype == torch.int64
    edges = scipy.stats.norm(0.3, 0.8).cdf(scipy.special.logit(np.arange(1, timesteps) / timesteps))
    found = np.cumsum(np.bincount(t.numpy(), minlength=timesteps))[:-1] / N
    assert np.abs(found - edges).max() < (1.95 / N**0.5 if sampling == "uniform" else 3e-4)


@given(st.integers(0, 2**32 - 1), st.floats(-20, 20), st.floats(0.01, 8))
def test_no_word_leaves_the_range_of_timesteps(word, mean, std):
    """Not even if logit(t) is so large that t rounds to 1."""
    t = logit_normal(torch.tensor([word]), mean, std)
    assert 0 <= t.item() <= 1
    assert min(int(t.item() * 1000), 999) in range(1000)


def test_extreme_means_stay_within_the_timesteps():
    for mean in (-40.0, 40.0):
        config = replace(CONFIG, timestep_density="logit_normal", timestep_mean=mean)
        assert draw_times(0, torch.arange(100), config).unique().tolist() == [0 if mean < 0 else 999]


def star_discrepancy(times: Tensor, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """Star discrepancy of the times' quantiles in one batch: the Kolmogorov-Smirnov distance."""
    return scipy.stats.kstest(times.double().numpy(), cdf).statistic


@pytest.mark.parametrize("config", [FLOW, replace(FLOW, timestep_density="logit_normal"), EDM])
@pytest.mark.parametrize("first", [0, 977, 2**40])
def test_stratified_times_of_a_batch_are_evenly_spread_in_every_density(config, first):
    """Any 64 consecutive samples have a discrepancy below 3 / 64; independent samples have about 0.87 / sqrt(64)."""
    cdf = expected_distribution(config)
    numbers = torch.arange(64) + first
    stratified = star_discrepancy(draw_times(0, numbers, replace(config, timestep_sampling="stratified")), cdf)
    assert stratified < 3 / 64
    independent = [star_discrepancy(draw_times(seed, numbers, config), cdf) for seed in range(8)]
    assert stratified < 0.6 * float(np.mean(independent))


def test_stratified_timesteps_make_batch_means_steadier():
    def spread(config: DiffusionConfig) -> float:
        return draw_times(0, torch.arange(6400), config).view(100, 64).double().mean(dim=1).std().item()

    for config in (CONFIG, replace(CONFIG, timestep_density="logit_normal")):
        assert spread(replace(config, timestep_sampling="stratified")) < 0.3 * spread(config)


def test_one_word_belongs_to_a_sample_whatever_the_density():
    """Densities are quantile functions of one word, so times of the same sample keep their order in all of them."""
    numbers = torch.arange(500)
    for base in (FLOW, replace(FLOW, timestep_density="logit_normal"), EDM):
        for config in (base, replace(base, timestep_sampling="stratified")):
            words = WORDS[config.timestep_sampling](5, numbers)
            assert (draw_times(5, numbers, config)[words.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("config", [FLOW, replace(CONFIG, timestep_density="logit_normal"), EDM])
def test_times_are_the_same_for_any_number_of_ranks(config, world):
    numbers = torch.arange(48) + 7
    whole = draw_times(1, numbers, config)
    parts = [draw_times(1, numbers[rank * 48 // world : (rank + 1) * 48 // world], config) for rank in range(world)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, timestep_density="logit_normal"), FLOW, EDM])
def test_times_are_bit_equal_on_a_gpu(config):
    numbers = torch.arange(4096) + 10**9
    assert torch.equal(draw_times(3, numbers.cuda(), config).cpu(), draw_times(3, numbers, config))
