"""The captions that evaluations sample: the first records of a dataset that is never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.manifest import Contract, Manifest
from pipeline.data.stream import first_records
from pipeline.errors import DatasetError
from pipeline.storage import Storage


@dataclass(frozen=True)
class Validation:
    """The first records of a dataset that is never trained on: captions, and the members that the task reads.

    digest: of its manifest. tensors: (K, ...) by member name, in the cache's dtypes.
    """

    digest: str
    contract: Contract
    captions: list[str]
    tensors: dict[str, Tensor]

    def rows(self, numbers: Sequence[int]) -> tuple[list[str], dict[str, Tensor]]:
        """Captions and members of images `numbers`; images beyond the last record begin with the first again."""
        index = [number % len(self.captions) for number in numbers]
        return [self.captions[i] for i in index], {name: t[index] for name, t in self.tensors.items()}


def load_validation(storage: Storage, manifest: Manifest, members: Sequence[str], count: int) -> Validation:
    """The first `count` records of a cache, or all when it has fewer."""
    captions: list[str] = []
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in members}
    for record in first_records(storage, manifest, count, members):
        captions.append(record.meta["caption"])
        for name in members:
            arrays[name].append(np.array(record.members[name]))
    if not captions:
        raise DatasetError(f"{storage.url} has no records to evaluate on")
    tensors = {name: torch.from_numpy(np.stack(many)) for name, many in arrays.items()}
    return Validation(manifest.digest, manifest.contract, captions, tensors)
