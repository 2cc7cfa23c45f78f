"""What a task feeds the UNet, and the denoiser that is trained: UNet and task in one module.

A task turns a batch's members ("text", "cond.boxes", ...) into a Conditioning: context tokens for the cross-attention,
channels concatenated to the noisy latent, a vector added to the timestep embedding, or several of them. It is an
nn.Module, so a task may learn (class tokens, a layout transformer): its parameters are part of the Denoiser, which is
the one module that the engine, the optimizer, EMA and checkpoints see. A new task is a class and its line in TASKS.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.config import TaskConfig
from pipeline.models.tasks.task import Task
from pipeline.models.tasks.text import Text
from pipeline.models.tasks.unconditional import Unconditional

TASKS: dict[str, type[Unconditional] | type[Text]] = {"text": Text, "unconditional": Unconditional}


def make_task(
    config: TaskConfig, latent_shape: tuple[int, int, int], empty_LD: Tensor | None, *, trimmed: bool = False
) -> Task:
    """The task of a configuration. latent_shape (C, h, w), the encoded empty caption, and whether text states beyond a
    caption's end are missing are the cache's."""
    return TASKS[config.name](latent_shape, empty_LD, trimmed)
