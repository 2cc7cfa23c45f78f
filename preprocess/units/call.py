"""What a call of encode asks for at a destination: units of what its source names, and a part of a plan of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.log import log
from pipeline.storage.base import Storage
from pipeline.storage.urls import without_folders
from preprocess.encoding.plan import Part, name_units
from preprocess.gathering.folder import FolderContents
from preprocess.gathering.listing import listing_bytes, listing_key
from preprocess.units.given import Given, listed, require_cut
from preprocess.units.inputs import Hashes, Input
from preprocess.units.state import State


@dataclass
class Call:
    """What a call asks for. source: its pattern. inputs: its units, once `settle` has made them of what is given."""

    source: str
    inputs: list[Input]
    leave_out: tuple[str, ...] = ()
    hashes: Hashes = field(default_factory=Hashes)
    given: Given | None = None
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def settle(self, state: State | None) -> None:
        """Makes the units of what is given, so that those of the plan stay what they are. What has come to a folder
        since makes further units where the plan is finished. state: None at a destination where nothing was begun,
        which gets the units of the one before it, if there is any. Raises SourceError and DestinationExists."""
        if self.given is None or (state is None and self.inputs):
            return
        if state is None:
            self.inputs = self.given.units()
            return
        if self.given.is_gathered:
            require_cut(state.storage, state.plan.parts, self.given.cut)
        self._known = listed(state.storage, state.plan)
        names = state.names
        left_out = {names[number] for number in (*state.left_out, *state.passed_over)} | set(self.leave_out)
        is_finished = state.manifest is not None and not state.pending
        self.inputs = self.given.units(self._known, left_out, grown=is_finished)
        for url, count in self.given.late.items():
            if url not in self._told:
                self._told.add(url)
                log.info(
                    f"encode: {url} holds {count:,} samples that it did not hold when this was begun: they are "
                    "appended by the same command once this is finished"
                )

    def part(self, names: Sequence[str], storage: Storage, inputs: Mapping[str, Input]) -> Part:
        """A part of a plan for units of these names. inputs: what they are, as far as they are given. Writes the list
        of the files that units of folders are made of."""
        source = without_folders(self.source)
        if self.given is None or not self.given.is_gathered:
            return Part(source, tuple(names))
        keys: dict[str, Sequence[str]] = {}
        for name in names:
            contents = inputs[name].contents if name in inputs else None
            if isinstance(contents, FolderContents):
                keys[name] = contents.keys
            elif name not in inputs and name in self._known:
                keys[name] = self._known[name]
        sha256 = ""
        if keys:
            data = listing_bytes(keys)
            sha256 = hashlib.sha256(data).hexdigest()
            storage.put_if_absent(listing_key(sha256), data)
        return Part(source, tuple(names), self.given.cut.unit_size, self.given.cut.image_column, sha256)

    def names(self, further: Sequence[int], taken: Sequence[str] = ()) -> list[str]:
        """Names for further units, by the indices of their inputs, that differ from `taken`. Raises SourceError."""
        settled = [self.inputs[i].name for i in further if self.inputs[i].name]
        others = [i for i in further if not self.inputs[i].name]
        named = iter(name_units([self.inputs[i].url for i in others], [*taken, *settled]))
        return [self.inputs[i].name or next(named) for i in further]
