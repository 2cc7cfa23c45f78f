"""3x3 convolutions by matrix products equal plain ones, forward and backward, and are used where they are faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.kernels import convolution
from pipeline.models.kernels.convolution import Conv3x3


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 3, 4, 4), (2, 3, 5, 3)])
def test_products_have_the_numbers_of_a_convolution_and_their_gradients(stride: int, size: tuple[int, ...]) -> None:
    x, weight, bias = (normal(*shape, dtype=torch.float64).requires_grad_() for shape in (size, (4, 3, 3, 3), (4,)))
    assert torch.autograd.gradcheck(lambda *of: convolution._Products.apply(*of, stride), (x, weight, bias))
    expected = F.conv2d(x, weight, bias, stride=stride, padding=1)
    torch.testing.assert_close(convolution._Products.apply(x, weight, bias, stride), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_layer_with_a_large_weight_and_few_pixels_computes_the_convolution(channels_last: bool) -> None:
    conv = Conv3x3(1024, 1024)
    x = normal(2, 1024, 2, 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    grad = normal(2, 1024, 2, 3)
    given = [x.requires_grad_(), *conv.parameters()]
    found = conv(x)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1)
    assert type(found.grad_fn).__name__ == "_ProductsBackward"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = (torch.autograd.grad(out, given, grad) for out in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "side", "batch", "stride", "dtype", "used"),
    [
        (1024, 16, 1, 1, torch.float32, True),
        (1024, 16, 2, 1, torch.float32, False),
        (1024, 16, 4, 2, torch.float32, True),
        (1000, 4, 1, 1, torch.float32, False),
        (1024, 4, 1, 1, torch.bfloat16, False),
    ],
)
def test_products_are_for_few_pixels_large_weights_and_fp32(
    width: int, side: int, batch: int, stride: int, dtype: torch.dtype, used: bool
) -> None:
    conv = Conv3x3(width, width, stride).to(dtype)
    assert conv._by_products(torch.empty(batch, width, side, side, dtype=dtype)) is used


def test_autocast_has_a_plain_convolution() -> None:
    conv, x = Conv3x3(1024, 1024), normal(1, 1024, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv._by_products(x)
        assert conv(x).dtype == torch.bfloat16
