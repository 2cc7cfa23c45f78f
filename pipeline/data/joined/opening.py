"""Opens a cache together with the columns that belong to it, of those that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.format.manifest import Manifest, find_version, load_manifest
from pipeline.data.joined.binding import Bound, bind, stale
from pipeline.data.joined.columns import is_columns, load_columns
from pipeline.data.joined.manifest import join
from pipeline.errors import ContractMismatch
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage


def joined(cache: Storage, urls: Sequence[str], manifest: Manifest | None = None, *, lenient: bool = False) -> Manifest:
    """The manifest of the cache at `cache` with those of the columns at `urls` that belong to it; its own where none
    does. manifest: of the version to open; None = the newest. lenient: passes over places where no columns are, for who
    opens one of a run's caches after the others have gone.

    Raises ContractMismatch for columns of another version of the cache, and for columns that say they belong to it and
    do not fit; DatasetError.
    """
    manifest = manifest or load_manifest(cache)
    bound = list[Bound]()
    for url in urls:
        storage = open_storage(url)
        if lenient and not is_columns(storage):
            continue
        columns = load_columns(storage, manifest.digest)
        if columns.dataset == manifest.digest:
            bound.append(bind(storage, columns, cache, manifest))
        elif former := find_version(cache, columns.dataset):
            raise ContractMismatch(stale(f"the columns at {storage.url}", cache.url, former, manifest))
    return join(cache, manifest, bound)


def require_all_bound(urls: Sequence[str], manifests: Sequence[Manifest], caches: str) -> None:
    """Raise ContractMismatch, which names the first, where columns belong to none of the caches that were opened.
    manifests: theirs, with their columns. caches: names them in the message."""
    found = {one.storage.url for manifest in manifests for one in manifest.columns}
    for url in urls:
        storage = open_storage(url)
        if storage.url not in found:
            digest = load_columns(storage).dataset
            raise ContractMismatch(
                f"data.columns={url} belong to a cache whose digest is {digest[:12]}, which is none of {caches}: name "
                "that cache, leave the columns out, or make some for these caches (latentmill columns)"
            )
