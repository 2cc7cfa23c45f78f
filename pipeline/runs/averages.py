"""Loads the weights of a run that a verb asks for: raw, the run's own average, another stored one, or a fitted one. No
other values of a checkpoint are read.

averages/checkpoints/000001000000/       a snapshot of the power-function averages, laid out as a checkpoint is
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import RunError
from pipeline.log import log
from pipeline.runs.checkpoint import (
    Commit,
    Reader,
    load_weights,
    proving_reader,
    read_commit,
    read_good,
    require_values,
    weights_of,
)
from pipeline.runs.directory import AVERAGES, committed
from pipeline.runs.profiles import Profile, coefficients, gamma_of, kind_of
from pipeline.storage.base import Storage

WARNING_DISTANCE = 0.05
"""A warning is logged when the relative L2 distance of a fitted profile from its target is larger."""


def label(weights: str, ema: float) -> str:
    """The name of the weights in cards and folders: raw, ema, or ema=0.1."""
    return f"ema={ema:g}" if ema else weights


def load_average(
    run: Storage, n: int = 0, weights: str = "ema", ema: float = 0.0, prefixes: tuple[str, ...] = ("",)
) -> tuple[int, dict[str, Tensor]]:
    """(n, full fp32 weights by parameter name) of the checkpoint at n samples, 0 = the newest that has them whole.

    weights: ema or raw. ema: 0 for none, or another average instead: a half-life in samples that the run keeps, or a
    relative width. prefixes: of the names that are wanted, where averages are not of all parameters. What is read is
    proved. Raises RunError when there is no such checkpoint or average, CheckpointCorrupt.
    """
    if not ema:
        return load_weights(run, n, weights, prefixes)

    def use(commit: Commit, read: Reader) -> tuple[int, dict[str, Tensor] | _Fit]:
        kinds = read.kinds()
        if (kind := kind_of(ema)) in kinds:
            return commit.n, weights_of(commit, read, kind, prefixes)
        fit = _Fit(run, commit, _widths(run, kinds, ema), ema, prefixes)
        fit.add(commit.n, read)
        return commit.n, fit

    n, found = read_good(run, n, use)
    return n, found.with_snapshots() if isinstance(found, _Fit) else found


def _widths(run: Storage, kinds: set[str], ema: float) -> list[float]:
    """The relative widths of the averages among these kinds. Raises RunError where `ema` cannot be fitted to any."""
    stored_kinds = sorted(kind for kind in kinds if kind.startswith(("ema-", "power-")))
    widths = [float(kind.removeprefix("power-")) for kind in stored_kinds if kind.startswith("power-")]
    if ema >= 1 or not widths:
        available = ", ".join(kind.partition("-")[2] for kind in stored_kinds) or "none but its own"
        keys = "ema.widths=[0.05,0.10] and ema.snapshots=" if ema < 1 else f"ema.half_lives=[{ema:g}]"
        raise RunError(f"ema={ema:g}: {run.url} keeps no such average (it has {available}); train with {keys}")
    return widths


class _Fit:
    """The average of a target width at the newest commit, as a linear combination of the averages in that commit and in
    the snapshots before it. widths: of the averages that each of them holds. prefixes: as in load_average."""

    def __init__(
        self, run: Storage, newest: Commit, widths: Sequence[float], target: float, prefixes: tuple[str, ...]
    ) -> None:
        self.newest, self.snapshots, self.widths = newest, run.child(AVERAGES), widths
        self.shapes = {name: shape for name, shape in newest.shapes.items() if name.startswith(prefixes)}
        self.sums = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in self.shapes.items()}
        self.earlier = [n for n in committed(self.snapshots) if n < newest.n]
        pieces = [(n, width) for n in (newest.n, *self.earlier) for width in widths]
        profiles = [Profile(gamma_of(width), n) for n, width in pieces]
        factors, distance = coefficients(profiles, Profile(gamma_of(target), newest.n))
        self.factors = dict(zip(pieces, factors.tolist(), strict=True))
        if distance > WARNING_DISTANCE:
            log.warning(
                f"ema={target:g}: {len(self.earlier) + 1} snapshots give a profile that is {distance:.1%} from the one "
                "that is asked for; a lower ema.snapshots keeps more of them",
            )

    def add(self, n: int, read: Reader) -> None:
        """Add the averages at n samples. Raises RunError where they are of other parameters, CheckpointCorrupt."""
        for width in self.widths:
            require_values(self.newest, read, kind_of(width), self.shapes)
            for name, total in self.sums.items():
                total += self.factors[n, width] * read(kind_of(width), name, 0, len(total)).double()

    def with_snapshots(self) -> dict[str, Tensor]:
        """The full fp32 average, once every snapshot is added. Raises CheckpointCorrupt, NotFound."""
        for n in self.earlier:
            self.add(n, proving_reader(self.snapshots, read_commit(self.snapshots, n)))
        return {name: total.float().view(self.shapes[name]) for name, total in self.sums.items()}
