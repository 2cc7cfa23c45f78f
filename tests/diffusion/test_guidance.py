"""Guidance in an interval of noise levels, and rescaled guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from made.samplers import CASES, CONFIG, EDM, FLOW, LATENT, NUMBERS, conditionings, network
from pipeline.config import DiffusionConfig, SamplerConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import Guidance, guide
from pipeline.diffusion.levels import Level, levels_for
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops


@pytest.mark.parametrize("name", ["v", "flow", "edm"])
def test_outside_of_the_interval_there_is_no_second_half_and_no_guidance(name: str) -> None:
    config = CASES[name]
    given, null = conditionings()
    rows: list[int] = []

    def counted(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        rows.append(len(x))
        return network(x, timestep_B, conditioning)

    levels = levels_for(config, "ddim", 10)[:-1]
    inside = [0.3 < level.sigma / max(level.alpha, 1e-9) <= 5.0 for level in levels]
    assert 1 < sum(inside) < 10
    noise = initial_noise(0, NUMBERS, LATENT)
    guidance = Guidance(3.0, low=0.3, high=5.0)
    got = sample(counted, config, noise, given, null, sampler="ddim", steps=10, guidance=guidance)
    assert rows == [6 if one else 3 for one in inside]

    def by_hand(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        conditional = network(x, timestep_B, given)
        if not inside[len(rows) - 10]:
            rows.append(0)
            return conditional
        rows.append(0)
        without = network(x, timestep_B, null)
        return without + 3.0 * (conditional - without)

    expected = sample(by_hand, config, noise, given, sampler="ddim", steps=10)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_bounds_are_of_sigma_over_alpha_and_zero_is_none() -> None:
    levels = [Level(0, 0.0, 1.0), Level(0, 0.6, 0.8), Level(0, 1.0, 4 / 3), Level(0, 1.0, 0.1)]
    assert [Guidance(2.0).applies(level) for level in levels] == [True] * 4
    assert [Guidance(2.0, low=0.2).applies(level) for level in levels] == [True, True, True, False]
    assert [Guidance(2.0, high=1.0).applies(level) for level in levels] == [False, False, False, True]
    assert not Guidance(1.0, low=0.2).applies(levels[0])


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_is_diffusers(phi: float) -> None:
    declare_torchvision_ops()
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    both = torch.randn(6, *LATENT, generator=torch.Generator().manual_seed(0))
    text, null = both.chunk(2)
    mixed = null + 5.0 * (text - null)
    got = guide(both, Guidance(5.0, rescale=phi))
    torch.testing.assert_close(got, rescale_noise_cfg(mixed, text, phi))
    spreads = [one.std(dim=(1, 2, 3)) for one in (got, text, mixed)]
    torch.testing.assert_close(spreads[0], phi * spreads[1] + (1 - phi) * spreads[2])


def test_all_settings_of_a_sampler_reach_guidance() -> None:
    config = SamplerConfig(guidance=2.0, guidance_low=0.1, guidance_high=4.0, rescale=0.5)
    assert Guidance.from_config(config) == Guidance(2.0, 0.1, 4.0, 0.5)
    assert config.guidance_settings == {"guidance_low": 0.1, "guidance_high": 4.0, "rescale": 0.5}


@pytest.mark.parametrize("config", [CONFIG, FLOW, EDM, replace(CONFIG, prediction="v")])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "unipc"])
def test_guidance_is_the_same_in_every_sampler(config: DiffusionConfig, sampler: str) -> None:
    """An image of the guided network is the guided image."""
    given, null = conditionings()

    def mixed(x: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        without, with_text = network(x, timestep_B, null), network(x, timestep_B, given)
        return without + 2.0 * (with_text - without)

    noise = initial_noise(0, NUMBERS, LATENT)
    got = sample(network, config, noise, given, null, sampler=sampler, steps=6, guidance=2.0)
    expected = sample(mixed, config, noise, given, sampler=sampler, steps=6)
    assert (got - expected).norm() < 1e-4 * expected.norm()
