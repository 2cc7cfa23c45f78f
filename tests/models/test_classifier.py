"""The classifier of noisy latents: the encoder half of the UNet, and a pooling of positions of any size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import ShapeError
from pipeline.models.classifier import Classifier
from pipeline.models.unet.model import UNet
from pipeline.planning.cost import Pool, classifier_cost
from pipeline.planning.memory import activation_bytes
from pipeline.training.engines.optimizer import hidden_matrices

CONFIG = ModelConfig(channels=16, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, norm_groups=4, context_width=0)
POOLS = pytest.mark.parametrize("pool", ["attention", "mean"])


def awake(pool: Pool, config: ModelConfig = CONFIG) -> Classifier:
    """A classifier of five classes of whose weights none is zero."""
    classifier = Classifier(config, 5, pool)
    classifier.reset_parameters(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return classifier


def noisy(*sides: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 4, *sides, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 500, 999])[:batch]


@POOLS
def test_it_begins_by_saying_nothing(pool: Pool) -> None:
    classifier = Classifier(CONFIG, 5, pool)
    classifier.reset_parameters(0)
    assert torch.equal(classifier(*noisy(8, 8)), torch.zeros(3, 5))


@POOLS
def test_it_takes_latents_of_any_size_that_halves(pool: Pool) -> None:
    classifier = awake(pool)
    for sides in ((8, 8), (2, 6), (16, 4)):
        assert classifier(*noisy(*sides)).shape == (3, 5)
    with pytest.raises(ShapeError, match=r"latents of 8x7 do not halve 1 times: .* multiples of 2"):
        classifier(*noisy(8, 7))
    with pytest.raises(ShapeError, match=r"the classifier takes \(B, 4, H, W\)"):
        classifier(torch.zeros(1, 3, 8, 8), torch.zeros(1))


@POOLS
def test_each_latent_and_each_timestep_changes_its_own_logits_alone(pool: Pool) -> None:
    classifier, (x, t) = awake(pool), noisy(8, 8)
    whole = classifier(x, t)
    assert torch.allclose(whole, torch.cat([classifier(x[i : i + 1], t[i : i + 1]) for i in range(3)]), atol=1e-5)
    assert not torch.allclose(whole, classifier(x, t.flip(0)), atol=1e-3)


def test_its_encoder_is_the_unets_weight_by_weight() -> None:
    config = replace(CONFIG, resblock_updown=True, scale_shift_norm=True)
    ours, theirs = (dict(network.named_parameters()) for network in (Classifier(config, 5), UNet(config)))
    shared = [name for name in ours if not name.startswith(("norm_out.", "pool."))]
    assert shared == [name for name in theirs if not name.startswith(("decoder.", "norm_out.", "conv_out."))]
    assert all(ours[name].shape == theirs[name].shape for name in shared)


def test_attention_looks_at_positions_and_the_mean_does_not() -> None:
    """Where all positions are equal, both see one vector; the mean is linear in what it pools, attention is not."""
    attention, mean = awake("attention").pool, awake("mean").pool
    x = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(3))
    for pool, linear in ((attention, False), (mean, True)):
        middle = (pool(x) + pool(x.mean(dim=(2, 3), keepdim=True).expand_as(x))) / 2
        assert torch.allclose(pool(x), middle, atol=1e-5) is linear


def test_recomputed_blocks_give_the_same_gradients() -> None:
    least = activation_bytes(
        cost := classifier_cost(CONFIG, 5, "attention", 3, 8, 8), "fp32", [p.name for p in cost.parts if p.block]
    )
    gradients = []
    for changes in ({}, {"checkpointing": True}, {"activation_gb": 1.05 * least / 1e9}):
        classifier = awake("attention", replace(CONFIG, **changes))
        classifier(*noisy(8, 8)).square().mean().backward()
        gradients.append([cast(Tensor, p.grad) for p in classifier.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_muon_steps_hidden_matrices_and_neither_the_first_layer_nor_the_last() -> None:
    matrices = hidden_matrices(Classifier(CONFIG, 5))
    assert matrices["pool.kv.weight"] == 2 and matrices["pool.q.weight"] == 1
    assert not any(name.startswith(("conv_in", "embed_timestep", "pool.out")) for name in matrices)


@POOLS
def test_the_gradient_by_the_latent_is_that_of_finite_differences(pool: Pool) -> None:
    """In float64, of the log-probability of a class."""
    classifier, (x, t) = awake(pool).double(), noisy(4, 4, batch=2)
    classifier.requires_grad_(False)
    classes = torch.tensor([3, 1])

    def score(x: Tensor) -> Tensor:
        return torch.log_softmax(classifier(x, t), dim=1).gather(1, classes[:, None]).sum()

    x = x.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(x), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        difference = (score(x + step * direction) - score(x - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-6)
    assert math.isfinite(float(difference)) and abs(float(difference)) > 1e-3
