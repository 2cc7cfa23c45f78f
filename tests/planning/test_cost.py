"""The FLOP model equals torch's counter, and its parameters those of the network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from made.cache import contract
from pipeline.config import ModelConfig
from pipeline.config.loading.load import load
from pipeline.errors import ShapeError
from pipeline.models.unet.model import UNet
from pipeline.planning.cost import Cost, unet_cost
from pipeline.planning.fit import fit

SD1 = ModelConfig(name="sd1", channels=320, multipliers=(1, 2, 4, 4), attention=(1, 2, 4), heads=8, context_width=768)
SD2 = replace(SD1, name="sd2", heads=0, head_width=64, context_width=1024, linear_projection=True)
TINY = ModelConfig(name="tiny", blocks=1, norm_groups=8)
SMALL = ModelConfig(name="small", channels=128, heads=8)
XL = replace(
    SD2, name="xl", multipliers=(1, 2, 4), attention=(2, 4), transformer_depth=4, context_width=2048, vector_width=2816
)
CELEBA = ModelConfig(
    name="celeba",
    in_channels=3,
    out_channels=3,
    channels=224,
    multipliers=(1, 2, 3, 4),
    attention=(8, 4, 2),
    heads=0,
    head_width=32,
    context_width=0,
)
PLAIN = replace(CELEBA, name="plain", channels=32, attention=())
SHAPES: list[Any] = [
    # configuration, batch, height, width, tokens of the context
    (SD1, 2, 32, 32, 77),
    pytest.param(SD1, 1, 64, 64, 77, marks=pytest.mark.long),
    (SD2, 1, 64, 64, 77),
    pytest.param(SD2, 1, 48, 80, 77, marks=pytest.mark.long),
    (TINY, 64, 8, 8, 32),
    (SMALL, 8, 16, 16, 32),
    (SMALL, 1, 2, 34, 1),
    (XL, 1, 64, 96, 77),
    (CELEBA, 3, 64, 64, 0),
    (PLAIN, 1, 8, 16, 0),
    (replace(CELEBA, name="updown", channels=32, resblock_updown=True, scale_shift_norm=True), 2, 16, 24, 0),
    (replace(TINY, vector_width=10, attention=(2,), transformer_depth=3), 5, 12, 4, 3),
]
CASES = pytest.mark.parametrize(
    ("config", "batch", "height", "width", "tokens"), SHAPES, ids=lambda v: getattr(v, "name", v)
)


def counted(
    config: ModelConfig, batch: int, height: int, width: int, tokens: int, *, train: bool, learned: bool = False
) -> dict[str, int]:
    """FLOPs by torch's counter, by operation, without computing anything.

    On the meta device attention is its two products; on a CPU the counter does not count the fused kernel.
    """
    with torch.device("meta"):
        unet = UNet(config)
        x = torch.empty(batch, config.in_channels, height, width)
        context = torch.empty(batch, tokens, config.context_width, requires_grad=learned) if tokens else None
        vector = torch.empty(batch, config.vector_width) if config.vector_width else None
        timestep = torch.empty(batch)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        out = unet(x, timestep, context, None, vector)
        if train:
            out.sum().backward()
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


def blocks(cost: Cost) -> list[str]:
    return [part.name for part in cost.parts if part.block]


def of(found: dict[str, int], *operations: str) -> int:
    return sum(found.get(f"aten.{operation}", 0) for operation in operations)


@CASES
def test_forward_flops_are_those_of_torchs_counter(
    config: ModelConfig, batch: int, height: int, width: int, tokens: int
) -> None:
    found = counted(config, batch, height, width, tokens, train=False)
    flops = unet_cost(config, batch, height, width, tokens).forward_flops()
    assert flops["conv"] == pytest.approx(of(found, "convolution"), rel=0.01)
    assert flops["linear"] == pytest.approx(of(found, "mm", "addmm"), rel=0.01)
    assert flops["attention"] == pytest.approx(of(found, "bmm", "baddbmm"), rel=0.01)
    assert sum(flops.values()) == pytest.approx(sum(found.values()), rel=0.01)


PLAIN_ALONE, RECOMPUTED_ALONE = ("sd1", "celeba"), ("sd2", "xl")
"""Large networks that the default run trains in one of the two ways; the small ones train in both."""


@pytest.mark.parametrize(
    ("config", "batch", "height", "width", "tokens", "checkpointing"),
    [
        pytest.param(*shape, recomputed, marks=[pytest.mark.long] if marked or shape[0].name in elsewhere else [])
        for shape, marked in ((getattr(one, "values", one), hasattr(one, "marks")) for one in SHAPES)
        for recomputed, elsewhere in ((False, RECOMPUTED_ALONE), (True, PLAIN_ALONE))
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_training_flops_are_those_of_torchs_counter(
    config: ModelConfig, batch: int, height: int, width: int, tokens: int, checkpointing: bool
) -> None:
    config = replace(config, checkpointing=checkpointing)
    found = counted(config, batch, height, width, tokens, train=True)
    cost = unet_cost(config, batch, height, width, tokens)
    flops = cost.training_flops(blocks(cost) if checkpointing else ())
    assert flops["conv"] == pytest.approx(of(found, "convolution", "convolution_backward"), rel=0.01)
    assert flops["linear"] == pytest.approx(of(found, "mm", "addmm"), rel=0.01)
    assert flops["attention"] == pytest.approx(of(found, "bmm", "baddbmm"), rel=0.01)
    assert sum(flops.values()) == pytest.approx(sum(found.values()), rel=0.01)


def test_a_learned_context_costs_the_gradient_of_its_projections() -> None:
    shape = (TINY, 2, 8, 8, 32)
    data, learned = (sum(counted(*shape, train=True, learned=yes).values()) for yes in (False, True))
    assert sum(unet_cost(*shape).training_flops().values()) == data
    assert sum(unet_cost(*shape, context_gradient=True).training_flops().values()) == learned > data


@CASES
def test_every_part_has_the_parameters_of_the_module_of_its_name(
    config: ModelConfig, batch: int, height: int, width: int, tokens: int
) -> None:
    with torch.device("meta"):
        unet = UNet(config, in_channels=config.in_channels + 5)
    cost = unet_cost(config, batch, height, width, tokens, in_channels=config.in_channels + 5)
    assert cost.parameters == sum(p.numel() for p in unet.parameters())
    modules = dict(unet.named_modules())
    for part in cost.parts:
        if part.name not in ("embed", "conv_out"):  # several modules each
            assert part.parameters == sum(p.numel() for p in modules[part.name].parameters()), part.name
    assert blocks(cost) == [name for name, module in modules.items() if type(module).__name__ == "Block"]


def test_sd2_at_512_pixels_costs_what_its_layers_cost() -> None:
    """Figures for comparison with other software: GFLOPs of a forward pass, and of a forward and backward pass."""
    cost = unet_cost(SD2, 1, 64, 64, 77)
    assert round(sum(cost.forward_flops().values()) / 1e9) == 804
    assert round(sum(cost.training_flops().values()) / 1e9) == 2409


@pytest.mark.parametrize("name", ["sd1", "sd2", "tiny", "small"])
def test_the_configurations_here_are_those_of_conf(name: str) -> None:
    model = load("train", [f"model={name}", "data.train=unused", "run=unused"]).model
    assert model == {"sd1": SD1, "sd2": SD2, "tiny": TINY, "small": SMALL}[name]


def test_sizes_that_do_not_halve_are_refused() -> None:
    with pytest.raises(ShapeError, match="multiples of 8"):
        unet_cost(SD1, 1, 36, 32, 77)


@pytest.mark.parametrize("module", ["cost", "memory"])
def test_a_login_node_can_plan_without_torch(module: str) -> None:
    code = f"import sys, pipeline.planning.{module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    command: Sequence[str] = [sys.executable, "-c", code]
    assert subprocess.run(command, check=False).returncode == 0


def test_every_further_average_is_counted_in_a_ranks_memory() -> None:
    """Each takes 4 bytes per parameter, divided by the number of ranks."""
    config = load("train", ["data.train=cache", "run=r", "optim.batch=64", "deepspeed=zero2"])
    more = replace(config, ema=replace(config.ema, half_lives=(10.0, 20.0), widths=(0.1,), snapshots=1000))
    facts = contract(latent_shape=(4, 8, 8))
    for world in (1, 4):
        one, other = (fit(each, facts, world, "fp32") for each in (config, more))
        share = -(-one.parameters // world)
        assert other.state - one.state == other.peak - one.peak == 3 * 4 * share
