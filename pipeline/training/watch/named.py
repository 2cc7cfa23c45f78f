"""Samples that stop a run or a step, by number and record, and the errors that name them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.data.reading.batch import Batch
from pipeline.distributed.world import World
from pipeline.errors import LossSpike, NonFinite

NAMED = 8
"""Samples that are named, at most."""


def largest_losses(world: World, batch: Batch, loss_B: Tensor) -> str:
    """The samples of a global batch with the largest losses, as "195 (record 000095) 27.5, ...". Collective."""
    mine = sorted(zip(loss_B.tolist(), batch.numbers.tolist(), batch.keys, strict=True), reverse=True)[:NAMED]
    worst = sorted((one for found in world.gather(mine) for one in found), reverse=True)[:NAMED]
    return ", ".join(f"{number} (record {key}) {loss:.4g}" for loss, number, key in worst)


def not_finite_samples(world: World, batch: Batch, latents: Tensor, loss_B: Tensor) -> list[str]:
    """A line for each latent or loss of a global batch that is NaN or infinite. Collective."""
    kinds = (("latent", latents.flatten(1).isfinite().all(dim=1)), ("loss", loss_B.isfinite()))
    mine = [
        f"sample {number} (record {key}, rank {world.rank}): {what} is not finite"
        for what, fine in kinds
        for number, key, ok in zip(batch.numbers.tolist(), batch.keys, fine.tolist(), strict=True)
        if not ok
    ]
    return [line for lines in world.gather(mine) for line in lines]


def not_finite(first: int, last: int, found: Sequence[str], commit: str) -> NonFinite:
    """The error for a gradient that is not finite. found: of not_finite_samples. commit: what is the last."""
    where = "; ".join(found[:NAMED]) or "every latent and loss is finite, so the backward pass overflowed"
    return NonFinite(
        f"the gradient of samples {first} to {last} is not finite: {where}. The optimizer has not stepped ({commit}); "
        "check the cache (latentmill verify), or lower optim.lr"
    )


def spike(what: str, row: int, commit: str) -> LossSpike:
    """The error for a jump at which the run is to stop. what: that names samples and figures. row: jumps in a row."""
    often = f"; {row} times in a row" if row > 1 else ""
    return LossSpike(
        f"{what}{often}. The optimizer has not stepped ({commit}); look at these samples and at optim.lr, or set "
        "guard.action=skip (guard.most for more in a row)"
    )
