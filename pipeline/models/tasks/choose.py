"""The tasks by name: each turns members of a batch into the conditioning of the UNet.

A task turns a batch's members ("text", "cond.boxes", ...) into a Conditioning: context tokens for the cross-attention,
channels concatenated to the noisy latent, a vector added to the timestep embedding, or several of them. It is an
nn.Module, so it may have parameters (class tokens, a layout transformer). These are part of the Denoiser, the one
module that the engine, the optimizer, EMA and checkpoints see. A new task is a class, its line in TASKS, and its facts
in pipeline/config/tasks.py.
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
    """The task of a configuration. The other arguments describe the cache: latent_shape (C, h, w); its encoded empty
    caption; trimmed: whether it lacks the text states after a caption's end token."""
    return TASKS[config.name](latent_shape, empty_LD, trimmed)
