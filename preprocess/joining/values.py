"""What a sample of a columns' source gives its records: a caption with its token ids, features and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config import LimitsConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Member
from pipeline.data.format.records import parse_npy
from pipeline.data.joined.columns import PREFIX, ColumnsContract
from pipeline.errors import RecordRejected, ShardCorrupt
from preprocess.source.sample import NO_WORDS, metadata, only_caption
from preprocess.source.shard import Sample

SINGLE = 3.4028234e38  # the largest float32
Tokenize = Callable[[str], tuple[list[int], int]]


@dataclass
class Value:
    """The values of one sample. caption, ids, tokens: as Prepared has them; "", [] and 0 without a text. arrays:
    features and scores by their stored names."""

    key: str
    caption: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def meta(self) -> dict[str, Any]:
        """The json of its records."""
        if not self.ids:
            return {"key": self.key}
        return {
            "key": self.key,
            "caption": self.caption,
            "tokens": min(self.tokens, len(self.ids)),
            "truncated": self.tokens > len(self.ids),
        }

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""
        return 200 + len(self.caption) + 8 * len(self.ids) + sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Wanted:
    """What is read of a sample. caption_key: "" without a text. features, scores: their names."""

    caption_key: str
    features: tuple[str, ...]
    scores: tuple[str, ...]
    limits: LimitsConfig

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Ends of the names of the files that are read."""
        text = [self.caption_key.partition(":")[0]] if self.caption_key else []
        json = ["json"] if self.scores else []
        return tuple(dict.fromkeys((*text, *json, *(f"{name}.npy" for name in self.features))))

    def features_of(self, sample: Sample) -> dict[str, np.ndarray]:
        """The features by their stored names. Raises RecordRejected."""
        arrays = {}
        for name in self.features:
            data = sample.members.get(f"{name}.npy")
            if data is None:
                raise RecordRejected(f"feature_missing:{name}", sample.files)
            try:
                arrays[PREFIX + name] = parse_npy(memoryview(data))
            except ShardCorrupt as error:
                raise RecordRejected(f"feature_unreadable:{name}", str(error)) from None
        return arrays

    def value(self, sample: Sample, tokenize: Tokenize | None, members: dict[str, Member]) -> Value:
        """The values of a sample. tokenize: None without a text. members: the arrays of the contract by name. Raises
        RecordRejected with the first reason that applies."""
        value = Value(sample.key)
        if tokenize is not None:
            value.caption = only_caption(sample, self.caption_key, self.limits.caption_bytes)
            value.ids, value.tokens = tokenize(value.caption)
            if value.tokens <= NO_WORDS:
                raise RecordRejected("caption_empty", "it has no token")
        for name, array in self.features_of(sample).items():
            member = members[name]
            if array.shape != member.shape or array.dtype.name != member.dtype:
                what = f"it is {array.dtype} {array.shape}, and the first sample's is {member.dtype} {member.shape}"
                raise RecordRejected(f"feature_shape:{name.removeprefix(PREFIX)}", what)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RecordRejected(f"feature_not_finite:{name.removeprefix(PREFIX)}")
            value.arrays[name] = array
        columns = metadata(sample) if self.scores else {}
        for name in self.scores:
            value.arrays[PREFIX + name] = score(name, columns.get(name))
        return value


def wanted_by(contract: ColumnsContract) -> Wanted:
    """What is read for columns of this contract."""
    names = [member.name.removeprefix(PREFIX) for member in contract.members if member.name.startswith(PREFIX)]
    scores = set(contract.scores)
    features = tuple(name for name in names if name not in scores)
    limits = from_dict(LimitsConfig, contract.limits)
    return Wanted(contract.caption_key, features, contract.scores, limits)


def score(name: str, value: Any) -> np.ndarray:
    """A number of a sample's json as float32 without axes. Raises RecordRejected."""
    if value is None:
        raise RecordRejected(f"score_missing:{name}", "it is not there, or no number of 64 bits")
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > SINGLE:
        raise RecordRejected(f"score_not_number:{name}", f"it is {str(value)[:40]!r}")
    return np.array(value, dtype=np.float32)
