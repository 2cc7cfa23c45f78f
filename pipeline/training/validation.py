"""The objective on held-out records: the first of data.val, always with the same noise at the same noise levels.

Nothing is sampled, so it costs a few steps' time; what moves it from one look to the next is the weights alone, so it
tells sooner than the training loss whether they still get better, and whether they fit the training records too well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.reading.shards import first_records
from pipeline.diffusion.objective import Randomness, training_randomness
from pipeline.diffusion.posterior import sample_posterior
from pipeline.diffusion.timesteps import BUCKETS, noise_bucket
from pipeline.distributed.world import World
from pipeline.errors import DatasetError
from pipeline.storage.base import Storage
from pipeline.training.watch.meter import by_noise

SEED = 0x76616C
"""Of the noise: no seed of a run, so that no record meets here what it met in training."""

Losses = Callable[[Tensor, Randomness, dict[str, Tensor]], Tensor]
"""(latents (b, C, h, w), draws, what else the network reads) -> each one's loss (b,)."""


@dataclass(frozen=True)
class Rows:
    """Records of one size of latent that one rank looks at together. weights: (b,) 0 for those that fill up a batch."""

    numbers: Tensor
    tensors: dict[str, Tensor]
    weights: Tensor


def filled(array: np.ndarray, length: int) -> np.ndarray:
    """A copy of (l, ...) with rows of zeros up to `length`, as the stream fills up trimmed texts; 0 for none."""
    missing = max(0, length - len(array))
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) if missing else np.array(array)


class ValidationLoss:
    """batches: this rank's, equally many on every rank, for a forward pass may be collective. count: records in all."""

    def __init__(self, batches: Sequence[Rows], count: int, diffusion: DiffusionConfig, world: World) -> None:
        self.batches, self.count, self.world = batches, count, world
        self._diffusion = replace(diffusion, timestep_sampling="stratified")  # the levels are spread evenly

    @classmethod
    def load(
        cls,
        storage: Storage,
        manifest: Manifest,
        members: Sequence[str],
        count: int,
        batch: int,
        diffusion: DiffusionConfig,
        world: World,
    ) -> ValidationLoss:
        """The first `count` records of a cache, or all when it has fewer. members: arrays besides moments. batch:
        records that all ranks take together. Raises DatasetError for a cache without records, StorageError,
        ShardCorrupt."""
        sizes: dict[tuple[int, ...], list[tuple[int, dict[str, np.ndarray]]]] = {}
        names = ("moments", *members)
        length = manifest.contract.text.length if manifest.contract.trimmed else 0
        total = 0
        for number, record in enumerate(first_records(storage, manifest, count, names)):
            arrays = {name: filled(record.members[name], length if name == "text" else 0) for name in names}
            sizes.setdefault(arrays["moments"].shape, []).append((number, arrays))
            total += 1
        if not total:
            raise DatasetError(f"{storage.url} has no records to take a validation loss of")
        share = max(1, batch // world.size)
        batches = []
        for rows in sizes.values():
            for first in range(0, len(rows), share * world.size):
                wanted = range(first + world.rank * share, first + (world.rank + 1) * share)
                weights = torch.tensor([float(i < len(rows)) for i in wanted])
                chosen = [rows[min(i, len(rows) - 1)] for i in wanted]
                numbers = torch.tensor([number for number, _ in chosen])
                tensors = {name: torch.from_numpy(np.stack([arrays[name] for _, arrays in chosen])) for name in names}
                batches.append(Rows(numbers, tensors, weights))
        return cls(batches, total, diffusion, world)

    @torch.no_grad()
    def __call__(self, losses: Losses, scale: float, shift: float) -> dict[str, Any]:
        """Mean loss, in all and by fifths of the noise levels. scale, shift: of the cache's latents. Collective."""
        sums = torch.zeros(2, BUCKETS, dtype=torch.float64)
        for batch in self.batches:
            device = self.world.device
            numbers = batch.numbers.to(device)
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
            moments = tensors.pop("moments")
            shape = (moments.shape[1] // 2, *moments.shape[2:])
            draws = training_randomness(SEED, numbers, shape, self._diffusion, 0.0)
            loss_B = losses(sample_posterior(moments, draws.posterior, scale, shift), draws, tensors).double().cpu()
            bucket_B = noise_bucket(draws.timestep, self._diffusion).cpu()
            sums[0].index_add_(0, bucket_B, loss_B * batch.weights)
            sums[1].index_add_(0, bucket_B, batch.weights.double())
        totals = self.world.sum(sums.flatten().tolist())
        return {"loss": sum(totals[:BUCKETS]) / self.count, "loss_by_noise": by_noise(totals), "images": self.count}
