"""The interface of a task, which conditions the UNet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline import philox
from pipeline.config import ModelConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.diffusion.conditioning import Conditioning
from pipeline.philox import Stream

SEED = 0x7461736B
"""Distinguishes the initial weights of a task from those of the UNet of the same seed."""


@dataclass(frozen=True)
class Visit:
    """What a batch is prepared for: the arguments of `Task.prepare`."""

    seed: int
    numbers_B: Tensor
    sides: tuple[int, int] | None
    training: bool


class Task(nn.Module, ABC):
    """One way to condition the UNet; its parameters, if any, are trained with it.

    A batch holds arrays of records as tensors (B, ...) by name, as stored. Dropping replaces rows of this input by
    those of `null`, so a learned null is read inside of the module's forward, where ZeRO-3 has its weights.
    """

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        """cache: facts of the cache that it is trained on. empty_LD: the cache's encoded empty caption."""
        super().__init__()
        self.extra_channels = config.channels(cache)
        """Channels that are concatenated to the noisy latent."""
        self.members = config.members
        """Arrays of a record that `forward` reads."""

    def forward(self, batch: Mapping[str, Tensor], drop_B: Tensor | None = None) -> Conditioning:
        """The conditioning of a batch. drop_B (B,) bool: rows that get the null conditioning."""
        return self.condition(batch if drop_B is None else replaced(batch, self.null(batch), drop_B))

    @abstractmethod
    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of a batch, from its members by name."""

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch that says nothing, of the same sizes: for dropped rows, and for the second half of guidance. What
        is concatenated and cannot be missing stays."""
        return dict(batch)

    def prepare(
        self,
        batch: Mapping[str, Tensor],
        seed: int,
        numbers_B: Tensor,
        *,
        sides: tuple[int, int] | None = None,
        training: bool = True,
    ) -> dict[str, Tensor]:
        """The batch with what is drawn for each sample number (B,) int64: which stored variant it sees, and noise on a
        condition. sides: (h, w) of its latents; None = the cache's. training: False for pictures, where a level of
        noise is given and not drawn."""
        return {**batch, **self.drawn(batch, Visit(seed, numbers_B, sides, training))}

    def drawn(self, batch: Mapping[str, Tensor], visit: Visit) -> dict[str, Tensor]:
        """The members that `prepare` adds to a batch, or puts in place of its own."""
        return {}

    def reset_parameters(self, seed: int) -> None:
        """Initialize the task's parameters: layers uniform in +-1/sqrt(fan in), embeddings standard normal, norms the
        identity; one seed gives the same weights on every machine."""
        generator = torch.Generator().manual_seed(seed ^ SEED)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for parameter in module.parameters(recurse=False):
                    parameter.data.copy_(torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound))
            elif isinstance(module, nn.Embedding):
                module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()


def replaced(batch: Mapping[str, Tensor], null: Mapping[str, Tensor], drop_B: Tensor) -> dict[str, Tensor]:
    """The batch with rows of `null` where drop_B (B,) bool is True."""

    def rows(given: Tensor, nothing: Tensor) -> Tensor:
        return torch.where(drop_B.view(-1, *[1] * (given.ndim - 1)), nothing, given)

    return {name: given if null[name] is given else rows(given, null[name]) for name, given in batch.items()}


def pick_variant(array: Tensor, variants: int, seed: int, numbers_B: Tensor) -> Tensor:
    """One of the stored variants for each row: (B, K, ...) -> (B, ...); without an axis of variants the array itself.

    Variant floor(u K) with u of (seed, VARIANT, sample number): nothing is frozen, and every resume sees the same.
    """
    if variants == 1:
        return array
    chosen = philox.words(seed, Stream.VARIANT, numbers_B, 1)[:, 0] * variants >> 32
    return array[torch.arange(len(array), device=array.device), chosen.to(array.device)]
