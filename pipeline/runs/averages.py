"""Which weights of a run a verb takes: raw ones, its own average, another that it keeps, or one made from snapshots.

averages/checkpoints/000001000000/       a snapshot of the power-function averages, laid out as a checkpoint is
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.errors import RunError
from pipeline.log import log
from pipeline.runs.checkpoint import Commit, Reader, choose, load_weights, read_commit, verify
from pipeline.runs.directory import AVERAGES, committed
from pipeline.runs.profiles import Profile, coefficients, gamma_of, kind_of
from pipeline.storage.base import Storage

FARTHEST = 0.05
"""Relative L2 distance of a fitted profile from the wanted one, beyond which it is said."""


def label(weights: str, ema: float) -> str:
    """What cards and folders call the weights: raw, ema, or ema=0.1."""
    return f"ema={ema:g}" if ema else weights


def load_average(run: Storage, n: int = 0, weights: str = "ema", ema: float = 0.0) -> tuple[int, dict[str, Tensor]]:
    """(n, full fp32 weights by parameter name) of the checkpoint at n samples, 0 = the newest good one.

    weights: ema or raw. ema: 0, a half-life in samples that the run keeps, or a relative width. Every file is verified
    first. Raises RunError where there is no such checkpoint or average, CheckpointCorrupt.
    """
    if not ema:
        return load_weights(run, n, weights)
    commit = choose(run, n)
    kinds = Reader(run, commit).kinds()
    if (kind := kind_of(ema)) in kinds:
        return load_weights(run, commit.n, kind)
    kept = sorted(kind for kind in kinds if kind.startswith(("ema-", "power-")))
    powers = [float(kind.removeprefix("power-")) for kind in kept if kind.startswith("power-")]
    if ema >= 1 or not powers:
        there = ", ".join(kind.partition("-")[2] for kind in kept) or "none but its own"
        wanted = "ema.widths=[0.05,0.10] and ema.snapshots=" if ema < 1 else f"ema.half_lives=[{ema:g}]"
        raise RunError(f"ema={ema:g}: {run.url} keeps no such average (it has {there}); train with {wanted}")
    return commit.n, _fitted(run, commit, powers, ema)


def _fitted(run: Storage, newest: Commit, widths: list[float], wanted: float) -> dict[str, Tensor]:
    """The average of a wanted width at the newest commit, from that and the snapshots before it."""
    snapshots = run.child(AVERAGES)
    sources = [(run, newest)]
    sources += [(snapshots, read_commit(snapshots, n)) for n in committed(snapshots) if n < newest.n]
    for storage, commit in sources[1:]:
        verify(storage, commit)
    pieces = [(storage, commit, width) for storage, commit in sources for width in widths]
    profiles = [Profile(gamma_of(width), commit.n) for _, commit, width in pieces]
    shares, distance = coefficients(profiles, Profile(gamma_of(wanted), newest.n))
    if distance > FARTHEST:
        log.warning(
            f"ema={wanted:g}: {len(sources)} snapshots give a profile that is {distance:.1%} from the one "
            "that is asked for; a lower ema.snapshots keeps more of them",
        )
    sums = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in newest.shapes.items()}
    for (storage, commit, width), share in zip(pieces, shares.tolist(), strict=True):
        read = Reader(storage, commit)
        for name, total in sums.items():
            total += share * read(kind_of(width), name, 0, len(total)).double()
    return {name: total.float().view(newest.shapes[name]) for name, total in sums.items()}
