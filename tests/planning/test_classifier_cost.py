"""What a classifier costs, in arithmetic: torch's FLOPs, the network's parameters, and what lies in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from made.live_memory import Live, kept_bytes
from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.classifier import Classifier
from pipeline.models.kernels import fused
from pipeline.planning import memory
from pipeline.planning.cost import Cost, Pool, classifier_cost
from pipeline.planning.flops import classifier_flops

PIXELS = ModelConfig(
    name="pixels", channels=64, multipliers=(1, 2, 4, 4), attention=(1, 2, 4), heads=8, context_width=0
)
TINY = ModelConfig(name="tiny", blocks=1, norm_groups=8, context_width=0)
ADM = replace(PIXELS, name="adm", channels=32, resblock_updown=True, scale_shift_norm=True)
CLASSES = 24
SHAPES: list[tuple[ModelConfig, Pool, int, int, int]] = [
    (PIXELS, "attention", 4, 16, 16),
    (TINY, "attention", 64, 8, 8),
    (TINY, "mean", 64, 8, 12),
    (ADM, "attention", 2, 16, 24),
]
CASES = pytest.mark.parametrize(
    ("config", "pool", "batch", "height", "width"), SHAPES, ids=lambda v: getattr(v, "name", v)
)


def network(config: ModelConfig, pool: Pool) -> Classifier:
    classifier = Classifier(config, CLASSES, pool)
    classifier.reset_parameters(0)
    return classifier


def given(config: ModelConfig, batch: int, height: int, width: int) -> tuple[Any, ...]:
    x = torch.randn(batch, config.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    return x, torch.full((batch,), 3)


def blocks(cost: Cost) -> tuple[str, ...]:
    return tuple(part.name for part in cost.parts if part.block)


@CASES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_of_torchs_counter(
    config: ModelConfig, pool: Pool, batch: int, height: int, width: int, checkpointing: bool
) -> None:
    with torch.device("meta"):
        classifier = Classifier(replace(config, checkpointing=checkpointing), CLASSES, pool)
        x, timestep = torch.empty(batch, config.in_channels, height, width), torch.empty(batch)
    cost = classifier_cost(config, CLASSES, pool, batch, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(x, timestep)
    assert sum(cost.forward_flops().values()) == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        classifier(x, timestep).sum().backward()
    flops = cost.training_flops(blocks(cost) if checkpointing else ())
    assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)


@CASES
def test_every_part_has_the_parameters_of_its_module(
    config: ModelConfig, pool: Pool, batch: int, height: int, width: int
) -> None:
    with torch.device("meta"):
        classifier = Classifier(config, CLASSES, pool)
    cost = classifier_cost(config, CLASSES, pool, batch, height, width)
    assert cost.parameters == sum(p.numel() for p in classifier.parameters())
    modules = dict(classifier.named_modules())
    for part in cost.parts:
        if part.name not in ("embed", "pool"):  # two modules each
            assert part.parameters == sum(p.numel() for p in modules[part.name].parameters()), part.name


@CASES
def test_kept_activations_and_the_peak_are_those_of_the_tensors_alive(
    config: ModelConfig, pool: Pool, batch: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SCORES", 0)  # on a CPU, small attention keeps a matrix of scores
    classifier, inputs = network(config, pool), given(config, batch, height, width)
    cost = classifier_cost(config, CLASSES, pool, batch, height, width)
    _, found = kept_bytes(lambda: classifier(*inputs), dict(classifier.named_modules()))
    assert sum(memory.kept_bytes(cost, "fp32").values()) == pytest.approx(sum(found.values()), rel=0.02)
    with Live() as live:
        classifier(*inputs).square().mean().backward()
    state = memory.state_bytes(cost.parameters, "fp32", 0)
    modelled = memory.peak_bytes(cost, "fp32", average=False) - state.weights - state.optimizer
    assert modelled == pytest.approx(live.peak, rel=0.05)


def test_a_budget_is_honoured_or_refused() -> None:
    cost = classifier_cost(PIXELS, CLASSES, "attention", 4, 16, 16)
    least, most = (memory.activation_bytes(cost, "fp32", names) for names in (blocks(cost), ()))
    names = memory.recompute_classifier(PIXELS, CLASSES, "attention", 4, 16, 16, (least + most) // 2, "fp32")
    assert 0 < len(names) < len(blocks(cost))
    assert memory.activation_bytes(cost, "fp32", names) <= (least + most) // 2
    with pytest.raises(ConfigError, match="every block of model=pixels recomputed"):
        memory.recompute_classifier(PIXELS, CLASSES, "attention", 4, 16, 16, least // 2, "fp32")


def test_an_images_flops_are_the_costs_and_odd_sizes_are_refused() -> None:
    flops = classifier_flops(TINY, CLASSES, "attention")((4, 8, 8), 0)
    assert flops == sum(classifier_cost(TINY, CLASSES, "attention", 1, 8, 8).training_flops().values()) > 0
    with pytest.raises(ShapeError, match="multiples of 2"):
        classifier_cost(TINY, CLASSES, "mean", 1, 7, 8)
