"""Pictures, files and the training loop that the demo encoders share."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from preprocess.shapes.drawing import Scene, render, scene

TRAIN_SEED = 1_000_000  # a seed that is neither a default nor used by tests
EVAL_SEED = 2_000_000
IMAGES = 40_000  # rendered before training, about 0.5 GB


def pictures(seed: int, count: int) -> tuple[np.ndarray, list[Scene]]:
    """Draws `count` scenes of split "all". Returns pictures (count, 64, 64, 3) uint8 and the scenes."""
    scenes = [scene(seed, index, "all") for index in range(count)]
    return np.stack([render(truth) for truth in scenes]), scenes


def as_input(pixels: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def save_half(model: torch.nn.Module, path: Path) -> None:
    """Writes the state dict in fp16, atomically."""
    state = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files that only the owner can read
    os.replace(partial, path)


def save_json(content: object, path: Path) -> None:
    """Writes JSON atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Average:
    """Exponential moving average of a model's parameters, with a warm-up that forgets the start."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Updates the average with the parameters after a step."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Exchanges the average and the model's parameters. A second call exchanges them back."""
        for average, p in zip(self.values, model.parameters(), strict=True):
            saved = average.clone()
            average.copy_(p)
            p.copy_(saved)


def optimise(
    model: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    loss_of_step: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    steps: int,
    lr: float,
    average: Average,
    every_minutes: float,
    provisional: Callable[[int], None],
) -> None:
    """Trains with AdamW, warm-up and a cosine; prints progress, and calls `provisional(step)` every few minutes.

    loss_of_step: returns the loss of a step and figures to print. During `provisional` the model holds the average.
    """
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    started = saved = time.monotonic()
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, figures = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(model)
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            line = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"step {step}/{steps} {seconds:.0f} s loss {loss.item():.4f} {line}", flush=True)
        if time.monotonic() - saved > every_minutes * 60:
            saved = time.monotonic()
            average.swap(model)
            provisional(step)
            average.swap(model)
    average.swap(model)
