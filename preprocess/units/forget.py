"""`latentmill encode forget=[NAME]`: takes an input shard back, so that the next run encodes it anew."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.data.format.manifest import MANIFEST, VERSIONS, parse_manifest
from pipeline.errors import DatasetError, DestinationExists, NotFound, SourceError
from pipeline.storage.base import Storage
from preprocess.encoding.claims import Claims
from preprocess.encoding.plan import Plan, part_key, read_plan
from preprocess.gathering.listing import listing_key
from preprocess.units.naming import SHOWN, option, resolve
from preprocess.units.reports import files_of

COPY = re.compile(rf"{VERSIONS}/\d{{6}}\.json")
ADOPTED = "unknown"
"""Device in the contract of a dataset that `latentmill index` made."""


def forget(storage: Storage, given: Sequence[str], claims: Claims) -> str:
    """Deletes reports, tars, indexes and hashes of the named units, and before them the manifests that hold these.

    A unit that a manifest holds as left out is in no tar: then only its report goes, and the versions stay. Deletes
    nothing else. Returns a line about what was deleted. Raises SourceError and ConfigError for names that are not of
    this dataset, and DestinationExists while a worker is at one of them.
    """
    plan = read_plan(storage)
    if plan is None:
        raise SourceError(f"{storage.url} was not begun, so there is nothing to forget: run this without forget=")
    if plan.contract.device == ADOPTED:
        raise DestinationExists(f"{storage.url} was made by `latentmill index`: restore its tars, or index it anew")
    numbers = resolve("forget", given, plan.names)
    for number in numbers:
        if not claims.hold(number):
            raise DestinationExists(
                f"{option('forget', [plan.names[number]])}: a worker is at it at this moment: run this again when "
                "that has ended"
            )
    versions = _versions(storage, numbers)
    proposed = _proposed(storage, plan, claims) if MANIFEST in versions else []
    deleted = [*versions, *proposed, *files_of(storage, numbers)]
    for key in deleted:
        storage.delete(key)
    names = ", ".join(plan.names[number] for number in numbers[:SHOWN])
    what = ", ".join(deleted[:SHOWN]) + (f" and {len(deleted) - SHOWN} more" if len(deleted) > SHOWN else "")
    refused = "; runs that were trained on a version that held it will be refused" if versions else ""
    return (
        f"encode: {storage.url} has forgotten {names}: deleted {what or 'nothing, since nothing of it was there'}"
        f"{refused}. The same command without forget= encodes it"
    )


def _versions(storage: Storage, numbers: Sequence[int]) -> list[str]:
    """Keys of the manifests that hold one of these units, and of what belongs to them: manifest.json first."""
    keys = [info.key for info in storage.list(f"{VERSIONS}/")]
    versions = []
    for key in (MANIFEST, *filter(COPY.fullmatch, keys)):
        if _holds(storage, key, numbers):
            excluded = f"{key.removesuffix('.json')}.excluded.npy"
            versions += [key, *([excluded] if excluded in keys else [])]
    return versions


def _holds(storage: Storage, key: str, numbers: Sequence[int]) -> bool:
    """Whether a manifest holds samples of one of these units. One that is damaged counts as if it did."""
    try:
        units = parse_manifest(storage.get(key)).units
    except NotFound:
        return False
    except DatasetError:
        return True
    return any(number < len(units) and not units[number].left_out for number in numbers)


def _proposed(storage: Storage, plan: Plan, claims: Claims) -> list[str]:
    """Keys of an append that no manifest holds yet: with the manifest gone, it could not be told from what was
    finished."""
    copies = [info.key for info in storage.list(f"{VERSIONS}/") if COPY.fullmatch(info.key)]
    if not copies:
        return []
    version = max(int(key[len(VERSIONS) + 1 :][:6]) for key in copies)
    if len(plan.parts) <= version:
        return []
    if claims.others_append():
        raise DestinationExists(f"{storage.url}: others append to it at this moment: run this again later")
    pending = range(len(plan.until(version).names), len(plan.names))
    parts = [part_key(number) for number in range(version + 1, len(plan.parts) + 1)]
    lists = [listing_key(part.listing) for part in plan.parts[version:] if part.listing]
    return [*parts, *lists, *files_of(storage, pending)]
