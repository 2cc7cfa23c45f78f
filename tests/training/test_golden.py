"""50 training steps give the losses that they gave before (tests/made/golden_losses.py), which real changes do not.

The tolerances: on an AMD EPYC, one and two threads, channels_last and not, and oneDNN's and PyTorch's code for SSE 4.1
moved a loss by 1.8e-6 of itself at most for tiny, and 3.5e-5 for sd1, where Adam makes more of rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from made.golden_losses import MODELS, STEPS, furthest, held, losses, make_denoiser
from pipeline.config import DiffusionConfig
from pipeline.config.loading.load import load

TOLERANCE = {"tiny": 1e-5, "sd1": 2e-4}
TINY, SIDE = MODELS["tiny"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("tiny", 20),
        ("sd1", 5),
        pytest.param("tiny", STEPS, marks=pytest.mark.long),
        pytest.param("sd1", STEPS, marks=pytest.mark.long),
    ],
)
def test_losses_are_those_that_are_held(name: str, steps: int) -> None:
    model, side = MODELS[name]
    assert furthest(losses(model, side, steps=steps), held()[name][:steps]) < TOLERANCE[name]


def test_the_held_losses_are_of_learning() -> None:
    for many in held().values():
        assert len(many) == STEPS
        assert sum(many[-10:]) < 0.5 * sum(many[:10])


def test_the_models_are_those_of_conf() -> None:
    def conf(name: str) -> object:
        return load("train", [f"model={name}", "data.train=unused", "run=unused"]).model

    assert conf("tiny") == TINY
    assert conf("sd1") == replace(MODELS["sd1"][0], channels=320, context_width=768)


def test_channels_last_changes_no_loss() -> None:
    assert furthest(losses(TINY, SIDE, steps=15, channels_last=True), held()["tiny"][:15]) < TOLERANCE["tiny"]


def test_another_epsilon_of_one_kind_of_norm_is_noticed() -> None:
    denoiser = make_denoiser(TINY, SIDE)
    for module in denoiser.modules():
        if isinstance(module, nn.GroupNorm) and module.eps == 1e-6:  # those before transformers
            module.eps = 1e-5
    assert furthest(losses(TINY, SIDE, denoiser=denoiser), held()["tiny"]) > 2 * TOLERANCE["tiny"]


def test_an_approximate_gelu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = F.gelu

    def approximate_gelu(x: Tensor, approximate: str = "none") -> Tensor:
        return exact(x, approximate="tanh")

    monkeypatch.setattr(F, "gelu", approximate_gelu)
    assert furthest(losses(TINY, SIDE), held()["tiny"]) > 2 * TOLERANCE["tiny"]


@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(schedule="linear"),
        DiffusionConfig(beta_end=0.0121),
        DiffusionConfig(timestep_sampling="stratified"),
        DiffusionConfig(prediction="v"),
    ],
    ids=["schedule", "beta", "timesteps", "prediction"],
)
def test_another_objective_is_noticed(diffusion: DiffusionConfig) -> None:
    assert furthest(losses(TINY, SIDE, diffusion, steps=10), held()["tiny"][:10]) > 10 * TOLERANCE["tiny"]


def test_other_initial_weights_are_noticed() -> None:
    denoiser = make_denoiser(TINY, SIDE)
    denoiser.reset_parameters(12)
    assert furthest(losses(TINY, SIDE, steps=3, denoiser=denoiser), held()["tiny"][:3]) > 10 * TOLERANCE["tiny"]
