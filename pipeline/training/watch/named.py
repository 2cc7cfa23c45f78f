"""Names the samples that stop a run or a step, by number and record, and builds the errors about them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.data.reading.batch import Batch
from pipeline.distributed.world import World
from pipeline.errors import LossSpike, NonFinite

MOST_NAMED = 8
"""The most samples that an error names."""


def largest_losses(world: World, batch: Batch, loss_B: Tensor) -> str:
    """The samples of a global batch with the largest losses, as "195 (record 000095) 27.5, ...". Collective."""
    local = sorted(zip(loss_B.tolist(), batch.numbers.tolist(), batch.keys, strict=True), reverse=True)[:MOST_NAMED]
    largest = sorted((sample for samples in world.gather(local) for sample in samples), reverse=True)[:MOST_NAMED]
    return ", ".join(f"{number} (record {key}) {loss:.4g}" for loss, number, key in largest)


def not_finite_samples(world: World, batch: Batch, images: Tensor, loss_B: Tensor, what: str = "latent") -> list[str]:
    """A line for each image or loss of a global batch that is NaN or infinite. what: what an image is. Collective."""
    finite_by_kind = ((what, images.flatten(1).isfinite().all(dim=1)), ("loss", loss_B.isfinite()))
    local = [
        f"sample {number} (record {key}, rank {world.rank}): {kind} is not finite"
        for kind, finite_B in finite_by_kind
        for number, key, finite in zip(batch.numbers.tolist(), batch.keys, finite_B.tolist(), strict=True)
        if not finite
    ]
    return [line for lines in world.gather(local) for line in lines]


def not_finite(
    first: int, last: int, samples: Sequence[str], commit: str, what: str = "latent", part: str = ""
) -> NonFinite:
    """The error for a gradient of samples first to last that is not finite. samples: from not_finite_samples. commit:
    the newest commit, in words. what: what an image is. part: whose gradient it is, "" of all there is."""
    where = "; ".join(samples[:MOST_NAMED]) or f"every {what} and loss is finite, so the backward pass overflowed"
    whose = f"{part}'s " if part else ""
    return NonFinite(
        f"the {whose}gradient of samples {first} to {last} is not finite: {where}. The optimizer has not stepped "
        f"({commit}); check the cache (latentmill verify), or lower optim.lr"
    )


def spike(what: str, row: int, commit: str) -> LossSpike:
    """The error for a jump that stops the run. what: the samples and figures, in words. row: number of jumps in a row.
    commit: the newest commit, in words."""
    repeated = f"; {row} times in a row" if row > 1 else ""
    return LossSpike(
        f"{what}{repeated}. The optimizer has not stepped ({commit}); look at these samples and at optim.lr, or set "
        "guard.action=skip (guard.most for more in a row)"
    )
