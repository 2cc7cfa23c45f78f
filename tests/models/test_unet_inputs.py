"""Unusual inputs of the UNet: buckets, contexts of any length, masks, single images, and inputs that it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import ShapeError
from pipeline.interchange import unet as convert
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.unet.model import UNet

MODEL = ModelConfig(
    channels=16, multipliers=(1, 2, 2, 2), blocks=1, attention=(1, 2, 4), heads=2, context_width=12, norm_groups=8
)
VECTOR = replace(MODEL, vector_width=6)
BUCKETS = [(8, 8), (8, 24), (24, 8), (16, 40), (40, 16), (8, 64)]  # heights and widths of latents


@pytest.fixture(scope="module")
def pair() -> tuple[UNet, Any]:
    """Our UNet and diffusers', with the same seeded weights."""
    declare_torchvision_ops()
    import diffusers

    torch.manual_seed(0)
    theirs: Any = diffusers.UNet2DConditionModel(**convert.diffusers_config(MODEL))
    ours = UNet(MODEL)
    ours.load_state_dict(convert.from_diffusers(theirs.state_dict(), MODEL))
    return ours.eval(), theirs.eval()


def inputs(height: int = 8, width: int = 16, batch: int = 2, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(batch, 4, height, width, generator=g)
    return x, torch.tensor([3, 650, 999, 0])[:batch], torch.randn(batch, length, 12, generator=g)


def equal(mine: Tensor, other: Tensor) -> bool:
    return mine.shape == other.shape and bool((mine - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize(("height", "width"), BUCKETS)
@torch.no_grad()
def test_every_bucket_is_predicted_as_diffusers_does(pair: tuple[UNet, Any], height: int, width: int) -> None:
    x, t, context = inputs(height, width)
    ours, theirs = pair
    assert equal(ours(x, t, context), theirs(x, t, context).sample)


@torch.no_grad()
def test_one_network_takes_buckets_in_any_order(pair: tuple[UNet, Any]) -> None:
    """State that one size leaves in the module does not change the prediction for another size."""
    ours = pair[0]
    first = {size: ours(*inputs(*size)) for size in BUCKETS}
    assert all(torch.equal(ours(*inputs(*size)), first[size]) for size in reversed(BUCKETS))


@pytest.mark.parametrize("length", [1, 77, 78, 154, 231])
@torch.no_grad()
def test_a_context_may_have_any_length(pair: tuple[UNet, Any], length: int) -> None:
    """Also more than CLIP's 77 tokens, as with the concatenated windows of several towers."""
    x, t, context = inputs(length=length)
    ours, theirs = pair
    assert equal(ours(x, t, context), theirs(x, t, context).sample)


@torch.no_grad()
def test_a_masked_context_equals_the_shorter_one_row_by_row(pair: tuple[UNet, Any]) -> None:
    ours, theirs = pair
    x, t, context = inputs(batch=4, length=9)
    lengths = [9, 1, 4, 6]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    masked = ours(x, t, context, mask)
    for row, length in enumerate(lengths):
        alone = slice(row, row + 1)
        assert equal(masked[alone], ours(x[alone], t[alone], context[alone, :length]))
    assert equal(masked, theirs(x, t, context, encoder_attention_mask=mask).sample)
    assert not equal(masked, ours(x, t, context))


@torch.no_grad()
def test_what_is_masked_may_hold_anything_finite_and_lie_anywhere(pair: tuple[UNet, Any]) -> None:
    ours = pair[0]
    x, t, context = inputs(length=6)
    mask = torch.tensor([[False, True, False, True, True, False]] * 2)
    expected = ours(x, t, context[:, [1, 3, 4]])
    context[~mask.bool()] = 1e4
    assert equal(ours(x, t, context, mask), expected)
    assert equal(ours(x, t, context, torch.ones_like(mask)), ours(x, t, context))


def test_a_batch_of_one_has_the_gradient_of_its_row() -> None:
    torch.manual_seed(0)
    ours = UNet(VECTOR)
    x, t, context = inputs(batch=3, length=4)
    vector, mask = torch.randn(3, 6), torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    ours(x, t, context, mask, vector)[1].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    row = slice(1, 2)
    ours(x[row], t[row], context[row], mask[row], vector[row])[0].square().sum().backward()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5 * float(largest), msg=name)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (20, 8), (4, 4), (9, 8)])
def test_sizes_that_the_stride_does_not_divide_are_refused_with_it(height: int, width: int) -> None:
    with pytest.raises(ShapeError, match=rf"latents of {height}x{width} .* must be multiples of 8"):
        UNet(MODEL)(*inputs(height, width))
