"""Measures training steps in their own process: `python -m ranks.peak_job '{"channels": 128, ...}' BATCH SIDE TOKENS`.

Prints the peak resident memory in bytes, as the kernel counts it, less the memory after the imports and a step of a
tiny network. Two steps with AdamW as the trainer makes it, on fp32 weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.config import ModelConfig, OptimConfig
from pipeline.models.kernels import fused
from pipeline.models.unet.model import UNet
from pipeline.training.engines.optimizer import make_optimizer


def train(config: ModelConfig, batch: int, side: int, tokens: int, steps: int) -> None:
    """Train `steps` steps on random latents. Gradients are freed between them, as the engine does."""
    unet = UNet(config)
    unet.reset_parameters(0)
    optimizer = make_optimizer(unet, OptimConfig())
    x = torch.randn(batch, config.in_channels, side, side)
    context = torch.randn(batch, tokens, config.context_width) if config.context_width else None
    for _ in range(steps):
        loss = unet(x, torch.full((batch,), 500), context).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def most_resident() -> int:
    """Peak resident bytes of this program alone: getrusage's figure is at least that of the parent process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def main(settings: str, *sizes: str) -> int:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(settings).items()
    }
    batch, side, tokens = map(int, sizes)
    torch.set_num_threads(1)
    fused.SCORES = 0  # attention as on a GPU, which the model of memory describes
    train(ModelConfig(channels=32, blocks=1, context_width=8), 1, 4, 2, 2)
    baseline = psutil.Process().memory_info().rss
    train(ModelConfig(**fields), batch, side, tokens, 2)
    print(most_resident() - baseline)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
