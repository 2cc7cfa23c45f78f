"""Convolutions by Winograd's tiles equal plain ones, forward and backward, and are used where they are faster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from made.places import REPOSITORY
from pipeline.config import ModelConfig
from pipeline.errors import ShapeError
from pipeline.models.kernels import winograd
from pipeline.models.kernels.convolution import Conv3x3
from pipeline.models.unet.model import UNet


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(found: Tensor, expected: Tensor) -> float:
    """The error relative to the norm."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the functions of winograd.cpp that are called."""
    called: list[str] = []
    call = winograd._call

    def spy(function: str, *more: Any) -> None:
        called.append(function)
        call(function, *more)

    monkeypatch.setattr(winograd, "_call", spy)
    return called


@pytest.mark.parametrize("size", [(1, 8, 4, 4), (2, 24, 8, 12), (3, 16, 12, 4), (64, 64, 8, 8)])
@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_and_gradients_are_a_convolutions(size: tuple[int, ...], width: int, channels_last: bool) -> None:
    given = [normal(*size), normal(width, size[1], 3, 3) / (9 * size[1]) ** 0.5, normal(width)]
    if channels_last:
        given[:2] = (t.contiguous(memory_format=torch.channels_last) for t in given[:2])
    exact = [t.double().requires_grad_() for t in given]
    x, weight, bias = exact
    expected = F.conv2d(x, weight, bias, padding=1)
    own = [t.requires_grad_() for t in given]
    found = winograd.convolve(*own)
    assert found.is_contiguous(memory_format=torch.channels_last)
    dy = normal(*expected.shape)
    of_exact = torch.autograd.grad(expected, exact, dy.double())
    of_own = torch.autograd.grad(found, own, dy)
    for one, other in zip([found, *of_own], [expected, *of_exact], strict=True):
        assert error(one, other) < 5e-6


def test_pixels_beyond_a_picture_are_zeros_and_its_neighbours_are_not_read() -> None:
    x = torch.full((3, 8, 4, 4), float("nan"))
    x[1] = normal(8, 4, 4)
    weight = normal(8, 8, 3, 3)
    found = winograd.convolve(x, weight, None)
    assert error(found[1:2], F.conv2d(x[1:2].double(), weight.double(), padding=1)) < 5e-6
    assert found[[0, 2]].isnan().all()


@pytest.mark.parametrize("biased", [False, True])
def test_it_is_an_operator_that_pytorch_can_trace_and_differentiate(biased: bool) -> None:
    x, weight, bias = (normal(*shape).requires_grad_() for shape in ((2, 8, 8, 4), (16, 8, 3, 3), (16,)))
    torch.library.opcheck(winograd.OPERATOR, (x, weight, bias if biased else None, False))


def test_only_gradients_that_are_wanted_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(1, 8, 4, 4), normal(8, 8, 3, 3).requires_grad_()
    y = winograd.convolve(x, weight, None)
    called = calls(monkeypatch)
    y.sum().backward()
    assert "results_of_products" not in called
    assert "weight_of_products" in called


@pytest.mark.parametrize("size", [(1, 8, 6, 4), (1, 8, 4, 6), (1, 6, 4, 4), (1, 16, 4, 4)])
def test_what_is_no_whole_tiles_or_of_another_dtype_is_refused_before_it_is_read(size: tuple[int, ...]) -> None:
    weight = normal(8, 6 if size[1] == 6 else 8, 3, 3)
    with pytest.raises(ShapeError, match="sides divisible by 4 and channels by 8"):
        winograd.convolve(normal(*size), weight, None)
    with pytest.raises(ShapeError, match=r"torch.float64 \(1, 8, 4, 4\)"):
        winograd.convolve(normal(1, 8, 4, 4).double(), normal(8, 8, 3, 3), None)


@pytest.mark.parametrize(
    ("size", "width", "pays"),
    [
        ((64, 64, 4, 4), 64, True),
        ((63, 64, 4, 4), 64, False),
        ((1, 64, 32, 32), 64, True),
        ((1, 64, 32, 30), 64, False),
        ((1, 64, 34, 32), 64, False),
        ((64, 64, 8, 8), 60, False),
        ((64, 4, 8, 8), 64, False),
        ((64, 56, 8, 8), 64, False),
    ],
)
def test_it_is_for_many_whole_tiles_and_wide_layers(size: tuple[int, ...], width: int, pays: bool) -> None:
    assert winograd.pays(torch.empty(size), torch.empty(width, size[1], 3, 3)) is pays


def test_layers_take_it_where_they_are_told_in_float32_and_with_stride_one() -> None:
    x = normal(4, 64, 16, 16)
    conv, strided = Conv3x3(64, 64), Conv3x3(64, 64, stride=2)
    assert not conv._by_winograd(x)
    conv.by_tiles = strided.by_tiles = True
    assert conv._by_winograd(x)
    assert not strided._by_winograd(x)
    assert not conv._by_winograd(x.bfloat16())
    assert not conv._by_winograd(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv._by_winograd(x)
        assert conv(x).dtype == torch.bfloat16


def test_a_compiled_network_takes_it_and_trains_as_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        channels=64, multipliers=(1, 2), blocks=1, attention=(), heads=4, norm_groups=8, context_width=0
    )
    unet = UNet(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():  # none of them zero, as some begin
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
    x, timestep = normal(16, 4, 8, 8), torch.arange(16) * 50

    def step() -> dict[str, Tensor]:
        unet.zero_grad()
        y = unet(x, timestep)
        F.mse_loss(y, x).backward()
        return {"y": y.detach(), **{name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}}

    plain = step()
    called = calls(monkeypatch)
    torch._dynamo.reset()
    unet.compile_blocks("aot_eager")
    compiled = step()
    assert called.count("results_of_products") >= 10
    assert called.count("weight_of_products") >= 5
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        assert error(compiled[name], value.double()) < (1e-5 if name == "y" else 1e-4), name


def test_without_a_compiler_there_is_one_warning_and_pytorchs_convolutions(tmp_path: Path) -> None:
    script = (
        "import torch, warnings\n"
        "from pipeline.config import ModelConfig\n"
        "from pipeline.models.kernels import winograd\n"
        "from pipeline.models.unet.model import UNet\n"
        "config = ModelConfig(channels=32, multipliers=(1,), blocks=1, attention=(), norm_groups=8, context_width=0)\n"
        "unet = UNet(config)\n"
        "unet.compile_blocks('eager'); unet.compile_blocks('eager')\n"
        "assert not winograd.available()\n"
        "print(unet(torch.zeros(16, 4, 8, 8), torch.zeros(16)).shape)\n"
    )
    environment = {**os.environ, "CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([16, 4, 8, 8])" in done.stdout
    assert done.stderr.count("winograd.cpp could not be built") == 1
