"""What a destination holds: its plan, the parts that a manifest holds, the reports, and what they say of each unit."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import dataclass, field

from pipeline.data.format.manifest import MANIFEST, Manifest, load_manifest
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import read
from pipeline.errors import DatasetError, DestinationExists, LatentmillError, NotFound, RecordRejected
from pipeline.storage.base import ObjectInfo, Storage
from preprocess.encoding.plan import Plan, read_plan, report_key
from preprocess.source.image import open_image
from preprocess.source.recipe import recipe_of_contract
from preprocess.source.sample import read_captions
from preprocess.units.inputs import Hashes, Input
from preprocess.units.matching import Known, Matcher, Matching, lies_at
from preprocess.units.reports import Report, read_heads

RECORDS_COMPARED, SAMPLES_COMPARED = 8, 64
"""Records of a unit, and samples of a shard, by which another version of a shard is told from another shard."""


@dataclass
class State:
    """A destination at one moment. version: parts of the plan that the manifest holds; 0 without one. listed: all its
    objects."""

    storage: Storage
    plan: Plan
    manifest: Manifest | None
    listed: list[ObjectInfo]
    reports: dict[int, Report]
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = self.plan.names

    @property
    def version(self) -> int:
        return 0 if self.manifest is None else self.manifest.version

    @property
    def base(self) -> range:
        """Units that the manifest holds."""
        return range(0 if self.manifest is None else len(self.manifest.units))

    @property
    def pending(self) -> range:
        """Units that were planned after that."""
        return range(len(self.base), len(self.names))

    @property
    def left_out(self) -> set[int]:
        """Units that are recorded as left out."""
        return {number for number, report in self.reports.items() if report.left_out}

    @property
    def encoded(self) -> set[int]:
        """Units that have the report of an encoded shard."""
        return self.reports.keys() - self.left_out

    @property
    def passed_over(self) -> set[int]:
        """Units that the manifest holds as left out."""
        units = () if self.manifest is None else self.manifest.units
        return {number for number, unit in enumerate(units) if unit.left_out}

    def known(self) -> dict[int, Known]:
        """What is known of the shards of encoded units."""
        known = {number: report.known for number, report in self.reports.items()}
        for number, unit in enumerate(() if self.manifest is None else self.manifest.units):
            if not unit.left_out:
                known[number] = Known(unit.source_bytes, unit.source_sha256)
        return {number: facts for number, facts in known.items() if facts is not None}

    def match(self, inputs: list[Input], hashes: Hashes) -> Matching:
        """Which input is which unit."""
        proposed = self.pending if self.manifest else ()
        return Matcher(self.names, self.known(), hashes, self._same_place, self._alike, proposed).match(inputs)

    def _same_place(self, number: int, shard: Input) -> bool | None:
        for part in self.plan.parts:
            if number < len(part.names):
                return lies_at(part.source, shard, os.getcwd())
            number -= len(part.names)
        return None

    def _alike(self, number: int, shard: Input) -> bool:
        """Whether a shard has samples of a unit: equal keys with equal captions, or without captions with images of
        equal sizes. A shard that cannot be read counts as one that has."""
        contract = self.plan.contract
        entries = () if self.manifest is None else enumerate(self.manifest.shards)
        own = [(i, entry.samples) for i, entry in entries if entry.unit == number and entry.samples]
        if not own or self.manifest is None:
            return False
        recipe = recipe_of_contract(contract)
        try:
            records = read(self.storage, self.manifest, own[0][0], range(min(RECORDS_COMPARED, own[0][1])), ())
            with shard.open(recipe.limits) as source:
                samples = list(itertools.islice(source.samples(), SAMPLES_COMPARED))
        except LatentmillError:
            return True
        found = set[tuple[str | int, ...]]()
        for sample in samples:
            try:
                if contract.caption_key:
                    found.add((sample.key, read_captions(sample, recipe)[0][0][1]))
                else:
                    found.add((sample.key, *sorted(open_image(sample.image(), recipe.limits).size)))
            except RecordRejected:
                continue
        if contract.caption_key:
            return any((record.meta["key"], record.meta["caption"]) in found for record in records)
        return any((record.meta["key"], *sorted(_size(record))) in found for record in records)


def _size(record: Record) -> tuple[int, int]:
    """Width and height of the image that a record was made from, as its json says; 0 where it does not."""
    width, height = (record.meta.get(name) for name in ("width", "height"))
    return (width if type(width) is int else 0, height if type(height) is int else 0)


def is_unchanged(state: State) -> bool:
    """Whether plan and manifest are still what they were. Cheaper than another look, which reads all reports."""
    if read_plan(state.storage) != state.plan:
        return False
    try:
        digest = hashlib.sha256(state.storage.get(MANIFEST)).hexdigest()
    except NotFound:
        return state.manifest is None
    return state.manifest is not None and state.manifest.digest == digest


def look(storage: Storage) -> State | None:
    """The state of a destination; None where nothing was begun. Raises DestinationExists for files that cannot be
    read, with what to do."""
    plan = read_plan(storage)
    if plan is None:
        return None
    listed = storage.list("")
    sizes = {info.key: info.size for info in listed}
    manifest = None
    if MANIFEST in sizes or storage.exists(MANIFEST):
        try:
            manifest = load_manifest(storage)
        except DatasetError as error:
            raise DestinationExists(f"{error}; delete it and run this again, which writes it anew") from None
        if [unit.source for unit in manifest.units] != plan.until(manifest.version).names:
            raise DestinationExists(
                f"{storage.url}: {MANIFEST} holds other input shards than the plan there: choose another dest"
            )
    names = plan.names
    reported = {number: sizes[key] for number in range(len(names)) if (key := report_key(number)) in sizes}
    return State(storage, plan, manifest, listed, read_heads(storage, reported, names))
