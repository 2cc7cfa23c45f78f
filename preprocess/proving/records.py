"""Checks a record against its contract."""

from __future__ import annotations

import numpy as np

from pipeline.data.format.contract import Contract, Member
from pipeline.data.format.records import Record
from pipeline.errors import ShardCorrupt
from preprocess.source.sample import LOWRES_FACTOR

SHORTEST = 2  # tokens of the empty caption: start and end


def check_record(record: Record, contract: Contract, size: tuple[int, int]) -> None:
    """Raises ShardCorrupt unless the record has finite members with the contract's names, shapes and dtypes, and a
    caption. size: (width, height) of its crop in pixels."""
    for member in contract.members:
        array = record.members.get(member.name)
        shape = member_shape(member, contract, size, array)
        if array is None or array.shape != shape or array.dtype.name != member.dtype:
            raise ShardCorrupt(f"record {record.key}: {member.name} is not {member.dtype} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ShardCorrupt(f"record {record.key}: {member.name} holds NaN or infinity")
    if len(record.members) != len(contract.members):
        raise ShardCorrupt(f"record {record.key} has members that the contract does not name")
    if not isinstance(record.meta.get("caption"), str) or not record.meta["caption"]:
        raise ShardCorrupt(f"record {record.key} has no caption")


def member_shape(
    member: Member, contract: Contract, size: tuple[int, int], found: np.ndarray | None
) -> tuple[int, ...]:
    """The shape that a member must have in a record whose crop is `size` (width, height). A trimmed text may have any
    length that the context allows; for an array of such a length, that length is returned."""
    if -1 not in member.shape:
        return member.shape
    if member.name == "text":
        tokens = len(found) if found is not None and found.ndim else 0
        return (tokens if SHORTEST <= tokens <= contract.text.length else contract.text.length, *member.shape[1:])
    factor = {"moments": contract.downsampling, "cond.masked": contract.downsampling, "cond.lowres": LOWRES_FACTOR}
    pixels = factor.get(member.name, 1)
    return (*member.shape[:-2], size[1] // pixels, size[0] // pixels)
