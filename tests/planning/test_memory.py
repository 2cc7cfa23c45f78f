"""The memory model compared with kept tensors, live tensors and the process's memory; recomputation within a budget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from made.live_memory import Live, kept_bytes
from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.models.kernels import fused
from pipeline.models.unet import layers
from pipeline.models.unet.model import UNet
from pipeline.planning import memory
from pipeline.planning.cost import Cost, unet_cost
from servers.warm_ranks import WarmRanks

SD = ModelConfig(  # the shape of Stable Diffusion 1, narrow
    name="sd", channels=64, multipliers=(1, 2, 4, 4), attention=(1, 2, 4), heads=8, context_width=64
)
TINY = ModelConfig(name="tiny", blocks=1, norm_groups=8)
PIXELS = replace(SD, name="pixels", context_width=0)
DEEP = replace(SD, name="deep", attention=(4, 8), transformer_depth=3, vector_width=24)
PLAIN = replace(SD, name="plain", attention=(), multipliers=(1, 2))
WIDE = replace(SD, name="wide", multipliers=(1, 1), attention=(1,))
UPDOWN = replace(PIXELS, name="updown", resblock_updown=True)
SCALED = replace(UPDOWN, name="scaled", scale_shift_norm=True)
SHAPES = [
    (TINY, 16, 8, 8),
    (SD, 4, 16, 32),
    (PIXELS, 4, 16, 16),
    (DEEP, 2, 32, 32),
    (PLAIN, 4, 16, 16),
    (WIDE, 8, 16, 16),
    (UPDOWN, 4, 16, 16),
    (SCALED, 4, 16, 16),
]
CASES = pytest.mark.parametrize(("config", "batch", "height", "width"), SHAPES, ids=lambda v: getattr(v, "name", v))
TOKENS = 20

ROWS = {
    "res": r"\.res$|\.res\.",
    "self": r"\.(norm|attend)_self",
    "cross": r"\.(norm|attend)_cross",
    "feed": r"\.(norm_)?feed",
    "project_out": r"\.project_out",
    "project_in": r"\.attention(\.norm|\.project_in)?$",
    "pixel": r"\.attend(\.|$)",
    "up": r"decoder\.\d+\.resample",
    "down": r"encoder\.\d+\.resample",
    "conv_in": r"^conv_in$",
}
"""The rows of memory.KEPT, by the names of the modules whose tensors they count."""


def network(config: ModelConfig) -> UNet:
    unet = UNet(config)
    unet.reset_parameters(0)
    return unet


def inputs(config: ModelConfig, batch: int, height: int, width: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, height, width, generator=g)
    context = torch.randn(batch, TOKENS, config.context_width, generator=g) if config.context_width else None
    vector = torch.randn(batch, config.vector_width, generator=g) if config.vector_width else None
    return x, torch.full((batch,), 3), context, None, vector


def cost_of(config: ModelConfig, batch: int, height: int, width: int) -> Cost:
    return unet_cost(config, batch, height, width, TOKENS if config.context_width else 0)


def row_of(name: str, config: ModelConfig) -> str:
    for row, pattern in ROWS.items():
        if re.search(pattern, name):
            return "pixel" if row == "project_in" and not config.context_width else row
    return "outside"


def kept_of(unet: UNet, given: tuple[Any, ...], by: str = "module") -> dict[str, int]:
    """Bytes kept by a forward pass, by module or by row of memory.KEPT."""
    _, found = kept_bytes(lambda: unet(*given), dict(unet.named_modules()))
    if by == "module":
        return found
    rows: dict[str, int] = defaultdict(int)
    for name, size in found.items():
        rows[row_of(name, unet.config)] += size
    return dict(rows)


@pytest.fixture(autouse=True)
def attention_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, small attention keeps a matrix of scores, which the model does not include."""
    monkeypatch.setattr(fused, "SCORES", 0)


def blocks(cost: Cost) -> tuple[str, ...]:
    return tuple(part.name for part in cost.parts if part.block)


# --------------------------------------------------------------------------------------------------------------------
# Kept activations


def modelled_rows(cost: Cost, precision: memory.Precision) -> dict[str, int]:
    rows: dict[str, int] = defaultdict(int)
    for part in cost.parts:
        for piece in part.pieces:
            row = "outside" if piece.row in ("embed", "out") else piece.row.removeprefix("res_")
            rows[row] += memory.KEPT[piece.row].bytes(piece, memory.BYTES[precision])
            rows[row] += memory.DROPOUT.bytes(piece, memory.BYTES[precision]) if piece.dropout else 0
            rows[row] += memory.SCALE_SHIFT.bytes(piece, memory.BYTES[precision]) if piece.scale_shift else 0
    # Tensors that no layer of the part keeps which the table counts them at, but the first that is given them.
    element = memory.BYTES[precision]
    latent, embedding = (next(p.pieces[0] for p in cost.parts if p.name == name) for name in ("conv_in", "embed"))
    if cost.inputs > latent.x:
        rows["cross"] += (cost.inputs - latent.x) * element
    rows["res"] += embedding.h * element
    rows["outside"] -= embedding.h * element
    return {row: size for row, size in rows.items() if size}


@CASES
def test_each_row_of_the_table_says_what_its_layers_keep(
    config: ModelConfig, batch: int, height: int, width: int
) -> None:
    found = kept_of(network(config), inputs(config, batch, height, width), by="row")
    expected = modelled_rows(cost_of(config, batch, height, width), "fp32")
    assert found.keys() == expected.keys()
    wrong = {row: (found[row], expected[row]) for row in found if abs(found[row] / expected[row] - 1) > 0.02}
    assert wrong == {}, "rows of memory.KEPT and layers.py differ: (measured, modelled) bytes"


@CASES
def test_kept_activations_are_those_that_the_backward_pass_is_given(
    config: ModelConfig, batch: int, height: int, width: int
) -> None:
    found = kept_of(network(config), inputs(config, batch, height, width))
    kept = memory.kept_bytes(cost_of(config, batch, height, width), "fp32")
    assert sum(kept.values()) == pytest.approx(sum(found.values()), rel=0.01)


def test_bfloat16_halves_them_where_attention_is_computed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: on a CPU, layers.attend uses float32, whose copies the model does not include."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    monkeypatch.setattr(layers, "attend", attend)
    found = kept_of(network(SD).bfloat16(), inputs(SD, 4, 16, 32))
    kept = memory.kept_bytes(cost_of(SD, 4, 16, 32), "bf16")
    assert sum(kept.values()) == pytest.approx(sum(found.values()), rel=0.02)


def test_dropout_keeps_a_mask() -> None:
    config = replace(TINY, dropout=0.1)
    unet = network(config).train()
    found = kept_of(unet, inputs(config, 16, 8, 8), by="row")
    assert modelled_rows(cost_of(config, 16, 8, 8), "fp32")["res"] == pytest.approx(found["res"], rel=0.02)


# --------------------------------------------------------------------------------------------------------------------
# The peak of a step


@CASES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_is_that_of_the_tensors_alive(
    config: ModelConfig, batch: int, height: int, width: int, checkpointing: bool
) -> None:
    config = replace(config, checkpointing=checkpointing)
    unet, given, cost = network(config), inputs(config, batch, height, width), cost_of(config, batch, height, width)
    with Live() as live:
        unet(*given).square().mean().backward()
    resident = memory.state_bytes(cost.parameters, "fp32", 0)
    modelled = memory.peak_bytes(cost, "fp32", recomputed=blocks(cost) if checkpointing else (), average=False)
    modelled -= resident.weights + resident.optimizer
    assert modelled == pytest.approx(live.peak, rel=0.05), "activations and gradients, without weights and optimizer"


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_is_that_of_the_process(checkpointing: bool) -> None:
    """Here glibc returns freed blocks at once; by default it keeps up to a third more memory."""
    config = ModelConfig(
        channels=64, multipliers=(1, 2, 2, 2), attention=(1, 2, 4), heads=8, checkpointing=checkpointing
    )
    given = {name: getattr(config, name) for name in ("channels", "multipliers", "attention", "heads", "checkpointing")}
    ended = subprocess.run(
        [sys.executable, "-m", "ranks.peak_job", json.dumps(given), "6", "32", str(TOKENS)],
        env=os.environ
        | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    cost = cost_of(config, 6, 32, 32)
    modelled = memory.peak_bytes(cost, "fp32", recomputed=blocks(cost) if checkpointing else (), average=False)
    assert modelled == pytest.approx(int(ended.stdout), rel=0.1)


# --------------------------------------------------------------------------------------------------------------------
# Recomputation within a budget


NETWORKS = ((SD, 2, 32, 32), (PIXELS, 2, 16, 16), (DEEP, 2, 32, 32))
SHARES = (0.95, 0.7, 0.4, 0.0)
QUICK = {("sd", 0.4), ("deep", 0.7), *(("pixels", share) for share in SHARES)}
"""Of the twelve, those of the default run; the others say the same of the larger networks."""


@pytest.mark.parametrize(
    ("config", "batch", "height", "width", "share"),
    [
        pytest.param(*one, share, marks=[] if (one[0].name, share) in QUICK else [pytest.mark.long])
        for one in NETWORKS
        for share in SHARES
    ],
)
def test_a_budget_is_honoured_with_no_block_too_many(
    config: ModelConfig, batch: int, height: int, width: int, share: float
) -> None:
    """share: position of the budget between recomputing everything (0) and nothing (1)."""
    cost = cost_of(config, batch, height, width)
    least, most = (memory.activation_bytes(cost, "fp32", names) for names in (blocks(cost), ()))
    budget = round(least + share * (most - least))
    tokens = TOKENS if config.context_width else 0
    names = memory.recompute(config, batch, height, width, tokens, budget, "fp32")
    unet, given = network(replace(config, activation_gb=budget / 1e9)), inputs(config, batch, height, width)

    measured = sum(kept_of(unet, given).values())
    assert measured <= budget * 1.01
    assert sum(memory.kept_bytes(cost, "fp32", names).values()) == pytest.approx(measured, rel=0.02)
    for name in names:
        fewer = tuple(other for other in names if other != name)
        assert memory.activation_bytes(cost, "fp32", fewer) > budget, f"{name} need not have been recomputed"

    with Live() as live:
        unet(*given).square().mean().backward()
    state = memory.state_bytes(cost.parameters, "fp32", 0)
    modelled = memory.peak_bytes(cost, "fp32", recomputed=names, average=False) - state.weights - state.optimizer
    assert modelled == pytest.approx(live.peak, rel=0.05)


def test_the_blocks_that_free_most_for_their_time_go_first() -> None:
    cost = cost_of(SD, 4, 32, 32)
    whole = memory.activation_bytes(cost, "fp32")
    chosen = memory.recompute(SD, 4, 32, 32, TOKENS, round(0.75 * whole), "fp32")
    flops = {part.name: part.recompute_flops for part in cost.parts}
    every = sum(flops[name] for name in blocks(cost))
    assert 0 < sum(flops[name] for name in chosen) < 0.25 * every
    kept, entries = (memory.kept_bytes(cost, "fp32", names) for names in ((), blocks(cost)))
    gain = {name: (kept[name] - entries[name]) / flops[name] for name in blocks(cost)}
    assert min(gain[name] for name in chosen) >= max(gain[name] for name in blocks(cost) if name not in chosen)
    assert all(name.startswith(("encoder.0", "encoder.1")) for name in chosen), "wide images, narrow layers"


def test_nothing_is_recomputed_where_everything_fits() -> None:
    cost = cost_of(SD, 4, 32, 32)
    whole = memory.activation_bytes(cost, "bf16")
    assert memory.recompute(SD, 4, 32, 32, TOKENS, whole, "bf16") == ()
    assert len(memory.recompute(SD, 4, 32, 32, TOKENS, whole - 1, "bf16")) == 1


def test_a_budget_that_cannot_be_kept_says_by_how_much_it_misses() -> None:
    cost = cost_of(SD, 64, 64, 64)
    least = memory.activation_bytes(cost, "fp32", blocks(cost))
    with pytest.raises(ConfigError, match=r"0\.5 GB more than the budget .*micro_batch"):
        memory.recompute(SD, 64, 64, 64, TOKENS, least - 500_000_000, "fp32")
    assert memory.recompute(SD, 64, 64, 64, TOKENS, least, "fp32")


# --------------------------------------------------------------------------------------------------------------------
# Weights, gradients, optimizer


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> dict[int, dict[str, Any]]:
    """Memory of the ranks of worlds of one and two under each engine (tests/ranks/state_memory.py)."""
    folder = tmp_path_factory.mktemp("held")
    for ranks in (1, 2):
        ended = warm_ranks.run("ranks.state_memory", [str(folder)], ranks)
        assert ended.returncode == 0, ended.stderr[-4000:]
    return {ranks: json.loads((folder / f"{ranks}-0.json").read_text()) for ranks in (1, 2)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_zero_stage_holds_what_the_model_says(held: dict[int, dict[str, Any]], ranks: int) -> None:
    found = dict(held[ranks])
    parameters = found.pop("parameters")
    layer = parameters / 6
    assert len(found) == 8 - (ranks > 1)
    for name, (stepping, resident) in found.items():
        engine, kind = name.split()
        precision: memory.Precision = "bf16" if kind == "bf16" else "fp32"
        stage = 0 if engine == "torch" else int(engine[-1])
        state = memory.state_bytes(parameters, precision, stage, ranks)
        # Stages 1 and 2 hold on to the gradient that came last.
        extra = memory.BYTES[precision] * layer if stage in (1, 2) and name != "zero1 bf16" else 0
        assert stepping == pytest.approx(state.stepping + extra, rel=0.01), name
        assert resident == pytest.approx(state.resident + extra, rel=0.01), name


def test_bf16_without_masters_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage >= 1"):
        memory.state_bytes(10, "bf16", 0)
