"""Collects Python's garbage at the same steps on all ranks.

Left to itself, Python collects whenever enough objects were made since the last time, which is at another step on each
rank; all others then wait for that one. What is alive when steps begin is frozen, so that later collections, which look
at what was made since, are short. The weights and everything else that counts references is freed as ever.
"""

from __future__ import annotations

import gc


class Garbage:
    """every: steps between collections; 0 = Python collects as ever."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._held = False
        self._steps = 0

    def step(self) -> None:
        """A step begins. Freezes what is alive at the first, and after each release."""
        if not self.every:
            return
        if not self._held:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._held, self._steps = True, 0
            return
        self._steps += 1
        if self._steps % self.every == 0:
            gc.collect()

    def release(self) -> None:
        """Python collects as ever until the next step."""
        if self._held:
            gc.unfreeze()
            gc.enable()
            self._held = False
