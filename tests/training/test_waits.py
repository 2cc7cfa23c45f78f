"""A step asks the device for one thing: the gradient's norm."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import DataConfig, DeepSpeedConfig, OptimConfig, TrainConfig
from pipeline.data.reading.device import to_device
from pipeline.distributed.world import World
from pipeline.training.engines.base import Engine
from pipeline.training.engines.choose import make_engine
from pipeline.training.engines.deepspeed import deepspeed_settings


class Reads(TorchDispatchMode):
    """Counts the scalars that are read from tensors, for each of which a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class TwoParts(nn.Module):
    PARTS: ClassVar[dict[str, tuple[str, ...]]] = {"one": ("first.",), "other": ("second.",)}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        run="run",
        data=DataConfig(train="cache"),
        optim=OptimConfig(batch=4),
        deepspeed=DeepSpeedConfig(engine="torch"),
        **changes,
    )


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    engine = make_engine(TwoParts(), config(), World())
    engine.backward(engine(torch.randn(4, 3)).square().mean())
    return engine


def test_the_norm_stays_on_the_device_until_it_is_read(engine: Engine) -> None:
    with Reads() as reads:
        squares = engine.square_sums()
    assert reads.count == 0
    assert squares.dtype == torch.float64 and squares.shape == (2,)
    grads = {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}
    expected = [
        sum(float(grad.double().square().sum()) for name, grad in grads.items() if name.startswith(prefix))
        for prefix in ("first.", "second.")
    ]
    assert squares.tolist() == pytest.approx(expected)
    assert [norm**2 for norm in engine.grad_norms().values()] == pytest.approx(expected)


def test_taking_the_step_reads_nothing_more(engine: Engine) -> None:
    norms = engine.grad_norms()
    with Reads() as reads:
        engine.step(1e-3, norms)
    assert reads.count == 0


def test_a_gradient_that_is_not_finite_has_no_finite_norm(engine: Engine) -> None:
    next(iter(engine.module.parameters())).grad[0, 0] = torch.inf  # type: ignore[index]
    norms = engine.grad_norms()
    assert norms["one"] != norms["one"] and norms["other"] == norms["other"]


def test_deepspeed_does_not_look_again_whether_the_gradient_is_finite() -> None:
    """Engine has, before the step; DeepSpeed would pass over the gradient twice more and wait."""
    settings = deepspeed_settings(config(), 4, 1, bf16=True, device="cuda")
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}


def test_a_small_tensor_goes_to_a_gpu_from_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory PyTorch waits for all that the GPU has before the copy."""
    asked: list[Any] = []
    locked: Any = type("Locked", (), {"to": lambda self, *words, **named: asked.append((words, named))})()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked)
    gpu, numbers = torch.device("cuda", 0), torch.arange(3)
    to_device(numbers, gpu)
    assert asked == [((gpu,), {"non_blocking": True})]
    assert to_device(numbers, torch.device("cpu")) is numbers
