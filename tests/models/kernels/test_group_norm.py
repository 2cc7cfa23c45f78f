"""The GPU's GroupNorm equals PyTorch's, forward and backward, without copies to another layout.

Triton's interpreter runs the kernels on a CPU, in separate processes; it cannot show their speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.kernels import group_norm

SHAPES = [
    (2, 8, 3, 2, 4),  # B, C, H, W, groups: a width of 2
    (1, 30, 5, 7, 3),  # neither rows nor channels of a power of 2
    (3, 96, 4, 4, 32),  # a width of 3
    (2, 64, 40, 33, 32),  # several tiles for one program
]


def compared(device: str, dtype: torch.dtype, tolerance: float) -> None:
    for B, C, H, W, groups in SHAPES:
        for silu in (False, True):
            g = torch.Generator().manual_seed(C)
            norm = nn.GroupNorm(groups, C, eps=1e-5)
            norm.weight.data.normal_(1, 0.3, generator=g)
            norm.bias.data.normal_(0, 0.3, generator=g)
            x = (torch.randn(B, C, H, W, generator=g) * 2 + 30).to(dtype).double()  # a mean far from 0
            dy = torch.randn(B, C, H, W, generator=g).to(dtype).double()

            exact = x.clone().requires_grad_()
            double = nn.GroupNorm(groups, C, eps=1e-5).double()
            double.load_state_dict(norm.state_dict())
            wanted = F.silu(double(exact)) if silu else double(exact)
            wanted.backward(dy)

            last = torch.channels_last
            norm = norm.to(device, dtype)
            given, grad = (t.to(device, dtype).contiguous(memory_format=last) for t in (x, dy))
            y, moments = group_norm.forward(given, norm.weight, norm.bias, groups, 1e-5, silu)
            assert y.is_contiguous(memory_format=last)
            found = y, *group_norm.backward(grad, given, norm.weight, norm.bias, moments, silu)
            for got, want in zip(found, (wanted, exact.grad, double.weight.grad, double.bias.grad)):
                assert want is not None
                error = (got.double().cpu() - want).norm() / want.norm()
                assert error < tolerance, (B, C, H, W, groups, silu, float(error))


def test_the_kernels_compute_group_norm_and_its_gradients() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    here = str(Path(__file__).parent)  # by its path: an installed package may be called `tests`
    command = (
        f"import sys; sys.path.insert(0, {here!r}); import torch; from test_group_norm import compared; "
        "compared('cpu', torch.float32, 2e-5)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_compute_group_norm_on_a_gpu() -> None:
    compared("cuda", torch.float32, 2e-5)
    compared("cuda", torch.bfloat16, 6e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_and_eager_norms_on_a_gpu_are_equal() -> None:
    norm = nn.GroupNorm(32, 320).to("cuda", torch.bfloat16)
    x = torch.randn(2, 320, 16, 16, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found = []
    for work in (group_norm.group_norm, torch.compile(group_norm.group_norm, dynamic=False)):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = work(norm, given, True)
        y.square().sum().backward()
        found.append((y.detach(), given.grad, norm.weight.grad))
        norm.weight.grad = None
    for one, other in zip(*found):
        assert torch.equal(one, other)
