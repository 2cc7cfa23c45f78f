"""Encoded captions as a context, for every task that reads text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.config.tasks.kinds import CaptionedTask
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.tasks.task import Task


class Captions(nn.Module):
    """The caption's encoded tokens (B, L, D) are the context; the null context is the cache's encoded empty caption.

    A trimmed cache holds only the states up to each caption's end token. Rows of zeros stand for the others and are not
    attended to (Stable Diffusion attends to all). Otherwise an optional member "text_mask" (B, L) bool may give the
    tokens to attend to.
    """

    empty: Tensor

    def __init__(self, cache: Cache, empty_LD: Tensor | None, name: str) -> None:
        """name: of the task, for the error."""
        super().__init__()
        self.trimmed = cache.trimmed
        if empty_LD is None:
            raise ConfigError(f"{name} needs the cache's encoded empty caption (uncond.npy), which it does not have")
        self.register_buffer("empty", empty_LD.float(), persistent=False)  # part of the cache, not of the model

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The context (B, L, D), and which tokens (B, L) bool to attend to; None = all. Raises ShapeError."""
        context = batch["text"]
        if context.shape[1:] != self.empty.shape:
            raise ShapeError(
                f"text of shape {tuple(context.shape[1:])} (L, D), but this model's cache has {tuple(self.empty.shape)}"
            )
        # Zeros mark absent states: after the tower's final norm, no state is all zeros.
        return context, (context != 0).any(dim=-1) if self.trimmed else batch.get("text_mask")

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with empty captions."""
        text = batch["text"]
        nothing = {"text": self.empty.to(text).expand(len(text), -1, -1)}
        if "text_mask" in batch:
            nothing["text_mask"] = torch.ones_like(batch["text_mask"])
        return {**batch, **nothing}


class Captioned(Task):
    """A task that reads captions beside its own condition where it is asked to (task.text=true): they alone are
    dropped."""

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        assert isinstance(config, CaptionedTask), config
        self.captions = Captions(cache, empty_LD, "task.text=true") if config.text else None

    def context(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What `Captions` gives, or two None where no captions are read."""
        return (None, None) if self.captions is None else self.captions(batch)

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().null(batch) if self.captions is None else self.captions.null(batch)


def beside(
    context: Tensor, mask: Tensor | None, text: Tensor, text_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A context and a mask, then those of captions behind them."""
    joined = torch.cat([context, text.to(context)], dim=1)
    if mask is None and text_mask is None:
        return joined, None
    parts = [
        part if part is not None else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        for part, tokens in ((mask, context), (text_mask, text))
    ]
    return joined, torch.cat(parts, dim=1)
