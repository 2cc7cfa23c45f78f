"""Upsampling and a 3x3 convolution equal one 2x2 convolution, for every size and layout; weights keep their names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from made.live_memory import kept_bytes
from pipeline.config import EncodersConfig
from pipeline.models.encoders.autoencoder import load_network
from pipeline.models.encoders.first_stage import KLStage
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.kernels.upsampled import FoldedUpsample, fold, unfold, upsampled_convolution

declare_torchvision_ops()

SIDE = st.integers(1, 6)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


@settings(deadline=None, max_examples=40)
@given(SIDE, SIDE, SIDE, SIDE, SIDE, st.sampled_from(LAYOUTS), st.booleans())
def test_it_is_the_convolution_of_the_doubled_picture(
    batch: int, width: int, to: int, rows: int, columns: int, layout: torch.memory_format, biased: bool
) -> None:
    x = normal(batch, width, rows, columns, dtype=torch.float64).contiguous(memory_format=layout)
    weight = normal(to, width, 3, 3, dtype=torch.float64)
    bias = normal(to, dtype=torch.float64) if biased else None
    y = F.conv2d(x, fold(weight), None if bias is None else bias.repeat(4), padding=1)
    torch.testing.assert_close(unfold(y), doubled(x, weight, bias), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(SIDE, SIDE, SIDE, SIDE, SIDE, st.sampled_from(LAYOUTS), st.booleans())
def test_its_gradients_are_those_of_the_convolution_of_the_doubled_picture(
    batch: int, width: int, to: int, rows: int, columns: int, layout: torch.memory_format, biased: bool
) -> None:
    x = normal(batch, width, rows, columns, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = normal(to, width, 3, 3, dtype=torch.float64).requires_grad_()
    bias = normal(to, dtype=torch.float64).requires_grad_() if biased else None
    grad = normal(batch, to, 2 * rows, 2 * columns, dtype=torch.float64).contiguous(memory_format=layout)
    leaves = [x, weight] if bias is None else [x, weight, bias]
    found = []
    for function in (upsampled_convolution, doubled):
        y = function(x, weight, bias)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_training_keeps_the_small_picture_and_not_the_doubled_one() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    x = normal(2, 8, 16, 16).requires_grad_()
    sizes = {}
    for function in (upsampled_convolution, doubled):
        _, kept = kept_bytes(lambda function=function: function(x, conv.weight, conv.bias), {"": conv})  # type: ignore[misc]
        sizes[function] = sum(kept.values())
    assert sizes[doubled] == 4 * 4 * x.numel()
    assert sizes[upsampled_convolution] == 4 * (x.numel() + 16 * 8 * 8)


def test_channels_last_stays_so() -> None:
    """Otherwise every later layer of a decoder would convert the layout again."""
    up = FoldedUpsample(nn.Conv2d(8, 6, 3, padding=1).requires_grad_(False))
    x = normal(2, 8, 5, 4).contiguous(memory_format=torch.channels_last)
    assert up(x).is_contiguous(memory_format=torch.channels_last)


def test_below_float32_nothing_is_folded() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).to(torch.bfloat16)
    x = normal(1, 8, 4, 4).to(torch.bfloat16)
    assert torch.equal(FoldedUpsample(conv)(x), doubled(x, conv.weight, conv.bias))


def test_an_autoencoder_decodes_as_diffusers_does_and_keeps_the_names_of_its_weights() -> None:
    from diffusers import AutoencoderKL

    kind: dict[str, Any] = {"block_out_channels": (16, 32, 32), "norm_num_groups": 8, "latent_channels": 4}
    kind |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    torch.manual_seed(0)
    plain: Any = AutoencoderKL(**kind)
    other: Any = AutoencoderKL(**kind)
    plain.eval(), other.load_state_dict(plain.state_dict())
    stage = KLStage(other, torch.float32, torch.device("cpu"))
    assert sum(isinstance(part, FoldedUpsample) for part in stage.model.modules()) == 2
    assert list(stage.model.state_dict()) == list(plain.state_dict())
    z = normal(2, 4, 6, 4)
    with torch.no_grad():
        expected = plain.decode(z / stage.scale).sample.clamp(-1, 1)
    torch.testing.assert_close(stage.decode(z), expected, rtol=0, atol=1e-5)


def test_the_demo_autoencoder_is_folded_too() -> None:
    model = load_network(EncodersConfig()).model
    assert any(isinstance(part, FoldedUpsample) for part in model.decoder.modules())
