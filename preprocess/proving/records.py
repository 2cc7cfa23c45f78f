"""Checks a record against its contract."""

from __future__ import annotations

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.members import member_shape
from pipeline.data.format.records import Record
from pipeline.errors import ShardCorrupt


def check_record(record: Record, contract: Contract, size: tuple[int, int]) -> None:
    """Raises ShardCorrupt unless the record has finite members with the contract's names, shapes and dtypes, and a
    caption where the dataset has captions. size: (width, height) of its crop in pixels."""
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


def source_key(record: Record) -> str:
    """The key that a record's sample has in its source. Raises ShardCorrupt."""
    key = record.meta.get("key")
    if type(key) is not str:
        raise ShardCorrupt(f"record {record.key} does not say which sample of the source it is of")
    return key
