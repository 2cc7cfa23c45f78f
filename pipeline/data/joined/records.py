"""One record of a cache's and its columns', and whether they are of one sample."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from pipeline.data.format.records import Record, record_key
from pipeline.data.joined.binding import Bound
from pipeline.data.joined.manifest import TEXTS
from pipeline.errors import ShardCorrupt
from pipeline.parsing.tar import BLOCK

NAME_BYTES = 100  # of a tar header, which begins with the member's name
SAID = ("caption", "tokens", "truncated")
"""What a record's json says of its text."""
AGAIN = "run the same `latentmill columns` again, into another dest"


def merged(record: Record, beside: Record, *, text: bool) -> Record:
    """A cache's record with the arrays of its columns. text: whether these are its caption, too."""
    members = {name: array for name, array in record.members.items() if not (text and name in TEXTS)}
    said = {name: beside.meta[name] for name in SAID if text and name in beside.meta}
    return Record(record.key, members | beside.members, record.meta | said if record.meta else record.meta)


def split(members: Collection[str], columns: Collection[Bound]) -> tuple[list[str], list[list[str]]]:
    """Names of arrays -> those that a cache holds, and those that each of its columns holds."""
    theirs = [[name for name in members if name in one.names] for one in columns]
    held = {name for names in theirs for name in names}
    return [name for name in members if name not in held], theirs


def key_of(bound: Bound, key: str, shard: int, row: int) -> str:
    """The key of a record of columns. key, shard, row: of the cache's record: its key, the number of its tar, and its
    row there."""
    return record_key(shard, row) if bound.numbered else key


def require_keys(
    bound: Bound,
    shard: int,
    rows: np.ndarray,
    own: tuple[np.ndarray, np.ndarray],
    beside: tuple[np.ndarray, np.ndarray],
) -> None:
    """Raise ShardCorrupt unless the records of columns have the keys of the cache's.

    shard, rows: number of the cache's tar, and the records' rows in it. own, beside: bytes (m,) uint8 of whole blocks
    of a tar, and the offsets (n,) of the records in them, of the cache and of the columns.
    """
    theirs = _names(*beside)
    if bound.numbered:
        wanted = np.zeros_like(theirs)
        for place, row in enumerate(rows.tolist()):
            name = f"{record_key(shard, row)}.json".encode()
            wanted[place, : len(name)] = np.frombuffer(name, dtype=np.uint8)
    else:
        wanted = _names(*own)
    wrong = np.flatnonzero((theirs != wanted).any(axis=1))
    if len(wrong):
        place = int(wrong[0])
        names = [bytes(table[place]).partition(b"\0")[0].decode("ascii", "replace") for table in (wanted, theirs)]
        raise ShardCorrupt(f"row {rows[place]} is {names[1]}, and the cache's is {names[0]}: {AGAIN}")


def _names(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n, 100) uint8: the name of the first member of each record. Raises ShardCorrupt where records do not begin at
    whole blocks."""
    if len(data) % BLOCK or (offsets % BLOCK).any():
        raise ShardCorrupt("its records do not begin at multiples of 512 bytes")
    return data.reshape(-1, BLOCK)[offsets // BLOCK, :NAME_BYTES]
