"""The captions of requests: text states, or token ids, as the run's cache holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config import SampleConfig
from pipeline.config.tasks.base import TaskConfig
from pipeline.data.format.contract import Contract
from pipeline.inference.trained import encode_captions
from pipeline.log import log
from pipeline.models.encoders.text import TextTower

CAPTIONS = 64
"""Captions that the text tower reads at once."""


class Captions:
    """The captions of all rows, the negative prompt and the empty caption, encoded once, where the task reads text.

    empty: (L, D) float32, the encoded empty caption; None for a task that reads no text states.
    """

    def __init__(
        self,
        config: SampleConfig,
        task: TaskConfig,
        contract: Contract,
        tower: TextTower | None,
        device: torch.device,
    ) -> None:
        """tower: None only for a cache without captions. device: where the members of batches are to be."""
        self.member = next((name for name in task.members if name in ("text", "tokens")), None)
        self.empty: Tensor | None = None
        self.given = bool(config.negative)
        if self.member is None:
            return
        assert tower is not None, "a run of this task was trained on a cache with captions"
        prompts = list(config.prompt) or [""]
        warn_of_long([*prompts, config.negative], tower)
        captions = [*prompts, config.negative, ""]
        encoded = tower.tokenize(captions) if self.member == "tokens" else states_of(captions, tower, contract)
        self.encoded = encoded.to(device)
        self.empty = self.encoded[-1] if self.member == "text" else None
        self.prompts = len(prompts)

    def of(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The member of a batch whose rows are these of the picture; one caption serves all of them."""
        if self.member is None:
            return {}
        return {self.member: self.encoded[[row if self.prompts > 1 else 0 for row in rows]]}

    def negative(self, count: int) -> dict[str, Tensor]:
        """The member, with `count` times the negative prompt; empty where there is none."""
        if self.member is None or not self.given:
            return {}
        return {self.member: self.encoded[[self.prompts] * count]}


def states_of(captions: Sequence[str], tower: TextTower, contract: Contract) -> Tensor:
    """Text states (N, L, D) float32 of captions, on the tower's device, rounded through float16 as a cache's are."""
    return torch.cat(
        [
            encode_captions(tower, list(captions[start : start + CAPTIONS]), trimmed=contract.trimmed)
            for start in range(0, len(captions), CAPTIONS)
        ]
    )


def warn_of_long(prompts: Sequence[str], tower: TextTower) -> None:
    """Warn of captions that are longer than the context, whose end is not read, as in training and in diffusers."""
    for prompt in prompts:
        tokens = tower.ids(prompt)[1]
        if tokens > tower.length:
            excerpt = f"{prompt[:40]}..." if len(prompt) > 43 else prompt
            log.warning(
                f"the caption {excerpt!r} has {tokens} tokens with start and end, and the model reads "
                f"{tower.length}: its last {tokens - tower.length} are left out",
            )
