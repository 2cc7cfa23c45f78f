import pytest
import torch

from pipeline.config import EmaConfig
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
    assert (torch.cat(ema.averages).double() - reference).abs().max() < 1e-6


def test_averages_are_copies_that_start_at_the_weights():
    weights = torch.ones(3)
    ema = Ema(EmaConfig(), [weights])
    weights += 1
    assert ema.averages[0].tolist() == [1, 1, 1]
