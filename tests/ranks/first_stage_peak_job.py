"""Measures training steps of an autoencoder with its discriminator in a process of their own:
`python -m ranks.first_stage_peak_job '{"channels": 64, ...}' BATCH SIDE`.

Prints the peak resident memory in bytes, as the kernel counts it, less the memory after the imports and a step of a
tiny autoencoder. Two steps with AdamW as the trainer makes it, on fp32 weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import psutil
import torch

from made.first_stage import GAN, KL, autoencoder_loss, discriminator_loss, made
from pipeline.config import FirstStageConfig, GanConfig, OptimConfig
from pipeline.models.first_stage.discriminator import fooled
from pipeline.models.kernels import fused
from pipeline.training.engines.optimizer import make_optimizer
from ranks.peak_job import most_resident


def train(config: FirstStageConfig, gan: GanConfig, batch: int, side: int, steps: int) -> None:
    """Train `steps` steps on random pictures. Gradients are freed between them, as the engine does."""
    module = made(config, gan)
    optimizer = make_optimizer(module, OptimConfig())
    x = torch.rand(batch, 3, side, side) * 2 - 1
    noise = torch.randn(batch, config.latent_channels, side // config.downsampling, side // config.downsampling)
    for _ in range(steps):
        outputs = module(x, noise, gan=True, train_discriminator=True)
        assert outputs.logits_for_generator is not None
        for one in ((outputs.reconstruction - x).abs().mean(), fooled(outputs.logits_for_generator).mean()):
            torch.autograd.grad(one, module.last_layer, retain_graph=True)
        (autoencoder_loss(outputs, x) + discriminator_loss(outputs)).backward()
        del outputs, one
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main(settings: str, *sizes: str) -> int:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(settings).items()
    }
    batch, side = map(int, sizes)
    torch.set_num_threads(1)
    fused.SCORES = 0  # attention as on a GPU, which the model of memory describes
    train(KL, GAN, 1, 16, 2)
    baseline = psutil.Process().memory_info().rss
    train(FirstStageConfig(**fields), GanConfig(weight=0.5), batch, side, 2)
    print(most_resident() - baseline)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
