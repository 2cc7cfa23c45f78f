"""What every task says of itself without PyTorch: what is trained, what it reads, and how it enters the UNet."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Protocol

from pipeline.conditions.facts import Conditions
from pipeline.config.model import ModelConfig
from pipeline.config.values.bounds import Between


class CacheText(Protocol):
    """Facts of a cache's captions (data/format/contract.py, TextFacts)."""

    @property
    def storage(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def eot(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


class Cache(Protocol):
    """Facts of a cache that a task depends on (data/format/contract.py, Contract)."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def downsampling(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def shift(self) -> float: ...
    @property
    def conditions(self) -> Conditions: ...
    @property
    def text(self) -> CacheText | None: ...
    @property
    def trimmed(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Conditioning of the UNet, or a classifier in its place (conf/task/*.yaml); the keys besides these depend on the
    task."""

    name: str = "text"
    """The task."""
    drop: Annotated[float, Between(0, 1)] = 0.0
    """Probability that training replaces a sample's conditioning with the null conditioning, as classifier-free
    guidance needs (Ho & Salimans)."""

    @classmethod
    def kinds(cls) -> dict[str, type[TaskConfig]]:
        """The dataclass of each task, by the name that chooses it."""
        table = importlib.import_module("pipeline.config.tasks.table")  # which is made of these dataclasses
        return {name: basics.config for name, basics in table.all_tasks().items()}

    @property
    def members(self) -> tuple[str, ...]:
        """Arrays of a cached record that the task reads besides the image's."""
        return ()

    @property
    def conditions(self) -> tuple[str, ...]:
        """What `encode conditions=` must name for it."""
        return ()

    @property
    def draws(self) -> bool:
        """Whether what is trained draws pictures: a denoiser."""
        return True

    @property
    def takes_text(self) -> bool:
        """Whether it reads captions."""
        return bool({"text", "tokens"} & set(self.members))

    @property
    def droppable(self) -> bool:
        """Whether there is a null conditioning, so that guidance is possible."""
        return True

    @property
    def makes_context(self) -> bool:
        """Whether it gives the UNet tokens to attend to (model.context_width above 0)."""
        return False

    @property
    def makes_vector(self) -> bool:
        """Whether it gives the UNet a vector beside the timestep (model.vector_width above 0)."""
        return False

    @property
    def augmented(self) -> bool:
        """Whether it was trained with levels of noise on its condition, so that `sample noise=` can give one."""
        return False

    @property
    def may_begin(self) -> bool:
        """Whether sampling may begin from an image, as `sample strength=` asks: not where images are made of smaller
        ones, which image= then names."""
        return True

    def channels(self, cache: Cache) -> int:
        """Channels that it concatenates to the noisy latent."""
        return 0

    def tokens(self, cache: Cache) -> int:
        """Tokens that the UNet attends to, for one image."""
        return cache.text.length if self.takes_text and cache.text is not None else 0

    def misfits(self, model: ModelConfig) -> list[str]:
        """Contradictions between the task's own keys, or between them and the model's; one line each."""
        return []

    def lacking(self, cache: Cache) -> list[str]:
        """Facts of a cache that the task cannot use, besides missing arrays; one line each, which goes on after the
        cache's name."""
        return []
