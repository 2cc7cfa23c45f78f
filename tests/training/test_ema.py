import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import EmaConfig
from pipeline.runs.profiles import Profile, coefficients, gamma_of, inner_product
from pipeline.training.ema import Ema, ema_decay

BATCH = 64


def test_the_half_life_is_the_time_in_which_half_of_the_past_is_forgotten():
    config = EmaConfig(half_life=1000.0, warmup=0.05)
    kept = 1.0
    for n in range(10**6 + 10, 10**6 + 1010, 10):
        kept *= ema_decay(n, 10, config)
    assert kept == pytest.approx(0.5, rel=1e-12)


def test_early_averages_follow_the_weights_within_a_share_of_the_samples_seen():
    config = EmaConfig(half_life=100_000.0, warmup=0.05)
    assert ema_decay(1000, 50, config) == pytest.approx(0.5)  # half-life 50
    assert ema_decay(10**7, 100_000, config) == pytest.approx(0.5)  # half-life 100,000


@pytest.mark.parametrize("half_life", [500.0, 20_000.0])
def test_ema_equals_an_unpartitioned_float64_reference_after_10000_steps(half_life):
    config = EmaConfig(half_life=half_life, warmup=0.05)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(40, generator=generator) * 0.1
    weights = target.clone()
    shares = [weights[:13], weights[13:14], weights[14:]]
    ema = Ema(config, shares)
    reference = weights.double()
    noise = torch.randn(10_000, 40, generator=generator) * 0.01
    for step in range(10_000):
        weights.copy_(target + noise[step])
        n = (step + 1) * BATCH
        ema.update(n, BATCH)
        decay = 0.5 ** (BATCH / min(half_life, 0.05 * n))
        reference = decay * reference + (1 - decay) * weights.double()
    assert (torch.cat(ema.averages["ema"]).double() - reference).abs().max() < 1e-6


def test_averages_are_copies_that_start_at_the_weights():
    weights = torch.ones(3)
    ema = Ema(EmaConfig(half_lives=(5.0,), widths=(0.1,)), [weights])
    weights += 1
    assert [averages[0].tolist() for averages in ema.averages.values()] == [[1, 1, 1]] * 3


# --------------------------------------------------------------------------------------------------------------------
# Several at once, and power functions


def walk(steps):
    """Weights of a random walk (steps, 40) that calms down, as in training, and of the size that a network's are."""
    generator = torch.Generator().manual_seed(1)
    pace = torch.linspace(1.0, 0.1, steps)[:, None]
    return (torch.randn(steps, 40, generator=generator) * 0.004 * pace).cumsum(0)


def followed(config, weights):
    """The averages after each step."""
    now = weights[0].clone()
    ema = Ema(config, [now[:17], now[17:]])
    for step, row in enumerate(weights):
        now.copy_(row)
        ema.update((step + 1) * BATCH, BATCH)
        yield {kind: torch.cat(averages) for kind, averages in ema.averages.items()}


def test_several_averages_are_each_what_a_float64_reference_is_after_10000_steps():
    config = EmaConfig(half_life=20_000.0, half_lives=(500.0, 100_000.0), widths=(0.05, 0.1))
    weights = walk(10_000)
    assert 0.3 < weights.abs().max() < 1.0
    *_, last = followed(config, weights)
    assert list(last) == ["ema", "ema-500", "ema-100000", "power-0.05", "power-0.1"]
    n = torch.arange(1, 10_001, dtype=torch.float64) * BATCH
    for kind, half_life in (("ema", 20_000.0), ("ema-500", 500.0), ("ema-100000", 100_000.0)):
        reference = weights[0].double()
        for row, seen in zip(weights.double(), n, strict=True):
            kept = 0.5 ** (BATCH / min(half_life, 0.05 * float(seen)))
            reference = kept * reference + (1 - kept) * row
        assert (last[kind].double() - reference).abs().max() < 1e-6, kind
    for width in (0.05, 0.1):
        profile = (n / n[-1]) ** (gamma_of(width) + 1)  # of all up to there: the sum telescopes
        shares = torch.diff(profile, prepend=torch.zeros(1, dtype=torch.float64))
        assert (last[f"power-{width:g}"].double() - shares @ weights.double()).abs().max() < 1e-6, width


@given(st.floats(0.005, 0.28))
def test_an_exponent_has_the_width_that_it_was_made_for(width):
    gamma = gamma_of(width)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(width, rel=1e-9)


def test_the_width_is_the_standard_deviation_of_the_profile():
    gamma, t = gamma_of(0.1), np.linspace(0, 1, 200_001)
    density = t**gamma / (t**gamma).sum()
    mean = (density * t).sum()
    assert math.sqrt((density * (t - mean) ** 2).sum()) == pytest.approx(0.1, rel=1e-4)


@given(st.floats(0, 60), st.floats(0, 60), st.integers(1, 1000), st.integers(1, 1000))
def test_inner_products_are_the_integrals(a, b, first, last):
    x = np.linspace(0, min(first, last), 40_001)[1:]
    one = (a + 1) * (x / first) ** a / first
    other = (b + 1) * (x / last) ** b / last
    integral = np.trapezoid(one * other, x)
    assert inner_product(Profile(a, first), Profile(b, last)) == pytest.approx(integral, rel=2e-2)


def test_a_profile_that_is_there_is_taken_whole():
    snapshots = [Profile(gamma_of(width), n) for n in (100, 200, 300) for width in (0.05, 0.1)]
    shares, distance = coefficients(snapshots, snapshots[-1])
    assert shares == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-6)
    assert distance < 1e-4


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_an_average_of_another_width_made_from_snapshots_is_nearly_the_one_that_was_followed(width):
    """Twenty snapshots of two widths, as Karras et al. 2024 take them."""
    weights, kept = walk(4000), []
    config = EmaConfig(widths=(0.05, 0.1, width))
    for step, averages in enumerate(followed(config, weights), start=1):
        if step % 200 == 0:
            kept += [(Profile(gamma_of(w), step * BATCH), averages[f"power-{w:g}"].double()) for w in (0.05, 0.1)]
    expected = averages[f"power-{width:g}"].double()
    shares, distance = coefficients([profile for profile, _ in kept], Profile(gamma_of(width), 4000 * BATCH))
    made = sum(share * average for share, (_, average) in zip(shares, kept, strict=True))
    raw = (weights[-1].double() - expected).norm()
    assert (made - expected).norm() < 0.02 * raw
    assert shares.sum() == pytest.approx(1.0)
    assert distance < 0.1
