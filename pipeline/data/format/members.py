"""Which shape an array of a record must have, by the contract and the size of the record's crop."""

from __future__ import annotations

from pipeline.data.format.contract import Contract, Member
from pipeline.errors import ShardCorrupt

SHORTEST = 2
"""Tokens of the empty caption: start and end."""
LOWRES_FACTOR = 4
"""Pixels of a crop per pixel of cond.lowres, along a side."""


def member_shape(
    member: Member, contract: Contract, size: tuple[int, int], found: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The shape of `member` in a record whose crop is `size` (width, height) in pixels.

    found: the stored shape, if there is one. A trimmed text may have any length that the context allows; where `found`
    has such a length, it is the length that is returned.
    """
    if -1 not in member.shape:
        return member.shape
    if member.name == "text":
        tokens = found[0] if found else 0
        return (tokens if SHORTEST <= tokens <= contract.text.length else contract.text.length, *member.shape[1:])
    factor = {"moments": contract.downsampling, "cond.masked": contract.downsampling, "cond.lowres": LOWRES_FACTOR}
    pixels = factor.get(member.name, 1)
    return (*member.shape[:-2], size[1] // pixels, size[0] // pixels)


def require_array(name: str, dtype: str, shape: tuple[int, ...], contract: Contract, size: tuple[int, int]) -> None:
    """Raise ShardCorrupt unless an array `name` of this dtype and shape is one of the contract's, in a record whose
    crop is `size`."""
    member = next((member for member in contract.members if member.name == name), None)
    if member is None:
        raise ShardCorrupt(f"{name} is an array that the contract does not name")
    wanted = member_shape(member, contract, size, shape)
    if (dtype, shape) != (member.dtype, wanted):
        raise ShardCorrupt(f"{name} is {dtype} {shape}, not {member.dtype} {wanted}")
