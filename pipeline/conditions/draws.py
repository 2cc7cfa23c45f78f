"""Random draws of one condition of one record: a function of what is drawn, the record's key and the variant alone.

They are whole numbers from SHA-256, and sums, products and square roots of them, which IEEE 754 rounds in one way only:
no logarithm, no cosine, no sum whose order a processor chooses. So every machine draws the same arrays.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
WORDS = struct.Struct("<4Q")
"""The words of a digest."""
PAIRS, FOURS = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0001000100010001)
MEAN, VARIANCE = 8 * 255 / 2, 8 * (256**2 - 1) / 12
"""Of the sum of the 8 bytes of a word."""


class Draws:
    """A stream of draws.

    what: what is drawn, a word without blanks ("strokes"). key: the record's. variant: its number.
    """

    def __init__(self, what: str, key: str, variant: int = 0) -> None:
        self._text = f"{what} {key} {variant}".encode("utf-8", "surrogatepass")
        self._block = 0
        self._words: list[int] = []

    def word(self) -> int:
        """A whole number from 0 to below 2**64: the next 8 bytes of SHA-256 of the text and a counter."""
        if not self._words:
            digest = hashlib.sha256(self._text + b"\0" + self._block.to_bytes(8, "little")).digest()
            self._words = list(WORDS.unpack(digest))[::-1]
            self._block += 1
        return self._words.pop()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number from `low` to below `high`, in steps of 2**-53 of their distance."""
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included; uniform up to the rounding of a 64-bit integer."""
        return low + (self.word() * (high - low + 1) >> 64)

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """`count` such numbers."""
        return [self.integer(low, high) for _ in range(count)]

    def choice(self, choices: Sequence[T], weights: Sequence[int] | None = None) -> T:
        """One of `choices`, with equal chances or with chances in proportion to whole `weights`."""
        if weights is None:
            return choices[self.integer(0, len(choices) - 1)]
        place = self.integer(0, sum(weights) - 1)
        for one, weight in zip(choices, weights, strict=True):
            if place < weight:
                return one
            place -= weight
        raise AssertionError("weights are whole numbers, and one is above 0")

    def shuffle(self, items: Sequence[T]) -> list[T]:
        """The items in a drawn order (Fisher and Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.integer(0, last)
            order[last], order[other] = order[other], order[last]
        return order

    def direction(self) -> tuple[float, float]:
        """A unit vector (x, y), uniform over the circle: a point drawn inside of it, divided by its distance."""
        while True:
            x, y = self.uniform(-1, 1), self.uniform(-1, 1)
            if 1e-3 < (square := x * x + y * y) <= 1:
                return x / square**0.5, y / square**0.5

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of a shape, of mean 0 and variance 1 and nearly normal: each is the sum of the 8 bytes of a raw word
        of Philox (Salmon et al. 2011), so it lies within 4.9 standard deviations, in steps of 0.005."""
        key = self.word() | self.word() << 64
        words = np.random.Philox(key=key).random_raw(int(np.prod(shape)))
        fours = (words & PAIRS) + ((words >> np.uint64(8)) & PAIRS)
        sums = (fours * FOURS) >> np.uint64(48)
        return ((sums.astype(np.float32) - np.float32(MEAN)) * np.float32(VARIANCE**-0.5)).reshape(shape)
