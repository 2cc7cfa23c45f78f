"""Records beside the samples that they were made from."""

from __future__ import annotations

import collections
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.records import Record
from preprocess.source.conditions import stored_arrays
from preprocess.source.sample import Picture, Prepared


@dataclass
class Original:
    """A record and its source sample, prepared again. picture: flipped if the record is."""

    record: Record
    sample: Prepared
    picture: Picture

    def arrays(self, contract: Contract) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The record's arrays that need no encoder, made again, and its masks (K, H, W) or None."""
        return stored_arrays(
            self.picture.conditions,
            self.picture.pixels,
            self.record.key,
            contract.conditions,
            contract.downsampling,
        )


def by_size(originals: list[Original]) -> list[list[Original]]:
    """Groups originals by the size of their crops."""
    groups: dict[tuple[int, ...], list[Original]] = collections.defaultdict(list)
    for original in originals:
        groups[original.picture.pixels.shape].append(original)
    return list(groups.values())
