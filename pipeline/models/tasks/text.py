"""The task of text-to-image: captions condition the UNet by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.tasks.task import Task


class Text(Task):
    """The caption's encoded tokens (B, L, D) are the context; the null context is the cache's encoded empty caption.

    trimmed: the cache holds only the states up to each caption's end token. Rows of zeros stand for the others and are
    not attended to (Stable Diffusion attends to all). Without it, an optional member "text_mask" (B, L) bool may give
    the tokens to attend to.
    """

    members = ("text",)
    empty: Tensor

    def __init__(self, latent_shape: tuple[int, int, int], empty_LD: Tensor | None, trimmed: bool = False) -> None:
        super().__init__()
        self.trimmed = trimmed
        if empty_LD is None:
            raise ConfigError("task=text needs the cache's encoded empty caption (uncond.npy), which it does not have")
        self.register_buffer("empty", empty_LD.float(), persistent=False)  # part of the cache, not of the model

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        context = batch["text"]
        if context.shape[1:] != self.empty.shape:
            raise ShapeError(
                f"text of shape {tuple(context.shape[1:])} (L, D), but this model's cache has {tuple(self.empty.shape)}"
            )
        return Conditioning(context=context, context_mask=self._mask(context, batch.get("text_mask")))

    def null(self, batch_size: int, device: torch.device | str) -> Conditioning:
        context = self.empty.to(device).expand(batch_size, -1, -1)
        return Conditioning(context=context, context_mask=self._mask(context, None))

    def _mask(self, context_BLD: Tensor, mask_BL: Tensor | None) -> Tensor | None:
        """The tokens (B, L) bool to attend to; None = all. Zeros mark absent states: after the tower's final norm, no
        state is all zeros."""
        return (context_BLD != 0).any(dim=-1) if self.trimmed else mask_BL
