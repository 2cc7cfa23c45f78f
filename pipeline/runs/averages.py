"""Loads the weights of a run that a verb asks for: raw, the run's own average, another stored one, or a fitted one.

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

WARNING_DISTANCE = 0.05
"""A warning is logged when the relative L2 distance of a fitted profile from its target is larger."""


def label(weights: str, ema: float) -> str:
    """The name of the weights in cards and folders: raw, ema, or ema=0.1."""
    return f"ema={ema:g}" if ema else weights


def load_average(
    run: Storage, n: int = 0, weights: str = "ema", ema: float = 0.0, prefixes: tuple[str, ...] = ("",)
) -> tuple[int, dict[str, Tensor]]:
    """(n, full fp32 weights by parameter name) of the checkpoint at n samples, 0 = the newest good one.

    weights: ema or raw. ema: 0 for none, or another average instead: a half-life in samples that the run keeps, or a
    relative width. prefixes: of the names that are wanted, where averages are not of all parameters. Every file is
    verified first. Raises RunError when there is no such checkpoint or average, CheckpointCorrupt.
    """
    if not ema:
        return load_weights(run, n, weights, prefixes)
    commit = choose(run, n)
    kinds = Reader(run, commit).kinds()
    if (kind := kind_of(ema)) in kinds:
        return load_weights(run, commit.n, kind, prefixes)
    stored_kinds = sorted(kind for kind in kinds if kind.startswith(("ema-", "power-")))
    widths = [float(kind.removeprefix("power-")) for kind in stored_kinds if kind.startswith("power-")]
    if ema >= 1 or not widths:
        available = ", ".join(kind.partition("-")[2] for kind in stored_kinds) or "none but its own"
        keys = "ema.widths=[0.05,0.10] and ema.snapshots=" if ema < 1 else f"ema.half_lives=[{ema:g}]"
        raise RunError(f"ema={ema:g}: {run.url} keeps no such average (it has {available}); train with {keys}")
    return commit.n, _fit_average(run, commit, widths, ema, prefixes)


def _fit_average(
    run: Storage, newest: Commit, widths: list[float], target_width: float, prefixes: tuple[str, ...]
) -> dict[str, Tensor]:
    """The average of the target width at the newest commit, as a linear combination of the averages in that commit and
    in the snapshots before it. widths: of the averages that each of them holds. prefixes: as in load_average."""
    snapshots = run.child(AVERAGES)
    sources = [(run, newest)]
    sources += [(snapshots, read_commit(snapshots, n)) for n in committed(snapshots) if n < newest.n]
    for storage, commit in sources[1:]:
        verify(storage, commit)
    pieces = [(storage, commit, width) for storage, commit in sources for width in widths]
    profiles = [Profile(gamma_of(width), commit.n) for _, commit, width in pieces]
    factors, distance = coefficients(profiles, Profile(gamma_of(target_width), newest.n))
    if distance > WARNING_DISTANCE:
        log.warning(
            f"ema={target_width:g}: {len(sources)} snapshots give a profile that is {distance:.1%} from the one "
            "that is asked for; a lower ema.snapshots keeps more of them",
        )
    wanted = {name: shape for name, shape in newest.shapes.items() if name.startswith(prefixes)}
    sums = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in wanted.items()}
    for (storage, commit, width), factor in zip(pieces, factors.tolist(), strict=True):
        read = Reader(storage, commit)
        for name, total in sums.items():
            total += factor * read(kind_of(width), name, 0, len(total)).double()
    return {name: total.float().view(wanted[name]) for name, total in sums.items()}
