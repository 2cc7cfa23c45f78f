"""A network whose weights lie in oneDNN's order predicts what it did, for inputs of any size, in the memory it had."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.diffusion.conditioning import ContextCache
from pipeline.inference import packed
from pipeline.inference.packed import PackedConv2d, PackedGeglu, PackedLinear, PackedUpsample, pack
from pipeline.models.unet.model import UNet

CONFIG = ModelConfig(channels=32, multipliers=(1, 2), attention=(1,), heads=2, context_width=24, norm_groups=8)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def network() -> UNet:
    unet = UNet(CONFIG)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return unet.eval().requires_grad_(False)


def predict(unet: UNet, batch: int, height: int, width: int, context_cache: ContextCache | None = None) -> Tensor:
    x, context = normal(batch, 4, height, width), normal(batch, 5, 24)
    return unet(x, torch.arange(batch) * 100, context, context_cache=context_cache)


def test_this_pytorch_can() -> None:
    assert packed.available()


def test_a_packed_unet_predicts_the_same_for_every_size_and_batch() -> None:
    plain = network()
    other = deepcopy(plain)
    pack(other)
    kinds = [type(module) for module in other.modules()]
    assert nn.Linear not in kinds and nn.Conv2d not in kinds
    assert {PackedLinear, PackedGeglu, PackedConv2d, PackedUpsample} <= set(kinds)
    for size in ((1, 8, 8), (3, 8, 8), (2, 16, 4), (1, 2, 2)):  # the first call decides the order
        expected = predict(plain, *size)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(predict(other, *size), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    context_cache: ContextCache = {}
    twice = [predict(other, 1, 8, 8, context_cache) for _ in range(2)]
    torch.testing.assert_close(twice[1], predict(plain, 1, 8, 8), rtol=1e-5, atol=1e-5)
    assert context_cache


def test_what_is_not_fp32_stays_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 1)).to(torch.bfloat16)
    pack(module)
    assert [type(child) for child in module] == [nn.Linear, nn.Conv2d]


def test_without_onednn_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    module = nn.Sequential(nn.Linear(8, 8))
    pack(module)
    assert type(module[0]) is nn.Linear


MEMORY = """
import resource, torch
from torch import nn
from pipeline.distributed.allocator import keep_memory
from pipeline.inference.packed import pack
keep_memory()
torch.set_num_threads(1)
net = nn.Sequential(*(nn.Conv2d(512, 512, 3, padding=1) for _ in range(12)), *(nn.Linear(4, 1024) for _ in range(2)))
for layer in net: nn.init.normal_(layer.weight)
big = nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(12)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack(net), pack(big)
with torch.no_grad():
    net[:12](torch.ones(1, 512, 4, 4)), big(torch.ones(1, 1500))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_packing_needs_no_second_copy_of_the_weights() -> None:
    """220 MB of weights: what peak memory grows by is less than a quarter of them."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 < 55e6
