"""Fused operations equal their plain compositions, forward and backward, and keep less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.kernels import fused


def plain_geglu(up: Tensor) -> Tensor:
    value, gate = up.chunk(2, dim=-1)
    return value * F.gelu(gate)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def norm_of(channels: int, dtype: torch.dtype) -> nn.GroupNorm:
    norm = nn.GroupNorm(4, channels, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    norm.weight.data.normal_(1, 0.3, generator=g)
    norm.bias.data.normal_(0, 0.3, generator=g)
    return norm


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def kept(work: Callable[[], Tensor]) -> int:
    """Bytes kept for the backward pass; each storage counts once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_and_silu_have_the_gradients_of_their_numbers(channels_last: bool) -> None:
    norm = norm_of(8, torch.float64)
    x = normal(2, 8, 3, 2)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def work(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused._NormSilu.apply(x, weight, bias, 4, 1e-5)

    assert torch.autograd.gradcheck(work, (x, norm.weight, norm.bias))
    assert torch.equal(fused.norm_silu(norm, x), F.silu(norm(x)))
    with torch.no_grad():
        assert torch.equal(fused.norm_silu(norm, x), F.silu(norm(x)))


def test_linear_and_geglu_have_the_gradients_of_their_numbers() -> None:
    x, weight, bias = normal(2, 3, 5), normal(8, 5), normal(8)
    assert torch.autograd.gradcheck(fused._LinearGeglu.apply, (x, weight, bias))
    expected = plain_geglu(F.linear(x, weight, bias))
    torch.testing.assert_close(fused._LinearGeglu.apply(x, weight, bias), expected)


def test_a_layer_of_geglu_in_float32_computes_that_of_float64() -> None:
    given = normal(2, 7, 32), normal(64, 32), normal(64)
    grad = normal(2, 7, 32).detach()
    expected = plain_geglu(F.linear(*given))
    rounded = [tensor.detach().float().requires_grad_() for tensor in given]
    found = fused.linear_geglu(*rounded)
    assert type(found.grad_fn).__name__ == "_LinearGegluBackward"
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(found, rounded, grad.float()), torch.autograd.grad(expected, given, grad)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fused.linear_geglu(*rounded).double(), expected, rtol=1e-5, atol=1e-4)


def test_geglu_has_the_gradient_of_its_numbers() -> None:
    up = normal(2, 3, 8)
    assert torch.autograd.gradcheck(fused.geglu, (up,))
    assert torch.equal(fused.geglu(up), plain_geglu(up))
    before = up.detach().clone()
    with torch.no_grad():
        assert torch.equal(fused.geglu(up), plain_geglu(up))
    assert torch.equal(up, before), "the input was written to"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("most", [0, fused.SCORES])
def test_attention_is_scaled_dot_product_attention_either_way(
    masked: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SCORES", most)
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 7, 4), normal(2, 3, 7, 4)
    mask = torch.arange(7)[None, None, None] < torch.tensor([7, 3])[:, None, None, None] if masked else None
    got, expected = fused.attend(q, k, v, mask), plain_attention(q, k, v, mask)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    weight = normal(*got.shape).detach()
    mine = torch.autograd.grad((got * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_less_is_kept_for_the_backward_pass() -> None:
    norm, x, up = norm_of(8, torch.float32), normal(4, 8, 16, 16, dtype=torch.float32), normal(64, 64)
    assert kept(lambda: fused.norm_silu(norm, x)) < 0.6 * kept(lambda: F.silu(norm(x)))
    assert kept(lambda: fused.geglu(up)) < 0.7 * kept(lambda: plain_geglu(up))


def test_autocast_gives_the_plain_composition() -> None:
    norm, x = norm_of(8, torch.float32), normal(2, 8, 4, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fused.norm_silu(norm, x), F.silu(norm(x))
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    up = normal(2, 8)
    (grad,) = torch.autograd.grad(fused.geglu(up).sum(), up, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
