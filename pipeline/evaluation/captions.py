"""The captions that evaluations sample: those of the first records of a dataset that is never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import DatasetError, ShardCorrupt
from pipeline.inference.trained import encode_captions
from pipeline.models.encoders.text import TextTower
from pipeline.storage.base import Storage

ENCODED_TOGETHER = 64  # captions


@dataclass(frozen=True)
class Validation:
    """The first records of a dataset that is never trained on: captions, and the members that the task reads.

    digest: of the dataset's manifest. tensors: (K, ...) by member name, in the cache's dtypes.
    """

    digest: str
    contract: Contract
    captions: list[str]
    tensors: dict[str, Tensor]

    def rows(self, numbers: Sequence[int]) -> tuple[list[str], dict[str, Tensor]]:
        """Captions and members of images `numbers`; numbers beyond the last record start again from the first."""
        index = [number % len(self.captions) for number in numbers]
        return [self.captions[i] for i in index], {name: t[index] for name, t in self.tensors.items()}


def load_validation(
    storage: Storage, manifest: Manifest, members: Sequence[str], count: int, tower: TextTower
) -> Validation:
    """The first `count` records of a cache, or all when it has fewer. tower: encodes the captions when the cache does
    not hold text states."""
    captions: list[str] = []
    stored_names = [name for name in members if name != "text" or manifest.contract.text.storage == "full"]
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in stored_names}
    for record in first_records(storage, manifest, count, stored_names):
        if not isinstance(caption := record.meta.get("caption"), str):
            raise ShardCorrupt(f"{storage.url}: record {len(captions)} has no caption; verify names its shard")
        captions.append(caption)
        for name in stored_names:
            arrays[name].append(np.array(record.members[name]))
    if not captions:
        raise DatasetError(f"{storage.url} has no records to evaluate on")
    for name, rows in arrays.items():
        if len(shapes := {row.shape for row in rows}) > 1:
            raise DatasetError(
                f"{storage.url}: its first {len(rows)} records hold {name} of {len(shapes)} shapes; one is wanted"
            )
    tensors = {name: torch.from_numpy(np.stack(rows)) for name, rows in arrays.items()}
    if "text" in members and "text" not in stored_names:
        batches = (captions[i : i + ENCODED_TOGETHER] for i in range(0, len(captions), ENCODED_TOGETHER))
        trimmed = manifest.contract.trimmed
        tensors["text"] = torch.cat([encode_captions(tower, batch, trimmed=trimmed).half().cpu() for batch in batches])
    return Validation(manifest.digest, manifest.contract, captions, tensors)
