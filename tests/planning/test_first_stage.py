"""planning/first_stage.py: FLOPs, parameters, kept tensors and peak memory of a step of an autoencoder, measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from made.first_stage import adaptive_loss, autoencoder_loss, discriminator_loss, made
from made.live_memory import Live, kept_bytes
from made.places import REPOSITORY
from pipeline.config import FirstStageConfig, GanConfig
from pipeline.config.loading.folders import conf_dir
from pipeline.config.loading.load import load
from pipeline.errors import ShapeError
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from pipeline.models.kernels import fused
from pipeline.planning import memory
from pipeline.planning.cost import KINDS, Kind
from pipeline.planning.first_stage import autoencoder_cost, fit_autoencoder, step_cost, step_flops

KL = FirstStageConfig(name="kl", channels=32, multipliers=(1, 2, 4), blocks=2, latent_channels=4, norm_groups=8)
VQ = replace(KL, name="vq", attention=(4, 2), regularizer="vq", codes=64)
SMALL = load("autoencoder", ["data.train=unused", "run=unused"]).autoencoder
F2 = replace(KL, name="f2", multipliers=(1, 2), blocks=1)
NONE, GAN, WIDE = GanConfig(), GanConfig(weight=0.5, channels=32), GanConfig(weight=0.5, layers=4)
CASES = pytest.mark.parametrize(
    ("config", "gan", "batch", "height", "width"),
    [
        (KL, NONE, 2, 32, 64),
        (VQ, GAN, 2, 64, 64),
        (SMALL, WIDE, 4, 64, 64),
        (F2, GAN, 2, 64, 32),
    ],
    ids=lambda v: getattr(v, "name", None),
)


def given(config: FirstStageConfig, batch: int, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    f = config.downsampling
    latent = (batch, config.latent_channels, height // f, width // f)
    return torch.empty(batch, 3, height, width).uniform_(), torch.empty(latent).normal_()


def step(module: TrainableAutoencoder, x: Tensor, noise: Tensor | None, gan: bool, discriminator: bool) -> Tensor:
    """The loss of a step."""
    outputs = module(x, noise if module.config.regularizer == "kl" else None, gan, discriminator)
    loss = autoencoder_loss(outputs, x)
    return loss + discriminator_loss(outputs) if discriminator else loss


def meta(name: str, gan: GanConfig) -> tuple[FirstStageConfig, TrainableAutoencoder]:
    config = load("autoencoder", [f"autoencoder={name}", "data.train=unused", "run=unused"]).autoencoder
    with torch.device("meta"):
        return config, TrainableAutoencoder(config, gan)


def counted(counter: FlopCounterMode) -> dict[Kind, int]:
    kinds: dict[str, Kind] = {"convolution": "conv", "bmm": "attention", "baddbmm": "attention"}
    found: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for operation, count in counter.get_flop_counts()["Global"].items():
        word = str(operation).removeprefix("aten.").removesuffix("_backward")
        found[kinds.get(word, "linear")] += count
    return found


@pytest.fixture(autouse=True)
def attention_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, small attention keeps a matrix of scores, which the model does not include."""
    monkeypatch.setattr(fused, "SCORES", 0)


# --------------------------------------------------------------------------------------------------------------------
# FLOPs and parameters


@pytest.mark.parametrize("name", ["kl_small", "kl_f8", "kl_f16", "vq_f4_no_attention", "vq_f8"])
@pytest.mark.parametrize(("generator", "discriminator"), [(True, True), (False, True), (False, False)])
def test_training_flops_are_those_of_torchs_counter(name: str, generator: bool, discriminator: bool) -> None:
    """With the gradients at the last layer that the discriminator's weight is found from, on the meta device."""
    gan = GanConfig(weight=0.5)
    config, module = meta(name, gan)
    with torch.device("meta"):
        x, noise = given(config, 2, 64, 96)
    with FlopCounterMode(display=False) as counter:
        outputs = module(x, noise if config.regularizer == "kl" else None, generator, discriminator)
        loss = autoencoder_loss(outputs, x)
        if generator:
            loss = adaptive_loss(outputs, x, module.last_layer)
        (loss + discriminator_loss(outputs) if discriminator else loss).backward()
    cost = step_cost(config, gan, 2, 64, 96, generator=generator, discriminator=discriminator)
    flops = cost.training_flops()
    for kind, count in counted(counter).items():
        assert flops[kind] == pytest.approx(count, rel=0.01), kind
    each = step_flops(config, gan, 64, 96, generator=generator, discriminator=discriminator)
    assert sum(flops.values()) == pytest.approx(2 * each, rel=1e-6)


@pytest.mark.parametrize("name", ["kl_small", "kl_f32", "vq_f4", "vq_f16"])
def test_forward_flops_are_those_of_torchs_counter(name: str) -> None:
    config, module = meta(name, NONE)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(given(config, 3, 64, 32)[0], None)
    flops = autoencoder_cost(config, 3, 64, 32).forward_flops()
    for kind, count in counted(counter).items():
        assert flops[kind] == pytest.approx(count, rel=0.01), kind


@CASES
def test_every_part_has_the_parameters_of_the_module_of_its_name(
    config: FirstStageConfig, gan: GanConfig, batch: int, height: int, width: int
) -> None:
    with torch.device("meta"):
        module = TrainableAutoencoder(config, gan)
    cost = step_cost(config, gan, batch, height, width)
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    modules = dict(module.named_modules())
    for part in cost.parts:
        if part.name.startswith("model.") and not part.name.endswith("coder.conv_out"):  # which has a norm as well
            assert part.parameters == sum(p.numel() for p in modules[part.name].parameters()), part.name
    rests = step_cost(config, gan, batch, height, width, generator=False, discriminator=False)
    assert rests.parameters == cost.parameters


def test_a_resting_discriminator_costs_nothing_but_its_parameters() -> None:
    rests = step_cost(KL, GAN, 2, 64, 64, generator=False, discriminator=False)
    assert rests.training_flops() == autoencoder_cost(KL, 2, 64, 64).training_flops()
    kept, alone = (sum(memory.kept_bytes(c, "fp32").values()) for c in (rests, autoencoder_cost(KL, 2, 64, 64)))
    assert kept == alone


def test_the_reference_page_has_every_presets_figures() -> None:
    rows: dict[str, list[str]] = {}
    for line in (REPOSITORY / "docs/reference/autoencoders.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`(kl|vq)_\w+`", cells[0]):
            rows.setdefault(cells[0].strip("`"), [cells[1], cells[2], cells[3], *cells[-3:]])  # of the first table
    assert set(rows) == {path.stem for path in (conf_dir() / "autoencoder").glob("*.yaml")}
    for name, row in rows.items():
        config = load("autoencoder", [f"autoencoder={name}", "data.train=unused", "run=unused"]).autoencoder
        side, digits = (64, 1) if "small" in name else (256, 0)
        latent = side // config.downsampling
        cost = autoencoder_cost(config, 1, side, side)
        steps = (cost, step_cost(config, GanConfig(weight=0.5), 1, side, side))
        assert row == [
            str(config.downsampling),
            f"{latent}x{latent}x{config.latent_channels}",
            f"{config.codes:,}" if config.regularizer == "vq" else "",
            f"{cost.parameters:,}",
            *(f"{sum(each.training_flops().values()) / 1e9:,.{digits}f}" for each in steps),
        ]


def test_sizes_that_do_not_halve_are_refused() -> None:
    with pytest.raises(ShapeError, match="multiples of 4"):
        autoencoder_cost(KL, 1, 62, 64)


def test_a_login_node_can_plan_without_torch() -> None:
    code = "import sys, pipeline.planning.first_stage; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------------------------
# Memory


@CASES
def test_kept_activations_are_those_that_the_backward_pass_is_given(
    config: FirstStageConfig, gan: GanConfig, batch: int, height: int, width: int
) -> None:
    module, (x, noise) = made(config, gan), given(config, batch, height, width)
    on = gan.weight > 0
    _, found = kept_bytes(lambda: step(module, x, noise, on, on), dict(module.named_modules()))
    kept = memory.kept_bytes(step_cost(config, gan, batch, height, width), "fp32")
    assert sum(kept.values()) == pytest.approx(sum(found.values()), rel=0.02)


@CASES
def test_the_peak_of_a_step_is_that_of_the_tensors_alive(
    config: FirstStageConfig, gan: GanConfig, batch: int, height: int, width: int
) -> None:
    module, (x, noise) = made(config, gan), given(config, batch, height, width)
    on = gan.weight > 0
    with Live() as live:
        step(module, x, noise, on, on).backward()
    cost = step_cost(config, gan, batch, height, width)
    state = memory.state_bytes(cost.parameters, "fp32", 0)
    modelled = memory.peak_bytes(cost, "fp32", average=False) - state.weights - state.optimizer
    assert modelled == pytest.approx(live.peak, rel=0.05), "activations and gradients, without weights and optimizer"


@pytest.mark.long
def test_the_peak_of_a_step_is_that_of_the_process() -> None:
    """Here glibc returns freed blocks at once. With the gradients at the last layer before the backward pass."""
    config = replace(KL, channels=64, multipliers=(1, 2, 2))
    gan = GanConfig(weight=0.5)
    ended = subprocess.run(
        [sys.executable, "-m", "ranks.first_stage_peak_job", json.dumps(asdict(config)), "4", "128"],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    modelled = memory.peak_bytes(step_cost(config, gan, 4, 128, 128), "fp32", average=False)
    assert modelled == pytest.approx(int(ended.stdout), rel=0.1)


def test_what_a_rank_needs_counts_averages_of_the_autoencoder_alone() -> None:
    words = ["data.train=unused", "run=unused", "optim.batch=8", "deepspeed=zero2"]
    one, more = (
        load("autoencoder", [*words, "gan.weight=0.5", f"ema.half_lives={lives}"]) for lives in ("[]", "[10.0]")
    )
    averaged = autoencoder_cost(SMALL, 1, 64, 64).parameters
    for world in (1, 4):
        few, many = (fit_autoencoder(config, 64, 64, world, "fp32") for config in (one, more))
        assert many.peak - few.peak == many.state - few.state == 4 * -(-averaged // world)
    assert few.parameters > averaged
    bare = fit_autoencoder(load("autoencoder", words), 64, 64, 1, "fp32")
    assert bare.parameters == averaged
    assert "million parameters" in bare.words()
    larger = fit_autoencoder(one, 128, 128, 1, "fp32")
    assert larger.peak > 2 * fit_autoencoder(one, 64, 64, 1, "fp32").peak
