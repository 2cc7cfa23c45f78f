"""What a task feeds the UNet, and the denoiser that is trained: UNet and task in one module.

A task turns a batch's members ("text", "cond.boxes", ...) into a Conditioning: context tokens for the cross-attention,
channels concatenated to the noisy latent, a vector added to the timestep embedding, or several of them. It is an
nn.Module, so a task may learn (class tokens, a layout transformer): its parameters are part of the Denoiser, which is
the one module that the engine, the optimizer, EMA and checkpoints see. A new task is a class and its line in TASKS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig, TaskConfig
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.layers import Known
from pipeline.models.unet import UNet


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is given beside the noisy latent; None = the model has no such input. Rows are samples."""

    context: Tensor | None = None  # (B, L, D) tokens
    context_mask: Tensor | None = None  # (B, L) bool, True where a token may be attended to; None = everywhere
    concat: Tensor | None = None  # (B, C, h, w) channels after the latent's
    vector: Tensor | None = None  # (B, V)
    known: Known | None = None  # of sampling alone: what the UNet has computed of the context before (UNet.forward)

    def where(self, mask_B: Tensor, other: Conditioning) -> Conditioning:
        """The rows of `other` where mask_B (B,) bool is True, and this one's elsewhere."""
        return self._with(
            other, lambda mine, theirs: torch.where(mask_B.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)
        )

    def cat(self, other: Conditioning) -> Conditioning:
        """The rows of both, this one's first."""
        return self._with(other, lambda mine, theirs: torch.cat([mine, theirs]))

    def rows(self, rows: slice) -> Conditioning:
        """Some of the rows."""
        fields = (self.context, self.context_mask, self.concat, self.vector)
        context, mask, concat, vector = (None if field is None else field[rows] for field in fields)
        return Conditioning(context, mask, concat, vector)

    def _with(self, other: Conditioning, combine: Callable[[Tensor, Tensor], Tensor]) -> Conditioning:
        """Field by field; `other` takes this one's dtype and device."""

        def both(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            assert (mine is None) == (theirs is None), "conditionings of different tasks"
            return None if mine is None or theirs is None else combine(mine, theirs.to(mine))

        masks = [self.context_mask, other.context_mask]
        if any(mask is not None for mask in masks):
            masks = [_full_mask(one.context) if one.context_mask is None else one.context_mask for one in (self, other)]
        return Conditioning(
            both(self.context, other.context),
            both(*masks),
            both(self.concat, other.concat),
            both(self.vector, other.vector),
        )


def _full_mask(context_BLD: Tensor | None) -> Tensor:
    assert context_BLD is not None, "a context mask without a context"
    return torch.ones(context_BLD.shape[:2], dtype=torch.bool, device=context_BLD.device)


class Task(nn.Module, ABC):
    """One way to condition the UNet; its parameters, if any, train with it.

    Built by make_task from the run's TaskConfig, the cache's latent shape and its encoded empty caption.
    """

    members: tuple[str, ...] = ()
    """Members of a cached record that `condition` reads."""

    def in_channels(self, latent_channels: int) -> int:
        """Channels of the UNet's input: the latent's and those that the task concatenates."""
        return latent_channels

    @abstractmethod
    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of a batch's rows, from the batch's members by name."""

    @abstractmethod
    def null(self, batch_size: int, device: torch.device | str) -> Conditioning:
        """The conditioning that says nothing: of dropped rows in training, and of guidance's second pass."""

    def drop(self, conditioning: Conditioning, mask_B: Tensor) -> Conditioning:
        """The rows where mask_B (B,) bool is True become null ones."""
        return conditioning.where(mask_B, self.null(len(mask_B), mask_B.device))

    def reset_parameters(self, seed: int) -> None:
        """Initial values of what the task learns; nothing by default."""


class Unconditional(Task):
    """No conditioning at all."""

    def __init__(self, latent_shape: tuple[int, int, int], empty_LD: Tensor | None, trimmed: bool = False) -> None:
        super().__init__()

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        return Conditioning()

    def null(self, batch_size: int, device: torch.device | str) -> Conditioning:
        return Conditioning()


class Text(Task):
    """The caption's encoded tokens (B, L, D) as context; null is the cache's encoded empty caption.

    trimmed: the cache holds the states up to each caption's end token alone; rows of zeros stand for the others and are
    not attended to (Stable Diffusion attends to all). An optional member "text_mask" (B, L) bool says the same.
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

    def _mask(self, context_BLD: Tensor, given_BL: Tensor | None) -> Tensor | None:
        """A state after the tower's final norm is never all zeros."""
        return (context_BLD != 0).any(dim=-1) if self.trimmed else given_BL


TASKS: dict[str, type[Unconditional] | type[Text]] = {"text": Text, "unconditional": Unconditional}


def make_task(
    config: TaskConfig, latent_shape: tuple[int, int, int], empty_LD: Tensor | None, *, trimmed: bool = False
) -> Task:
    """The task of a configuration. latent_shape (C, h, w), the encoded empty caption, and whether text states beyond a
    caption's end are missing are the cache's."""
    return TASKS[config.name](latent_shape, empty_LD, trimmed)


class Denoiser(nn.Module):
    """UNet and task: the one module that is trained, averaged and saved (`unet.*` and `task.*` in its state dict)."""

    def __init__(self, config: ModelConfig, task: Task) -> None:
        super().__init__()
        self.unet = UNet(config, in_channels=task.in_channels(config.in_channels))
        self.task = task

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        inputs: Mapping[str, Tensor] | Conditioning,
        drop_B: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction (B, C, H, W) for the noisy latent x.

        inputs: the batch's members in training, so that what the task learns gets its gradients here; or a Conditioning
        made once, as samplers do. drop_B (B,) bool: rows whose conditioning is replaced by the null one.
        """
        given = inputs if isinstance(inputs, Conditioning) else self.task.condition(inputs)
        if drop_B is not None:
            given = self.task.drop(given, drop_B)
        if given.concat is not None:
            x_BCHW = torch.cat([x_BCHW, given.concat.to(x_BCHW)], dim=1)
        return self.unet(x_BCHW, timestep_B, given.context, given.context_mask, given.vector, given.known)

    def reset_parameters(self, seed: int) -> None:
        """Initial weights of UNet and task, the same on every machine for one seed."""
        self.unet.reset_parameters(seed)
        self.task.reset_parameters(seed)
