"""What evaluations sample for: the first records of a dataset that is never trained on."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.values.captions import FIRST
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.members import has_several, held
from pipeline.data.reading.captions import of_one_caption
from pipeline.data.reading.shards import first_records
from pipeline.errors import DatasetError, ShardCorrupt
from pipeline.evaluation.texts import Encoded, Stored, Texts
from pipeline.models.encoders.text import TextTower
from pipeline.storage.base import Storage

TEXT = "text"


@dataclass(frozen=True)
class Share:
    """The images that one rank draws: of batches of `batch` images every `ranks`-th, from number `rank` on. So batches
    are the same in any world."""

    batch: int
    rank: int = 0
    ranks: int = 1

    def batches(self, images: int) -> Iterator[list[int]]:
        """The rank's batches of image numbers, of an evaluation of `images`."""
        for first in range(0, images, self.batch)[self.rank :: self.ranks]:
            yield list(range(first, min(first + self.batch, images)))


@dataclass(frozen=True)
class Validation:
    """The first K records of a dataset that is never trained on: captions, and arrays that a task and its judge read.

    digest: of the dataset's manifest. captions: "" for each record of a cache without captions. arrays: (K, ...) by
    name, in the cache's dtypes and with every variant. taken: which caption of each record they are, as eval.caption
    has it; the first of records with one or none. texts: the captions' states, of the images that this rank draws; None
    where nothing reads them.
    """

    digest: str
    contract: Contract
    captions: list[str]
    arrays: dict[str, np.ndarray]
    taken: str = FIRST
    texts: Texts | None = None

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
    share: Share | None = None,
) -> Validation:
    """The first `count` records of a cache, or all when it has fewer. tower: encodes the captions when `members` names
    text and the cache does not hold its states. caption: which of several captions of a record is taken, as
    eval.caption has it. seed: by which it is drawn. share: of the images that are drawn, those for which states are
    wanted; None = all."""
    text = manifest.contract.text
    captions: list[str] = []
    records = max(1, min(count, manifest.samples))
    wanted: Container[int] = range(records)
    if share is not None:
        wanted = {i % records for own in share.batches(count) for i in own}
    numbers: list[int] = []  # of the records whose states are kept
    stored_names = [name for name in members if name != TEXT or (text is not None and text.storage == "full")]
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in stored_names}
    several = has_several(text)
    read = held((*stored_names, "tokens") if several else stored_names, text)
    for record in of_one_caption(first_records(storage, manifest, count, read), text, caption, seed):
        words = record.meta.get("caption") if text is not None else ""
        if not isinstance(words, str):
            raise ShardCorrupt(f"{storage.url}: record {len(captions)} has no caption; verify names its shard")
        captions.append(words)
        for name in stored_names:
            if name != TEXT:
                arrays[name].append(np.array(record.members[name]))
            elif len(captions) - 1 in wanted:
                numbers.append(len(captions) - 1)
                arrays[name].append(np.array(record.members[name]))
    if not captions:
        raise DatasetError(f"{storage.url} has no records to evaluate on")
    for name, rows in arrays.items():
        if len(shapes := {row.shape for row in rows}) > 1:
            raise DatasetError(
                f"{storage.url}: its first {len(rows)} records hold {name} of {len(shapes)} shapes; one is wanted"
            )
    stacked = {name: np.stack(rows) for name, rows in arrays.items() if rows}
    texts: Texts | None = None
    if TEXT in stored_names:
        texts = Stored(numbers, stacked.pop(TEXT, np.zeros((0, 0, 0), np.float16)))
    elif TEXT in members:
        assert tower is not None, "captions to encode, and no tower"
        texts = Encoded(tower, captions, trimmed=manifest.contract.trimmed)
    taken = caption if several else FIRST
    return Validation(manifest.digest, manifest.contract, captions, stacked, taken, texts)
