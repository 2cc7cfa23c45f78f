"""Finds the input shards of a finished dataset again, to compare records with what they were made from."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.format.manifest import Manifest, UnitEntry
from pipeline.errors import NotFound, SourceError
from pipeline.storage.urls import open_storage
from preprocess.encoding.plan import PLAN, read_plan
from preprocess.units.given import Cut, cut_of, listed, look
from preprocess.units.inputs import Hashes, Input, absolute
from preprocess.units.matching import Known, Matcher
from preprocess.units.reports import READERS

MOST_FOLDERS = 16  # in which the shards of a dataset are looked for without source=


def find_inputs(manifest: Manifest, source: str, dataset: str) -> dict[int, Input]:
    """The input shards of a dataset by unit number, but for those that were left out.

    source: their pattern. "": they are looked for by name in the folders that the manifest records, relative to this
    process's, or in the dataset's own bucket; nothing is listed or expanded, since a manifest may be a stranger's. A
    shard of a unit's name that has changed is returned; what is read of it tells. Raises SourceError when shards are
    missing or are no units of the dataset, and for a dataset that `latentmill index` made, whose images are unknown.
    """
    if manifest.adopted:
        raise SourceError(f"{dataset} was indexed from latents that were there: nothing says which images they are of")
    if manifest.contract.converted:
        raise SourceError(f"{dataset} was converted from latents: nothing says which images they are of")
    units = {number: unit for number, unit in enumerate(manifest.units) if not unit.left_out}
    if not source:
        return _recorded(manifest, units, dataset)
    inputs = _given(manifest, source, dataset)
    names = [unit.source for unit in manifest.units]
    known = {number: Known(unit.source_bytes, unit.source_sha256) for number, unit in units.items()}
    found = Matcher(names, known, Hashes(), lambda unit, shard: True, lambda unit, shard: True).match(inputs)
    places: dict[int, Input] = {}
    strange = [inputs[i] for i in found.further]
    for i, number in (*found.units.items(), *found.changed):
        if number in places:
            strange.append(inputs[i])
        else:
            places[number] = inputs[i]
    missing = [number for number in units if number not in places]
    if missing or strange:
        what = f"it lacks {names[missing[0]]}" if missing else f"{strange[0].url} is none of its shards"
        wanted = [unit.source for unit in units.values()]
        raise SourceError(
            f"{source} is not what {dataset} was made from ({what}): give source= the {len(wanted)} shards {wanted[0]} "
            f"to {wanted[-1]}"
        )
    return {number: places[number] for number in units}


def _given(manifest: Manifest, source: str, dataset: str) -> list[Input]:
    """The units that a source names, cut as the dataset's were. Files that have come to a folder since are none."""
    given = look(source, Cut())
    if not given.is_gathered:
        return given.units()
    storage = open_storage(dataset)
    plan = read_plan(storage)
    if plan is None:
        raise SourceError(
            f"{storage.url} holds no plan ({PLAN}), which says how its units were cut from {source}: restore it"
        )
    cut = cut_of(plan, given.cut)
    given = given if cut == given.cut else look(source, cut)
    left_out = {unit.source for unit in manifest.units if unit.left_out}
    return given.units(listed(storage, plan.until(manifest.version)), left_out, grown=False)


def _recorded(manifest: Manifest, units: dict[int, UnitEntry], dataset: str) -> dict[int, Input]:
    """The shards by name, in the folders that the manifest records."""
    storages = [open_storage(folder) for folder in _folders(manifest, dataset)]

    def place(unit: UnitEntry) -> Input | None:
        if ".." in unit.source.split("/") or unit.source.startswith("/"):
            return None
        for storage in storages:
            try:
                if storage.stat(unit.source).size == unit.source_bytes:
                    url = absolute(storage, unit.source)
                    return Input(storage, unit.source, url, url, unit.source_bytes)
            except NotFound:
                continue
        return None

    places = dict[int, Input]()
    with ThreadPoolExecutor(READERS) as pool:
        numbers = list(units)
        for start in (0, 1):  # the first by itself: where it is not, the others need not be looked for
            chosen = numbers[:1] if start == 0 else numbers[1:]
            for number, found in zip(chosen, pool.map(lambda n: place(units[n]), chosen), strict=True):
                if found is None:
                    raise SourceError(f"{units[number].source} is not where the manifest says, or has changed")
                places[number] = found
    return places


def _folders(manifest: Manifest, dataset: str) -> list[str]:
    """The folders before the first special character of the recorded patterns, without those that a stranger's
    manifest must not lead to: other buckets, and folders that are not below the working directory."""
    folders = dict[str, None]()
    for pattern in manifest.sources[:MOST_FOLDERS]:
        folder = re.split(r"[*?\[{]", pattern, maxsplit=1)[0].rpartition("/")[0]
        if "://" in pattern:
            bucket = "/".join(dataset.split("/")[:3])
            if "://" in dataset and "/".join(folder.split("/")[:3]) == bucket:
                folders[folder] = None
        elif not pattern.startswith(("/", "~")) and ".." not in folder.split("/") and "\0" not in pattern:
            folders[folder or "."] = None
    return list(folders)
