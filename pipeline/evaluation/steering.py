"""What an evaluation gives its images besides their conditioning: the interface, and several together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.diffusion.hooks import Hooks
from pipeline.evaluation.judging import Judging, Rows
from pipeline.evaluation.tasks.judge import Given, Judge
from pipeline.inference.steering.per_batch import joined


class RecordSteering(ABC):
    """Makes the hooks of one batch after another. An image's hooks are a function of its number alone, whatever batch
    it is in."""

    judge: Judge | None = None
    """What measures its pictures besides the task's judge; None for nothing."""
    gradients = False
    """Whether its hooks follow gradients, so that the denoiser's weights must not be packed."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """The keys of `latentmill eval` that it was asked by, and hashes of what it reads, for the card. Texts,
        numbers, yes or no, or lists of these, as JSON has them."""

    @abstractmethod
    def hooks(self, numbers: Sequence[int], given: Given) -> Hooks:
        """The hooks of images `numbers` (B). given: what its judge sees of them; where it has none, what the task's
        judge sees."""

    def finish(self, drawn: np.ndarray, given: Given) -> np.ndarray:
        """The pictures that the task's judge sees and a user gets: those that were drawn, (B, H, W, 3) uint8, after
        what belongs to it."""
        return drawn

    def words(self, given: Given, i: int) -> str:
        """What it gave image i of the batch, in words; "" for nothing that can be said."""
        return ""

    def show(self, given: Given, i: int) -> np.ndarray | None:
        """The same as a picture (H, W, 3) uint8 of the images' size; None where that is no picture."""
        return None


class Together:
    """Everything that steers the images of an evaluation, in order. judging: makes what a judge needs."""

    def __init__(self, steering: Sequence[RecordSteering], judging: Callable[[Judge], Judging]) -> None:
        self._all = tuple(steering)
        self._judging = [None if one.judge is None else judging(one.judge) for one in self._all]
        self.facts = {name: fact for one in self._all for name, fact in one.facts.items()}

    def given(self, numbers: Sequence[int], given: Given, images: int) -> list[Given]:
        """What each of them is given of images `numbers` of an evaluation of `images`. given: what the task's judge
        sees."""
        return [given if judging is None else judging.given(numbers, images) for judging in self._judging]

    def hooks(self, numbers: Sequence[int], given: Sequence[Given]) -> Hooks:
        """The hooks of all of them. given: as `given` says."""
        return joined(one.hooks(numbers, own) for one, own in zip(self._all, given, strict=True))

    def described(
        self, given: Sequence[Given], i: int, words: str, shown: np.ndarray | None
    ) -> tuple[str, np.ndarray | None]:
        """What image i of the batch was given, in words and as a picture: what the task says, and what each of them
        says beside it; as a picture the first that there is."""
        said = [words]
        for one, own in zip(self._all, given, strict=True):
            said.append(one.words(own, i))
            shown = one.show(own, i) if shown is None else shown
        return ", ".join(dict.fromkeys(filter(None, said))), shown

    def rows(self) -> list[Rows]:
        """Nothing counted by the judge of each."""
        return [Rows() for _ in self._all]

    def finish(
        self, rows: Sequence[Rows], numbers: Sequence[int], drawn: np.ndarray, given: Sequence[Given], images: int
    ) -> np.ndarray:
        """Let the judge of each add to its rows what it counts of pictures (B, H, W, 3) uint8, and then finish them.
        Returns the pictures that the task's judge is to see."""
        for one, judging, counted, own in zip(self._all, self._judging, rows, given, strict=True):
            if judging is not None:
                judging.add(counted, numbers, drawn, own, images)
            drawn = one.finish(drawn, own)
        return drawn

    def figures(self, parts: Sequence[Sequence[Rows]]) -> dict[str, Any]:
        """The figures of their judges, from the rows of all ranks."""
        metrics: dict[str, Any] = {}
        for judging, of_ranks in zip(self._judging, zip(*parts, strict=True), strict=True):
            if judging is not None:
                rows = Rows()
                for counted in of_ranks:
                    rows.merge(counted)
                metrics |= judging.figures(rows)
        return metrics
