"""What each task needs of a dataset and of the UNet, for code that must not import torch.

The tasks themselves, which condition the network, are modules by the same names (pipeline/models/tasks/). Code that
depends on the task asks this table and does not compare names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What one task needs."""

    name: str
    """The name in TaskConfig."""
    members: tuple[str, ...] = ()
    """Members of a cached record that the task reads besides the latent."""
    needs_text: bool = False
    """Whether the UNet cross-attends to encoded captions, so that sampling takes prompts."""
    extra_channels: int = 0
    """Channels that the task concatenates to the noisy latent."""


TASK_FACTS: dict[str, TaskFacts] = {
    "text": TaskFacts(name="text", members=("text",), needs_text=True),
    "unconditional": TaskFacts(name="unconditional"),
}
"""The facts of every task, by its name in TaskConfig."""
