"""Which entries of a codebook are used, and the restart of those that no latent chooses any more.

A code without latents has no gradient, so it stays where it is while the latents move on (Dhariwal et al. 2020, section
3: restart). What the codebook as a whole is worth shows over many samples alone, since a batch has fewer latents than
there are codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipeline import philox
from pipeline.distributed.world import World
from pipeline.models.first_stage.codebook import Quantised, count, perplexity, usage
from pipeline.philox import Stream

CODES = 1 << 20
"""More than any codebook's entries: draws are numbered n x CODES + code."""
ENOUGH = 4
"""Latents per code from which on a codebook's use is judged."""
COLLAPSED = 0.05
"""Share of codes in use below which a codebook has collapsed."""


class Codes:
    """The use of `size` codes, on all ranks alike. restart: samples after which an unused code starts again; 0 = never.
    batch: samples of a global batch."""

    def __init__(self, size: int, restart: int, *, seed: int, batch: int, world: World) -> None:
        self.size, self.restart, self.seed, self.batch, self.world = size, restart, seed, batch, world
        self.warned = False
        self._collapsed = 0.0  # share of codes in use, where it is too small
        self._counts = torch.zeros(size, dtype=torch.int64, device=world.device)  # of this rank, since the last row
        self._used = torch.zeros(size, dtype=torch.int64)  # n after the last step in which each was chosen
        self._restarted = 0  # since the last row
        self._step: list[tuple[Tensor, Tensor]] = []  # latents (b, C, h, w) and indices of the step's micro-batches

    def begin(self) -> None:
        """A step begins; the one before may have been dropped."""
        self._step = []

    def see(self, quantised: Quantised) -> None:
        """What became of a micro-batch."""
        self._step.append((quantised.latents, quantised.indices))

    def stepped(self, n: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The optimizer has stepped, at n samples seen. numbers: (b,) this rank's samples on the CPU, in their order.

        Returns the codes (D,) int64 that start again, in ascending order, and their values (D, C) float32: of each a
        latent of the global batch that is drawn by n and the code. Collective.
        """
        chosen = count(torch.cat([indices.flatten() for _, indices in self._step]), self.size)
        self._counts += chosen
        dead = torch.zeros(0, dtype=torch.int64)
        if self.restart:
            self._used[self.world.added((chosen > 0).float()).cpu() > 0] = n
            dead = (n - self._used >= self.restart).nonzero().flatten()
            self._used[dead] = n
            self._restarted += len(dead)
        return dead, self._drawn(dead, n, numbers) if len(dead) else torch.zeros(0, 0)

    def _drawn(self, dead: Tensor, n: int, numbers: Tensor) -> Tensor:
        """Latents (D, C) of the global batch, one for each code. Each comes from the rank that has its sample."""
        latents = torch.cat([latents for latents, _ in self._step]).flatten(2)  # (b, C, positions)
        draws = philox.uniform(self.seed, Stream.CODE, n * CODES + dead, 2)
        sample = n - self.batch + (draws[:, 0] * self.batch).long()
        place = (draws[:, 1] * latents.shape[2]).long().to(latents.device)
        values = latents.new_zeros(len(dead), latents.shape[1], dtype=torch.float32)
        mine, row = (sample[:, None] == numbers[None]).nonzero(as_tuple=True)
        mine, row = mine.to(latents.device), row.to(latents.device)
        values[mine] = latents[row, :, place[mine]].float()
        return self.world.added(values)  # one rank's values and zeros: exact

    def row(self) -> dict[str, float]:
        """codes_used, a share, and perplexity of the samples since the last call; codes_restarted, a number.
        Collective."""
        counts = self.world.added(self._counts.clone()).cpu()
        self._counts.zero_()
        if not int(counts.sum()):
            return {}
        used = usage(counts)
        if int(counts.sum()) >= ENOUGH * self.size:
            self._collapsed = used if used < COLLAPSED else 0.0
        restarted, self._restarted = self._restarted, 0
        figures = {"codes_used": used, "perplexity": perplexity(counts)}
        return figures | ({"codes_restarted": float(restarted)} if self.restart else {})

    def warning(self, learning: bool) -> str:
        """What to do about a codebook that has collapsed, said once; "" for nothing. learning: whether the learning
        rate has risen to its peak, before which a codebook may still spread."""
        if self.warned or not learning or not self._collapsed:
            return ""
        self.warned = True
        remedy = (
            f"loss.restart={self.restart} does not help: lower optim.lr, or take fewer autoencoder.codes"
            if self.restart
            else "give loss.restart, the samples after which an unused code starts again, lower optim.lr, or take "
            "fewer autoencoder.codes"
        )
        return f"{self._collapsed:.1%} of {self.size:,} codes are in use: the codebook collapses; {remedy}"

    def state(self) -> dict[str, Any]:
        """Plain data, of which a resumed run decides as an undisturbed one does."""
        return {"used": self._used.tolist() if self.restart else [], "warned": self.warned}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from such data."""
        self.warned = bool(state.get("warned", False))
        if used := state.get("used"):
            self._used = torch.tensor(used, dtype=torch.int64)


def stretches(codes: Tensor) -> Iterator[tuple[int, int]]:
    """(first place, past the last) in `codes` (D,), ascending, of each stretch of consecutive numbers."""
    breaks = ((codes[1:] - codes[:-1]) > 1).nonzero().flatten().add(1).tolist()
    edges = [0, *breaks, len(codes)]
    yield from (pair for pair in pairwise(edges) if pair[0] < pair[1])
