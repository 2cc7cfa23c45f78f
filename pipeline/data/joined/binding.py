"""Whether columns belong to a cache: by its digest, and tar by tar by name, number of records and SHA-256.

What can be known without reading a tar is compared when columns are opened. Keys are compared with the cache's as
records are read (reading.py), and all of them by `latentmill verify`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pipeline.data.format.excluded import read_excluded
from pipeline.data.format.index import most_index_bytes
from pipeline.data.format.manifest import Manifest, find_version
from pipeline.data.joined.columns import COLUMNS, Columns
from pipeline.errors import ContractMismatch, DatasetError
from pipeline.storage.base import Storage

AGAIN = "restore it, or delete it and run the same `latentmill columns` again"


@dataclass(frozen=True)
class Bound:
    """Columns that were found to belong to a cache.

    numbered: whether their records are named by the numbers of tar and row, as those of a cache that `latentmill index`
    made; else they have the keys of the cache's. excluded: (N, 2) int32, records without a value.
    """

    storage: Storage
    columns: Columns
    numbered: bool
    excluded: np.ndarray = field(compare=False, repr=False)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the arrays."""
        return frozenset(self.columns.contract.names)

    @property
    def has_text(self) -> bool:
        """Whether they have captions, which stand in place of the cache's."""
        return self.columns.contract.text is not None


def bind(storage: Storage, columns: Columns, cache: Storage, manifest: Manifest) -> Bound:
    """The columns at `storage`, found to belong to the cache of this manifest. Raises ContractMismatch when they do
    not, and DatasetError when files are missing, or are not what columns.json says."""
    where = f"the columns at {storage.url}"
    if columns.dataset != manifest.digest:
        former = find_version(cache, columns.dataset)
        raise ContractMismatch(
            stale(where, cache.url, former, manifest) if former else other(where, columns, cache.url)
        )
    theirs = [(entry.name, entry.unit, entry.size, entry.samples, entry.sha256) for entry in manifest.shards]
    ours = [(entry.name, entry.unit, entry.size, entry.samples, entry.of) for entry in columns.shards]
    if len(ours) != len(theirs):
        raise ContractMismatch(f"{where} have {len(ours)} tars, {cache.url} has {len(theirs)}: {AGAIN}")
    for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        if one == two:
            continue
        if one[0] != two[0]:
            what = f"tar {number + 1} is {one[0]}, where the cache has {two[0]}: they are of another order"
        elif one[3] != two[3]:
            what = f"{one[0]} has {one[3]} records, where the cache's has {two[3]}: they are of another length"
        else:
            what = f"{one[0]} is of another tar than the cache's"
        raise ContractMismatch(f"{where} do not fit {cache.url}: {what}; {AGAIN}")
    require_files(storage, columns)
    facts = columns.excluded_name, columns.excluded, columns.excluded_sha256
    excluded = read_excluded(storage, *facts, [entry.samples for entry in columns.shards], AGAIN)
    return Bound(storage, columns, manifest.adopted, excluded)


def stale(where: str, url: str, former: Manifest, manifest: Manifest) -> str:
    """Why columns of another version of a cache are refused."""
    if former.version > manifest.version:
        return (
            f"{where} were made for version {former.version} of {url}, and version {manifest.version} of it is read, "
            "with which a run began: begin another run, or leave the columns out"
        )
    return (
        f"{where} are of version {former.version} of {url}, and version {manifest.version} of it is read: run the "
        "`latentmill columns` that made them again, with what the new shards need in source=; it keeps the rest"
    )


def other(where: str, columns: Columns, url: str) -> str:
    """Why columns of another cache are refused."""
    return (
        f"{where} belong to a cache whose digest is {columns.dataset[:12]}, and that is not {url}: name that cache, or "
        "make columns for this one"
    )


def require_files(storage: Storage, columns: Columns) -> None:
    """Raise DatasetError, which names the first one, when tars or indexes of columns are missing or have another
    size than columns.json can mean."""
    sizes = {info.key: info.size for info in storage.list("")}
    for shard in columns.shards:
        for key in (shard.name, shard.index_name):
            if key not in sizes:
                raise DatasetError(f"{storage.locate(key)} is missing, which {COLUMNS} names: {AGAIN}")
        if sizes[shard.name] != shard.bytes:
            raise DatasetError(
                f"{storage.locate(shard.name)} has {sizes[shard.name]} bytes, {COLUMNS} says {shard.bytes}: {AGAIN}"
            )
        if sizes[shard.index_name] > most_index_bytes(shard.samples):
            raise DatasetError(
                f"{storage.locate(shard.index_name)} has {sizes[shard.index_name]} bytes, too many for "
                f"{shard.samples} records: {AGAIN}"
            )
