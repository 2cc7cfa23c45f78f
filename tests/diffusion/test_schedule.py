"""The discrete process: its betas equal those of diffusers and of the papers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DiffusionConfig
from pipeline.diffusion.schedule import Schedule, cosine, zero_terminal_snr
from pipeline.interchange.scheduler import scheduler_config
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops

CONFIG = DiffusionConfig()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_alpha_bar_equals_diffusers_scheduler_from_the_exported_config(name, zero):
    declare_torchvision_ops()
    from diffusers import DDIMScheduler

    config = replace(CONFIG, schedule=name, prediction="v", beta_start=0.0015, beta_end=0.0195, zero_terminal_snr=zero)
    alpha_bar = Schedule(config).alpha_bar
    assert alpha_bar.dtype == torch.float64
    theirs = DDIMScheduler.from_config(scheduler_config(config))
    # theirs is a product of float32s: 1e-4 of it, and what float32 leaves of the cosine's last values
    assert torch.allclose(alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    if not zero:
        betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
        assert torch.allclose(betas.float(), theirs.betas[1:], rtol=1e-4, atol=1e-7)


def test_stable_diffusions_schedule_has_its_known_ends():
    alpha_bar = Schedule(CONFIG).alpha_bar
    assert alpha_bar[0].item() == pytest.approx(0.99915, abs=1e-12)
    assert alpha_bar[-1].item() == pytest.approx(0.0046601, abs=1e-6)  # Lin et al. 2023, table 1: sqrt is 0.068265
    alpha, sigma = Schedule(CONFIG).at(torch.tensor([0, 999]))
    assert alpha.shape == (2, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(2, 1, 1, 1))


@given(st.integers(10, 4000))
def test_the_cosine_schedule_is_equation_17(timesteps):
    """alpha_bar_t = f(t) / f(0) as long as no beta is clipped at 0.999 (Nichol & Dhariwal 2021)."""
    betas = cosine(0.0, 0.0, timesteps)
    alpha_bar = torch.cumprod(1 - betas, dim=0)

    def f(t: float) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (1, timesteps // 2, timesteps - 1):  # alpha_bar[step - 1] is the paper's at t = step
        assert alpha_bar[step - 1].item() == pytest.approx(f(step) / f(0), rel=1e-6)
    assert betas.max() == betas[-1] == 0.999


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_zero_terminal_snr_keeps_the_first_level_and_the_shape(name):
    """Lin et al. 2023, algorithm 1: the root of alpha_bar is only shifted and scaled."""
    before = Schedule(replace(CONFIG, schedule=name)).alpha_bar.sqrt()
    schedule = Schedule(replace(CONFIG, schedule=name, prediction="v", zero_terminal_snr=True))
    after = schedule.alpha_bar.sqrt()
    assert schedule.alpha_bar[-1] == 0.0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-12)
    assert (after.diff() < 0).all()
    ratio = after.diff() / before.diff()
    assert torch.allclose(ratio, ratio[0].expand(999), rtol=1e-6)
    alpha, sigma = schedule.at(torch.tensor([999]))
    assert (alpha.item(), sigma.item()) == (0.0, 1.0)


def test_zero_terminal_snr_by_hand():
    assert zero_terminal_snr(torch.tensor([0.81, 0.25, 0.09])).tolist() == pytest.approx([0.81, 0.09, 0.0], abs=1e-6)
