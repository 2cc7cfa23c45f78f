"""What evaluations sample for: the first records of a dataset that is never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config.values.captions import FIRST
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.members import has_several, held
from pipeline.data.reading.captions import of_one_caption
from pipeline.data.reading.shards import first_records
from pipeline.errors import DatasetError, ShardCorrupt
from pipeline.inference.trained import encode_captions
from pipeline.models.encoders.text import TextTower
from pipeline.storage.base import Storage

ENCODED_TOGETHER = 64  # captions


@dataclass(frozen=True)
class Validation:
    """The first K records of a dataset that is never trained on: captions, and arrays that a task and its judge read.

    digest: of the dataset's manifest. captions: "" for each record of a cache without captions. arrays: (K, ...) by
    name, in the cache's dtypes and with every variant. taken: which caption of each record they are, as eval.caption
    has it; the first of records with one or none.
    """

    digest: str
    contract: Contract
    captions: list[str]
    arrays: dict[str, np.ndarray]
    taken: str = FIRST

    def __len__(self) -> int:
        return len(self.captions)

    def facts(self, images: int) -> dict[str, Any]:
        """What the card of an evaluation of so many images says of captions."""
        taken = {} if self.taken == FIRST else {"caption": self.taken}
        return {"dataset": self.digest, "records": min(images, len(self)), **taken}


def load_validation(
    storage: Storage,
    manifest: Manifest,
    members: Sequence[str],
    count: int,
    tower: TextTower | None,
    caption: str = FIRST,
    seed: int = 0,
) -> Validation:
    """The first `count` records of a cache, or all when it has fewer. tower: encodes the captions when `members` names
    text and the cache does not hold its states. caption: which of several captions of a record is taken, as
    eval.caption has it. seed: by which it is drawn."""
    text = manifest.contract.text
    captions: list[str] = []
    stored_names = [name for name in members if name != "text" or (text is not None and text.storage == "full")]
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in stored_names}
    several = has_several(text)
    read = held((*stored_names, "tokens") if several else stored_names, text)
    for record in of_one_caption(first_records(storage, manifest, count, read), text, caption, seed):
        words = record.meta.get("caption") if text is not None else ""
        if not isinstance(words, str):
            raise ShardCorrupt(f"{storage.url}: record {len(captions)} has no caption; verify names its shard")
        captions.append(words)
        for name in stored_names:
            arrays[name].append(np.array(record.members[name]))
    if not captions:
        raise DatasetError(f"{storage.url} has no records to evaluate on")
    for name, rows in arrays.items():
        if len(shapes := {row.shape for row in rows}) > 1:
            raise DatasetError(
                f"{storage.url}: its first {len(rows)} records hold {name} of {len(shapes)} shapes; one is wanted"
            )
    stacked = {name: np.stack(rows) for name, rows in arrays.items()}
    if "text" in members and "text" not in stored_names:
        assert tower is not None, "captions to encode, and no tower"
        batches = (captions[i : i + ENCODED_TOGETHER] for i in range(0, len(captions), ENCODED_TOGETHER))
        trimmed = manifest.contract.trimmed
        states = [encode_captions(tower, batch, trimmed=trimmed).half().cpu() for batch in batches]
        stacked["text"] = torch.cat(states).numpy()
    return Validation(manifest.digest, manifest.contract, captions, stacked, caption if several else FIRST)
