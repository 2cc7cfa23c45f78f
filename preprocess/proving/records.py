"""Checks a record against its contract."""

from __future__ import annotations

import numpy as np

from pipeline.data.format.contract import Contract, TextFacts
from pipeline.data.format.members import NO_CAPTION, member_shape
from pipeline.data.format.records import Record
from pipeline.data.reading.captions import array_of, lengths_of, require_keys
from pipeline.errors import ShardCorrupt


def check_record(record: Record, contract: Contract, size: tuple[int, int]) -> None:
    """Raises ShardCorrupt unless the record has finite members with the contract's names, shapes and dtypes, and a
    caption where the dataset has captions, or several that go together. size: (width, height) of its crop in pixels."""
    for member in contract.members:
        array = record.members.get(member.name)
        shape = member_shape(member, contract, size, None if array is None else array.shape)
        if array is None or array.shape != shape or array.dtype.name != member.dtype:
            raise ShardCorrupt(f"record {record.key}: {member.name} is not {member.dtype} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ShardCorrupt(f"record {record.key}: {member.name} holds NaN or infinity")
    if len(record.members) != len(contract.members):
        raise ShardCorrupt(f"record {record.key} has members that the contract does not name")
    if contract.text is not None and not (isinstance(record.meta.get("caption"), str) and record.meta["caption"]):
        raise ShardCorrupt(f"record {record.key} has no caption")
    if contract.text is not None and contract.text.captions > 1:
        try:
            check_captions(record, contract.text)
        except ShardCorrupt as error:
            raise ShardCorrupt(f"record {record.key}: {error}") from None


def check_captions(record: Record, text: TextFacts) -> None:
    """Raises ShardCorrupt unless the captions of a record that may hold several, their keys, ids and states go
    together."""
    captions, words = record.members["captions"], record.meta.get("captions")
    require_keys(captions[None, :, 0], text)
    lengths = lengths_of(captions, text)
    if type(words) is not list or not all(type(one) is str and one for one in words) or len(words) != len(lengths):
        raise ShardCorrupt(f"its json does not hold the {len(lengths)} captions whose ids it has")
    if words[0] != record.meta["caption"]:
        raise ShardCorrupt("its caption is not the first of its captions")
    ids, rest = captions[: len(lengths), 1:], captions[len(lengths) :]
    if (ids < 0).any() or (text.vocabulary and (ids >= text.vocabulary).any()) or (rest != NO_CAPTION).any():
        raise ShardCorrupt("captions holds ids that are none of the text tower's")
    if "text" in record.members:
        array_of("text", record.members, 0, text)


def source_key(record: Record) -> str:
    """The key that a record's sample has in its source. Raises ShardCorrupt."""
    key = record.meta.get("key")
    if type(key) is not str:
        raise ShardCorrupt(f"record {record.key} does not say which sample of the source it is of")
    return key
