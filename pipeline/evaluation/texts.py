"""The states of captions that a rank gives the images it draws.

States are large (118 KB a caption for Stable Diffusion 1), so no rank holds those of all captions. Those that a cache
stores are held for the rank's own images alone, and those that a text tower computes are made when a batch wants them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from pipeline.inference.trained import encode_captions
from pipeline.models.encoders.text import TextTower

ENCODED_TOGETHER = 64  # captions
MOST_KEPT = 1 << 28
"""Bytes of encoded captions that are kept for the next evaluation; further ones are encoded in each of them."""


class Texts(ABC):
    """Captions' states by record number."""

    @abstractmethod
    def states(self, index_B: np.ndarray) -> np.ndarray:
        """The states (B, L, D) float16 of the captions of records `index_B` (B,) int64."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of states that are held."""


class Stored(Texts):
    """States that a cache holds. numbers (K,): the records whose states are here, in increasing order. states_KLD: of
    them, (K, L, D) float16."""

    def __init__(self, numbers: Sequence[int], states_KLD: np.ndarray) -> None:
        assert len(numbers) == len(states_KLD)
        self._numbers, self._states = np.asarray(numbers, np.int64), states_KLD

    def states(self, index_B: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self._numbers, index_B).clip(max=len(self._numbers) - 1)
        assert (self._numbers[places] == index_B).all(), "images of another rank, or in other batches than were said"
        return self._states[places]

    @property
    def nbytes(self) -> int:
        return self._states.nbytes


class Encoded(Texts):
    """States that a text tower makes of captions, always in the same groups of ENCODED_TOGETHER, so that a caption's
    states do not depend on the batch. trimmed: as `encode_captions` has it. most_kept: bytes."""

    def __init__(
        self, tower: TextTower, captions: Sequence[str], *, trimmed: bool = False, most_kept: int = MOST_KEPT
    ) -> None:
        self._tower, self._captions, self._trimmed, self._most = tower, captions, trimmed, most_kept
        self._kept: dict[int, np.ndarray] = {}
        self._last: dict[int, np.ndarray] = {}  # of the batch before, which often shares a group with the next

    def states(self, index_B: np.ndarray) -> np.ndarray:
        groups = {group: self._group(group) for group in np.unique(index_B // ENCODED_TOGETHER).tolist()}
        self._last = groups
        rows = [groups[i // ENCODED_TOGETHER][i % ENCODED_TOGETHER] for i in index_B.tolist()]
        return np.stack(rows)

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for states in self._kept.values())

    def _group(self, group: int) -> np.ndarray:
        """The states of one group of captions, (ENCODED_TOGETHER or less, L, D) float16."""
        for known in (self._kept, self._last):
            if group in known:
                return known[group]
        first = group * ENCODED_TOGETHER
        captions = list(self._captions[first : first + ENCODED_TOGETHER])
        encoded = encode_captions(self._tower, captions, trimmed=self._trimmed)  # rounded to float16 already
        states: np.ndarray = encoded.half().cpu().numpy()
        if self.nbytes + states.nbytes <= self._most:
            self._kept[group] = states
        return states
