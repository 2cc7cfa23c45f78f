"""planning/perceptual.py: FLOPs, weights and memory of the perceptual distance, measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from made.live_memory import kept_bytes
from pipeline.config.loading.load import load
from pipeline.models.perceptual import network
from pipeline.models.perceptual.network import Perceptual
from pipeline.planning import memory
from pipeline.planning.cost import Cost
from pipeline.planning.first_stage import autoencoder_cost, fit_autoencoder, step_cost
from pipeline.planning.perceptual import STAGES, Backbone, backbone_of, distance_parts, weights_bytes

CASES = pytest.mark.parametrize(
    ("kind", "batch", "height", "width"),
    [
        *[("alex", 2, 64, 64), ("vgg", 2, 64, 48), ("alex", 1, 33, 65), ("vgg", 1, 65, 33)],
        *[("lpips-vgg", 2, 64, 48), ("lpips-vgg", 1, 65, 33)],
    ],
)


def distance(kind: Backbone, batch: int, height: int, width: int) -> tuple[Perceptual, torch.Tensor, torch.Tensor]:
    module = Perceptual(kind)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.rand(batch, 3, height, width)
    return module, x, (1 - x).requires_grad_()


def cost(kind: Backbone, batch: int, height: int, width: int) -> Cost:
    return Cost(tuple(distance_parts(kind, batch, height, width)))


@pytest.mark.parametrize("kind", ["alex", "vgg", "lpips-vgg"])
def test_stages_and_weights_are_those_of_the_network(kind: Backbone) -> None:
    stages = [(one.window, one.widths, one.kernel, one.padding, one.blurs, one.step) for one in network.STAGES[kind]]
    assert list(STAGES[kind]) == stages
    with torch.device("meta"):
        module = Perceptual(kind)
    assert weights_bytes(kind) == 4 * sum(parameter.numel() for parameter in module.parameters())


@CASES
def test_flops_are_those_of_torchs_counter(kind: Backbone, batch: int, height: int, width: int) -> None:
    """A picture and its reconstruction forward, the latter backward."""
    module, x, y = distance(kind, batch, height, width)
    with FlopCounterMode(display=False) as counter:
        module.distance(x, y).sum().backward()
    flops = cost(kind, batch, height, width).training_flops()
    assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)


@CASES
def test_kept_activations_are_those_that_the_backward_pass_is_given(
    kind: Backbone, batch: int, height: int, width: int
) -> None:
    module, x, y = distance(kind, batch, height, width)
    _, found = kept_bytes(lambda: module.distance(x, y), dict(module.named_modules()))
    for precision in ("fp32", "bf16"):  # its arithmetic is float32
        kept = memory.kept_bytes(cost(kind, batch, height, width), precision)  # type: ignore[arg-type]
        assert sum(kept.values()) == pytest.approx(sum(found.values()), rel=0.02)


def test_loss_perceptual_names_the_backbone() -> None:
    assert [backbone_of(name) for name in ("none", "st-alex", "st-alex#sha256=00", "st-vgg", "lpips-vgg:FILE")] == [
        None,
        "alex",
        "alex",
        "vgg",
        "lpips-vgg",
    ]


def test_a_step_and_what_a_rank_needs_count_the_distance() -> None:
    words = ["data.train=unused", "run=unused", "optim.batch=8", "deepspeed=zero2"]
    bare, judged = (load("autoencoder", [*words, f"loss.perceptual={name}"]) for name in ("none", "st-vgg"))
    steps = [
        step_cost(bare.autoencoder, bare.gan, 8, 64, 64, perceptual=backbone_of(one.loss.perceptual))
        for one in (bare, judged)
    ]
    alone = cost("vgg", 8, 64, 64)
    assert steps[0].training_flops() == autoencoder_cost(bare.autoencoder, 8, 64, 64).training_flops()
    assert steps[1].training_flops()["conv"] == steps[0].training_flops()["conv"] + alone.training_flops()["conv"]
    fits = [fit_autoencoder(one, 64, 64, 1, "fp32") for one in (bare, judged)]
    assert fits[1].parameters == fits[0].parameters
    assert fits[1].state - fits[0].state == weights_bytes("vgg")
    kept = sum(memory.kept_bytes(alone, "fp32").values())
    assert fits[1].peak - fits[0].peak - weights_bytes("vgg") == pytest.approx(kept, rel=0.05)
