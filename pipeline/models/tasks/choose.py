"""Makes the task of a configuration, which the table of tasks finds (config/tasks/table.py).

A task turns a batch's members ("text", "cond.boxes", ...) into a Conditioning: context tokens for the cross-attention,
channels concatenated to the noisy latent, a vector added to the timestep embedding, or several of them. It is an
nn.Module, so it may have parameters (class tokens, a layout encoder). These are part of the Denoiser, the one module
that the engine, the optimizer, EMA and checkpoints see.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.config import ModelConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.config.tasks.found import facts_of, found
from pipeline.models.tasks.task import Task


def make_task(config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None = None) -> Task:
    """The task of a configuration for a UNet and a cache. empty_LD: the cache's encoded empty caption, where it has
    captions. Raises ConfigError."""
    task: Task = found(facts_of(config).network)(config, model, cache, empty_LD)
    return task
