"""The bytes of a checkpoint that a plan says, against a commit that is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from made.commits import STAMP, save_now
from made.facts import EVERYTHING, Facts
from pipeline.config import ClassifierTask, LayoutTask, ModelConfig, TaskConfig, TrainConfig, UnconditionalTask
from pipeline.config.loading.load import load
from pipeline.distributed.world import World
from pipeline.models.classifier import Classifier
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.planning.fit import cost_of
from pipeline.planning.plan.kept import commit_bytes
from pipeline.storage.urls import open_storage
from pipeline.training.engines.choose import make_engine
from pipeline.training.engines.optimizer import hidden_matrices
from pipeline.training.state import TrainingState

CACHE = Facts(latent_shape=(4, 16, 16), conditions=EVERYTHING)
MODEL = ModelConfig(channels=64, multipliers=(1, 2), attention=(2,), blocks=1, heads=2, context_width=0)
TASKS = [UnconditionalTask(), LayoutTask(paint=3), ClassifierTask(), ClassifierTask(pool="attention")]


def network(config: TrainConfig) -> nn.Module:
    task = config.task
    if isinstance(task, ClassifierTask):
        return Classifier(config.model, task.classes(CACHE), task.pool)
    return Denoiser(config.model, make_task(task, config.model, CACHE, torch.zeros(1, 1)))


def written(config: TrainConfig, folder: Path) -> int:
    """Bytes of the tensors' file of a commit of a run that has taken no step."""
    torch.manual_seed(0)
    module = network(config)
    none: Any = None
    state = TrainingState(config, make_engine(module, config, World()), none)
    run = open_storage(str(folder))
    stamp = replace(STAMP, shapes={name: tuple(p.shape) for name, p in module.named_parameters()})
    save_now(run, World(), state.fragments(), n=64, steps=2, stamp=stamp)
    return max(info.size for info in run.list(""))


@pytest.mark.parametrize(
    ("optimizer", "task"),
    [("adamw", TASKS[0]), ("muon", TASKS[0]), ("muon", TASKS[1])],
    ids=["adamw", "muon", "layout"],
)
def test_a_checkpoint_has_the_bytes_that_a_plan_says(optimizer: str, task: TaskConfig, tmp_path: Path) -> None:
    words = ["data.train=c", "run=r", "optim.batch=32", "deepspeed=off", f"optim={optimizer}", "ema.half_lives=[10]"]
    config: TrainConfig = load("train", words)
    width = 256 if isinstance(task, LayoutTask) else 0  # as wide as the network, so that its matrices count
    config = replace(config, task=task, model=replace(MODEL, context_width=width))
    cost = cost_of(config, CACHE, 1)
    assert commit_bytes(config, cost, cost.parameters) == pytest.approx(written(config, tmp_path), rel=0.01)


@pytest.mark.parametrize("task", TASKS, ids=["unconditional", "layout", "classifier", "attention"])
def test_muon_saves_a_moment_of_the_very_layers_that_it_steps(task: TaskConfig) -> None:
    """Biases of those layers count as Muon's."""
    config: TrainConfig = load("train", ["data.train=c", "run=r", "optim.batch=32", "optim=muon"])
    config = replace(config, task=task, model=replace(MODEL, context_width=256 * isinstance(task, LayoutTask)))
    sizes = {name: p.numel() for name, p in network(config).named_parameters()}
    stepped = hidden_matrices(network(config))
    own = sum(sizes[name] + sizes.get(name.removesuffix("weight") + "bias", 0) for name in stepped)
    cost, adamw = cost_of(config, CACHE, 1), replace(config, optim=replace(config.optim, name="adamw"))
    assert commit_bytes(adamw, cost, 0) - commit_bytes(config, cost, 0) == 4 * own
