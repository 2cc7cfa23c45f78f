"""Muon's arithmetic, and which parameters it steps. Muon under ZeRO: tests/system/test_engines_and_worlds.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.config import ModelConfig, OptimConfig
from pipeline.models.unet.model import UNet
from pipeline.training.engines.muon import ADAM_SIZE, orthogonalise, update
from pipeline.training.engines.optimizer import Optimizer, hidden_matrices, make_optimizer

SIDE = st.integers(1, 40)


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=50)
@given(SIDE, SIDE, st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_orthogonalise_keeps_singular_vectors_and_brings_singular_values_near_one(rows, columns, seed, size):
    given_matrix = matrix(rows, columns, seed)
    u, s, vh = torch.linalg.svd(given_matrix, full_matrices=False)
    found = orthogonalise(given_matrix * size)
    inside = u.T @ found @ vh.T
    large = s > 0.05 * s.norm()  # five iterations do not reach the smallest
    assert torch.allclose(inside, torch.diag(inside.diag()), atol=2e-2)
    assert (inside.diag()[large] > 0.6).all()
    assert (inside.diag() < 1.3).all()


def test_a_zero_gradient_makes_no_update():
    assert orthogonalise(torch.zeros(5, 7)).eq(0).all()
    assert orthogonalise(torch.zeros(5, 17)).eq(0).all()


@pytest.mark.parametrize("kind", ["random", "of rank 3", "of singular values from 1 to 1e-6"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 1152), (1152, 128), (40, 400), (7, 15)])
def test_wide_matrices_by_their_squares_are_what_the_iteration_makes_of_them(rows, columns, kind):
    """Against float64, which takes no squares. In float32 a square has lost singular values below 3e-4 of the largest;
    that it takes them for noise must cost no more than noise."""
    given_matrix = matrix(rows, columns).double()
    if kind == "of rank 3":
        given_matrix = matrix(rows, 3).double() @ matrix(3, columns, seed=1).double()
    elif kind != "random":
        u, s, vh = torch.linalg.svd(given_matrix, full_matrices=False)
        given_matrix = u * torch.logspace(0, -6, len(s), dtype=torch.float64) @ vh
    exact = orthogonalise(given_matrix, torch.float64).double()
    assert (orthogonalise(given_matrix.float()) - exact).norm() < 1e-3 * exact.norm()


def test_bf16_products_agree_with_fp32_ones():
    exact, rounded = (orthogonalise(matrix(64, 96), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (32, 16, 3, 3)])
def test_updates_are_as_large_as_adams(shape):
    step = update(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 1, torch.float32)
    assert step.square().mean().sqrt().item() == pytest.approx(ADAM_SIZE, rel=0.2)


def test_fused_matrices_are_stepped_each_for_itself():
    first, second = matrix(8, 16), 1000 * matrix(8, 16, seed=1)
    tall = torch.cat([first.T, second.T])
    assert torch.allclose(update(tall, 2, torch.float32)[:16], update(first.T, 1, torch.float32), atol=1e-5)
    both = update(torch.cat([first, second]), 2, torch.float32)
    apart = torch.cat([update(part, 1, torch.float32) for part in (first, second)])
    assert torch.equal(both, apart)


def test_muon_steps_the_hidden_matrices_of_the_unet_and_adam_the_rest():
    with torch.device("meta"):
        unet = UNet(ModelConfig(channels=64, multipliers=(1, 2), blocks=1, context_width=8, norm_groups=8))
    hidden = hidden_matrices(unet)
    matrices = {name for name, p in unet.named_parameters() if p.ndim >= 2}
    left = {name for name in matrices if name not in hidden}
    assert left == {
        *("conv_in.weight", "conv_out.weight"),
        *("embed_timestep.linear1.weight", "embed_timestep.linear2.weight"),
    }
    assert set(hidden) < matrices
    fused = {name.rsplit(".", 2)[1]: count for name, count in hidden.items() if count > 1}
    assert fused == {"qkv": 3, "kv": 2, "up": 2}


def test_a_parameter_group_of_each_kind_and_weight_decay_on_matrices_alone():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    groups = make_optimizer(module, OptimConfig(name="muon", weight_decay=0.5)).param_groups
    assert [(g["algorithm"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("muon", 0.5, 2),
        ("adamw", 0.0, 4),
    ]


def test_a_muon_group_takes_its_gradient_as_the_update_with_decoupled_decay():
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    weight.grad, bias.grad = torch.full((2, 2), 3.0), torch.full((2,), 3.0)
    groups = [
        {"params": [weight], "algorithm": "muon", "weight_decay": 0.5},
        {"params": [bias], "algorithm": "adamw", "weight_decay": 0.0},
    ]
    Optimizer(groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8).step()
    assert torch.allclose(weight, torch.full((2, 2), 1 - 0.1 * 0.5 - 0.1 * 3.0))
    assert torch.allclose(bias, torch.full((2,), 1 - 0.1))  # Adam's first step is the learning rate
