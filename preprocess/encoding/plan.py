"""The plan of a destination: its contract, the input shards that it was begun with, and those appended later.

The files of a plan are written before anything is encoded and never change: `contract.json` holds the first shards,
`plans/000002.json` and so on each group of shards that was appended to the finished dataset. A unit is one input shard;
its number is its position in the whole plan.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pipeline.data.format.contract import Contract, canonical_json, contract_from_json
from pipeline.data.format.manifest import Manifest
from pipeline.errors import DestinationExists, NotFound, SourceError
from pipeline.storage.base import Storage
from pipeline.storage.patterns import expand
from pipeline.storage.urls import without_folders

PLAN = "contract.json"
PARTS = "plans"


@dataclass(frozen=True)
class Unit:
    """One input shard and the place it is read from. name: its name in the plan. bytes: its current size."""

    number: int
    storage: Storage
    key: str
    name: str
    bytes: int

    @property
    def report_name(self) -> str:
        """Key of its report, which is written last."""
        return report_key(self.number)

    @property
    def hashes_name(self) -> str:
        """Key of the digests by which duplicates of its samples are found, when duplicates are filtered."""
        return f"units/{self.number:06d}.hashes.npy"

    def tar_name(self, size: tuple[int, int], buckets: int) -> str:
        """Key of its cached tar of crops of `size` (width, height)."""
        return f"{self.number:06d}.tar" if buckets == 1 else f"{self.number:06d}-{size[0]}x{size[1]}.tar"


def report_key(number: int) -> str:
    """Key of the report of a unit."""
    return f"units/{number:06d}.json"


@dataclass(frozen=True)
class Part:
    """Input shards that were planned together. source: their pattern, without the folders of a machine."""

    source: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The contract and all input shards of a destination."""

    contract: Contract
    parts: tuple[Part, ...]

    @property
    def names(self) -> list[str]:
        """Names of all units, in the order of their numbers."""
        return [name for part in self.parts for name in part.names]


def read_plan(storage: Storage) -> Plan | None:
    """The plan of a destination, or None when it has none yet. Raises DestinationExists when it cannot be read."""
    try:
        first = json.loads(storage.get(PLAN))
        contract = contract_from_json(first["contract"])
        later = [json.loads(storage.get(info.key)) for info in storage.list(f"{PARTS}/")]
        parts = tuple(Part(part["source"], tuple(part["units"])) for part in (first, *later))
        return Plan(contract, parts)
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DestinationExists(f"{storage.url}/{PLAN} cannot be read ({error}): choose another dest") from None


def agree(storage: Storage, contract: Contract, source: str, names: Sequence[str], finished: bool) -> Plan:
    """Begins a destination with this plan, extends the plan of a finished one, or checks that it was begun with this
    plan.

    finished: whether the manifest holds all parts of the plan. Raises DestinationExists when the plans differ.
    """
    part = Part(without_folders(source), tuple(names))
    plan = read_plan(storage)
    if plan is None:
        first = {"contract": asdict(contract), "source": part.source, "units": names}
        if storage.put_if_absent(PLAN, canonical_json(first)):
            return Plan(contract, (part,))
        plan = read_plan(storage)
        assert plan is not None
    differences = plan.contract.differences(contract)
    if differences:
        raise DestinationExists(
            f"{storage.url} was begun with other settings ({'; '.join(differences)}): use those, or choose another dest"
        )
    known = set(plan.names)
    added = [name for name in names if name not in known]
    if not added:
        if set(names) == known or tuple(names) == plan.parts[-1].names:
            return plan
        raise DestinationExists(_other_source(storage, plan, source, names))
    if not finished or (len(added) < len(names) and not known <= set(names)):
        raise DestinationExists(_other_source(storage, plan, source, names))
    part = replace(part, names=tuple(added))
    key = f"{PARTS}/{len(plan.parts) + 1:06d}.json"
    data = canonical_json({"source": part.source, "units": added})
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        raise DestinationExists(f"{storage.url}: others append to it at this moment ({key}): run this again later")
    return replace(plan, parts=(*plan.parts, part))


def _other_source(storage: Storage, plan: Plan, source: str, names: Sequence[str]) -> str:
    return (
        f"{storage.url} was begun with {len(plan.names)} input shards ({', '.join(part.source for part in plan.parts)})"
        f" that are not the {len(names)} of source={source}: give the same ones, or choose another dest (shards can be "
        "appended once it is finished)"
    )


def name_units(urls: Sequence[str]) -> list[str]:
    """Names for input shards: file names, preceded by as many folders as make all of them different.

    Raises SourceError when one is given twice.
    """
    paths = [url.split("/") for url in urls]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        repeated = [name for name, count in collections.Counter(names).items() if count > 1]
        if not repeated:
            return names
    raise SourceError(f"{repeated[0]} is given twice")


def find_inputs(manifest: Manifest, source: str, dataset: str) -> dict[int, tuple[Storage, str]]:
    """Finds the input shards of a dataset: their storage and key by unit number. source: their pattern, "" for the one
    in the manifest.

    Raises SourceError when shards are missing or differ from those of the manifest, and for a dataset that `latentmill
    index` made, whose images are unknown.
    """
    if manifest.adopted:
        raise SourceError(f"{dataset} was indexed from latents that were there: nothing says which images they are of")
    inputs = [place for pattern in ([source] if source else manifest.sources) for place in expand(pattern)]
    places = dict(zip(name_units([storage.locate(key) for storage, key in inputs]), inputs, strict=True))
    names = [unit.source for unit in manifest.units]
    if set(names) != set(places):
        raise SourceError(
            f"{source or ', '.join(manifest.sources)} is not what {dataset} was made from: give source= the "
            f"{len(names)} shards {names[0]} to {names[-1]}"
        )
    return {number: places[name] for number, name in enumerate(names)}
