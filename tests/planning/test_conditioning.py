"""What a task learns beside the UNet: parameters, FLOPs and memory as its modules have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from made.facts import EVERYTHING, Facts
from made.live_memory import Live
from pipeline.config import (
    ClassTask,
    InpaintTask,
    LayoutTask,
    ModelConfig,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
    TrainConfig,
    UnconditionalTask,
)
from pipeline.config.loading.load import load
from pipeline.data.format.contract import TextFacts
from pipeline.models.denoiser import Denoiser
from pipeline.models.kernels import fused
from pipeline.models.tasks.choose import make_task
from pipeline.planning.fit import LEARNED, cost_of, fit
from pipeline.planning.memory import peak_bytes, state_bytes
from pipeline.planning.parts import Cost

B, WIDTH, LENGTH = 4, 48, 20
TEXT = TextFacts(layer="last", length=LENGTH, width=WIDTH, pad=7, eot=49, start=48, vocabulary=50)
CACHE = Facts(latent_shape=(4, 16, 16), conditions=EVERYTHING, text=TEXT)
MODEL = ModelConfig(channels=32, multipliers=(1, 2), attention=(1, 2), blocks=1, heads=2, context_width=0)
TASKS: list[TaskConfig] = [
    UnconditionalTask(),
    TextTask(),
    TextTask(encoder="transformer", depth=6, heads=4, head_width=16),
    ClassTask(),
    ClassTask(mode="vector"),
    LayoutTask(),
    LayoutTask(encoder="transformer", depth=3, heads=2, head_width=16, paint=3),
    SemanticTask(),
    SemanticTask(labels="average", width=3),
    SuperresTask(),
    SuperresTask(noise=350, text=True, drop=0.1),
    InpaintTask(),
]


def named(task: TaskConfig) -> str:
    return "-".join(str(value) for name, value in vars(task).items() if name in ("name", "encoder", "mode", "labels"))


def config_of(task: TaskConfig) -> TrainConfig:
    config = load("train", ["data.train=cache", "run=r", f"optim.batch={B}", "deepspeed=off"])
    model = replace(
        MODEL, context_width=WIDTH if task.makes_context else 0, vector_width=12 if task.makes_vector else 0
    )
    return replace(config, task=task, model=model)


def denoiser_of(config: TrainConfig) -> Denoiser:
    return Denoiser(config.model, make_task(config.task, config.model, CACHE, torch.zeros(LENGTH, WIDTH)))


def batch_of(task: TaskConfig) -> dict[str, Tensor]:
    """What a prepared batch holds, as the task's network reads it."""
    g = torch.Generator().manual_seed(0)
    boxes = torch.cat([torch.zeros(B, 6, 1), torch.rand(B, 6, 4, generator=g)], dim=2)
    arrays = {
        "text": torch.randn(B, LENGTH, WIDTH, generator=g),
        "tokens": torch.randint(0, 50, (B, LENGTH), generator=g),
        "cond.class": torch.zeros(B, dtype=torch.int32),
        "cond.boxes": boxes,
        "cond.labels": torch.randint(0, 25, (B, 64, 64), generator=g),
        "cond.lowres": torch.randn(B, 3, 32, 32, generator=g),
        "lowres.level": torch.zeros(B, dtype=torch.int64),
        "cond.mask": torch.zeros(B, 1, 16, 16),
        "cond.masked": torch.randn(B, 4, 16, 16, generator=g),
    }
    return {name: array for name, array in arrays.items() if name in (*task.members, "lowres.level")}


def stepped(config: TrainConfig, denoiser: Denoiser, device: str = "cpu") -> None:
    x = torch.randn(B, *CACHE.latent_shape, generator=torch.Generator().manual_seed(1)).to(device)
    batch = {name: array.to(device) for name, array in batch_of(config.task).items()}
    denoiser(x, torch.full((B,), 3, device=device), batch).square().mean().backward()


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_the_parameters_of_a_task_are_those_of_its_module(task: TaskConfig) -> None:
    config = config_of(task)
    denoiser, cost = denoiser_of(config), cost_of(config, CACHE, B)
    learned = sum(part.parameters for part in cost.parts if part.name.startswith(LEARNED))
    assert learned == sum(p.numel() for p in denoiser.task.parameters())
    assert cost.parameters == sum(p.numel() for p in denoiser.parameters())


@pytest.mark.parametrize("task", [TASKS[2], TASKS[3], TASKS[6]], ids=named)
def test_the_flops_of_a_step_are_those_of_unet_and_task(task: TaskConfig) -> None:
    """On the meta device, where the counter sees attention's two products."""
    config = config_of(task)
    denoiser = denoiser_of(config).to("meta")
    with FlopCounterMode(display=False) as counter:
        stepped(config, denoiser, "meta")
    counted = sum(counter.get_flop_counts()["Global"].values())
    assert sum(cost_of(config, CACHE, B).training_flops().values()) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(("task", "share"), [(TASKS[2], 0.95), (TASKS[6], 0.99)], ids=["text", "layout"])
def test_the_peak_of_a_step_includes_what_a_task_keeps(
    task: TaskConfig, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SCORES", 0)  # as on a GPU, attention keeps no scores
    config = config_of(task)
    denoiser, cost = denoiser_of(config), cost_of(config, CACHE, B)
    with Live() as live:
        stepped(config, denoiser)
    assert modelled(cost) == pytest.approx(live.peak, rel=0.07)
    assert modelled(without(cost)) < share * modelled(cost), "the test is about what the task adds"


def modelled(cost: Cost) -> int:
    """Activations and gradients at a step's peak, without weights and optimizer."""
    state = state_bytes(cost.parameters, "fp32", 0)
    return peak_bytes(cost, "fp32", average=False) - state.weights - state.optimizer


def without(cost: Cost) -> Cost:
    return replace(cost, parts=tuple(part for part in cost.parts if not part.name.startswith(LEARNED)))


def test_a_fit_counts_what_a_task_learns() -> None:
    task: Any = TASKS[2]
    config = config_of(task)
    assert fit(config, CACHE, 1, "fp32").parameters == sum(p.numel() for p in denoiser_of(config).parameters())
