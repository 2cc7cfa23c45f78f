"""The validation loss: the objective on held-out records, always the first of data.val with the same noise.

No image is sampled, so it costs the time of a few steps. Only the weights change from one evaluation to the next, so it
shows sooner than the training loss whether they still improve, and whether they overfit the training records.
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
from pipeline.data.format.members import held
from pipeline.data.reading.captions import of_one_caption
from pipeline.data.reading.shards import first_records
from pipeline.diffusion.objective import Randomness, training_randomness
from pipeline.diffusion.timesteps import BUCKETS, noise_bucket
from pipeline.distributed.world import World
from pipeline.errors import DatasetError
from pipeline.models.encoders.latents import Latents
from pipeline.storage.base import Storage
from pipeline.training.watch.meter import by_noise

SEED = 0x76616C
"""Seed of the noise. It is not the run's, so that no record gets the noise that it got in training."""

Losses = Callable[[Tensor, Randomness, dict[str, Tensor]], Tensor]
"""(latents (b, C, h, w), draws, what the task reads) -> losses (b,)."""
Conditions = Callable[[dict[str, Tensor], int, Tensor, Tensor], dict[str, Tensor]]
"""As Inputs.conditions: (other arrays of the records, seed, record numbers (b,), the images' array) -> what the task
reads."""


@dataclass(frozen=True)
class Rows:
    """A batch of records with latents of one size, on one rank. numbers: (b,) int64, of the records. tensors: (b, ...)
    by member name. weights: (b,) 1 for records, 0 for repeated ones that fill up the batch."""

    numbers: Tensor
    tensors: dict[str, Tensor]
    weights: Tensor


def pad(array: np.ndarray, length: int) -> np.ndarray:
    """A copy of (l, ...) with rows of zeros up to `length`, as the stream pads trimmed texts. length: 0 for no
    padding."""
    missing = max(0, length - len(array)) if length else 0  # a class has no length
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) if missing else np.array(array)


class ValidationLoss:
    """batches: this rank's, of the same number on every rank, since a forward pass may be collective. count: records on
    all ranks."""

    def __init__(self, batches: Sequence[Rows], count: int, diffusion: DiffusionConfig, world: World) -> None:
        self.batches, self.count, self.world = batches, count, world
        self._diffusion = replace(diffusion, timestep_sampling="stratified")  # spreads the noise levels evenly

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
        caption: str = "1",
    ) -> ValidationLoss:
        """Load the first `count` records of a cache, or all when it has fewer. members: arrays, the images' first.
        batch: records in a batch of all ranks together. caption: which of several captions of a record is taken, as
        eval.caption has it. Raises DatasetError for a cache without records, StorageError,
        ShardCorrupt."""
        by_size: dict[tuple[int, ...], list[tuple[int, dict[str, np.ndarray]]]] = {}
        length = manifest.contract.padded_text
        total = 0
        text = manifest.contract.text
        found = first_records(storage, manifest, count, held(members, text))
        for number, record in enumerate(of_one_caption(found, text, caption, SEED)):
            arrays = {name: pad(record.members[name], length if name == "text" else 0) for name in members}
            by_size.setdefault(arrays[members[0]].shape, []).append((number, arrays))
            total += 1
        if not total:
            raise DatasetError(
                f"{storage.url} has no records to take a validation loss of; name another data.val, or set "
                "eval.loss_images=0"
            )
        share = max(1, batch // world.size)
        batches = []
        for records in by_size.values():
            for first in range(0, len(records), share * world.size):
                indices = range(first + world.rank * share, first + (world.rank + 1) * share)
                weights = torch.tensor([float(i < len(records)) for i in indices])
                rows = [records[min(i, len(records) - 1)] for i in indices]
                numbers = torch.tensor([number for number, _ in rows])
                tensors = {name: torch.from_numpy(np.stack([arrays[name] for _, arrays in rows])) for name in members}
                batches.append(Rows(numbers, tensors, weights))
        return cls(batches, total, diffusion, world)

    @torch.no_grad()
    def __call__(self, losses: Losses, latents: Latents, conditions: Conditions) -> dict[str, Any]:
        """Mean loss over all records, and by fifths of the noise levels. latents: how z is made of the cache's array.
        Collective."""
        sums = torch.zeros(2, BUCKETS, dtype=torch.float64)  # of losses, and of records, by noise level
        for batch in self.batches:
            device = self.world.device
            numbers = batch.numbers.to(device)
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
            images = tensors.pop(latents.member)
            draws = training_randomness(SEED, numbers, latents.shape(images), self._diffusion, 0.0)
            given = conditions(tensors, SEED, numbers, images)
            loss_B = losses(latents.draw(images, draws.posterior), draws, given).double().cpu()
            bucket_B = noise_bucket(draws.timestep, self._diffusion).cpu()
            sums[0].index_add_(0, bucket_B, loss_B * batch.weights)
            sums[1].index_add_(0, bucket_B, batch.weights.double())
        totals = self.world.sum(sums.flatten().tolist())
        return {"loss": sum(totals[:BUCKETS]) / self.count, "loss_by_noise": by_noise(totals), "images": self.count}
