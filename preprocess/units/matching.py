"""Finds which input shard is which unit of a dataset, whatever else a call names and wherever the data lie now.

The identity of a unit is its name in the plan, which never changes, and the SHA-256 of the shard that was read. A name
is the end of a path, so other shards may have it too: size and hash tell them apart.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.log import log
from preprocess.units.inputs import Hashes, Input

PROVED_BYTES = 64 * 1024 * 1024
"""Of input shards that have the names and sizes of units, so many bytes are hashed in each call to prove that they are
those; of each place one shard at the least."""
LOOKED_AT = 4
"""Shards of a place that are hashed before all of it counts as another place."""
LARGE = 1 << 30  # bytes; hashing more is told


@dataclass(frozen=True)
class Known:
    """What is known of the input shard of a unit that was encoded."""

    bytes: int
    sha256: str


@dataclass
class Matching:
    """units: unit number of an input, by its index. further: indices of inputs that are no unit yet. changed: of inputs
    that stand in the place of a unit's shard and are another: index and unit number."""

    units: dict[int, int] = field(default_factory=dict)
    further: list[int] = field(default_factory=list)
    changed: list[tuple[int, int]] = field(default_factory=list)


class Matcher:
    """Matches input shards with the units of a plan.

    names: of the units. known: of those that were encoded, by number. same_place: whether an input lies where the
    unit's shard lay, None where the plan does not say. alike: whether an input holds samples of the unit. proposed:
    units of an append that is not finished; while they are not encoded, their shards are told by name and place.
    """

    def __init__(
        self,
        names: Sequence[str],
        known: Mapping[int, Known],
        hashes: Hashes,
        same_place: Callable[[int, Input], bool | None],
        alike: Callable[[int, Input], bool],
        proposed: Container[int] = (),
    ) -> None:
        self.names, self.known, self.hashes = names, known, hashes
        self.same_place, self.alike, self.proposed = same_place, alike, proposed
        self._numbers = {name: number for number, name in enumerate(names)}
        self._depth = max((name.count("/") + 1 for name in names), default=0)

    def match(self, inputs: Sequence[Input]) -> Matching:
        """Matches all inputs of a call. Reads and hashes shards where names and sizes do not tell. Raises
        StorageError."""
        namesakes = [self.namesakes(shard) for shard in inputs]
        proposed: dict[int, int] = {}
        for i, units in enumerate(namesakes):
            fitting = [unit for unit in units if self._fits(unit, inputs[i])]
            if fitting:
                proposed[i] = fitting[0]
        claims = collections.Counter(proposed.values())
        doubtful = {i for i, unit in proposed.items() if claims[unit] > 1}
        doubtful |= self._disproved(inputs, {i: unit for i, unit in proposed.items() if i not in doubtful})
        found = Matching({i: unit for i, unit in proposed.items() if i not in doubtful})
        self._by_hash(inputs, namesakes, sorted(doubtful), found)
        self._classify(inputs, namesakes, found)
        return found

    def namesakes(self, shard: Input) -> list[int]:
        """Units whose name is an end of a shard's path, the longest first."""
        parts = shard.url.split("/")
        ends = ("/".join(parts[-depth:]) for depth in range(min(self._depth, len(parts)), 0, -1))
        return [self._numbers[end] for end in ends if end in self._numbers]

    def _fits(self, unit: int, shard: Input) -> bool:
        known = self.known.get(unit)
        if known is None:
            return unit not in self.proposed or self.same_place(unit, shard) is not False
        return known.bytes == shard.bytes

    def _place(self, unit: int, shard: Input) -> str:
        """Where the names of a shard's neighbours begin."""
        return shard.url.removesuffix(self.names[unit])

    def _disproved(self, inputs: Sequence[Input], proposed: Mapping[int, int]) -> set[int]:
        """Inputs of a unit's name and size that are another shard: those that are read, or all of a place at which
        none that is read is the unit's. Hashes PROVED_BYTES of them, the smallest of each place first."""
        places: dict[str, list[int]] = collections.defaultdict(list)
        neighbours: dict[str, list[int]] = collections.defaultdict(list)
        for i, unit in proposed.items():
            (places if unit in self.known else neighbours)[self._place(unit, inputs[i])].append(i)
        left, wrong = PROVED_BYTES, set[int]()
        for place, members in places.items():
            members.sort(key=lambda i: (inputs[i].bytes, i))
            read, differing = 0, list[int]()
            for i in members:
                doubted = read == len(differing) < LOOKED_AT and differing
                if read and inputs[i].bytes > left and not doubted:
                    break
                left -= inputs[i].bytes
                read += 1
                if self.hashes.of(inputs[i]) != self.known[proposed[i]].sha256:
                    differing.append(i)
            wrong.update([*members, *neighbours[place]] if read == len(differing) else differing)
        return wrong

    def _by_hash(
        self, inputs: Sequence[Input], namesakes: Sequence[Sequence[int]], doubtful: Iterable[int], found: Matching
    ) -> None:
        """Matches inputs that names and sizes leave in doubt, by their hashes."""
        doubtful = list(doubtful)
        taken = set(found.units.values())
        size = sum(inputs[i].bytes for i in doubtful)
        if size > LARGE:
            log.info(f"encode: reading {len(doubtful)} input shards ({size / 1e9:,.1f} GB) to tell them apart")
        for i in doubtful:
            units = [unit for unit in namesakes[i] if unit not in taken and self._fits(unit, inputs[i])]
            for unit in units:
                known = self.known.get(unit)
                if known is not None and known.sha256 == self.hashes.of(inputs[i]):
                    found.units[i] = unit
                    taken.add(unit)
                    break

    def _classify(self, inputs: Sequence[Input], namesakes: Sequence[Sequence[int]], found: Matching) -> None:
        """Sorts inputs that are no unit into changed and further ones."""
        taken = set(found.units.values())
        sure = {self._place(unit, inputs[i]) for i, unit in found.units.items() if unit in self.known}
        for i, shard in enumerate(inputs):
            if i in found.units:
                continue
            open_units = [unit for unit in namesakes[i] if unit not in taken and unit in self.known]
            if not open_units:
                found.further.append(i)
                continue
            unit = open_units[0]
            is_changed: bool | None
            if any(self._place(other, shard) in sure for other in open_units):
                is_changed = True
            else:
                is_changed = self.same_place(unit, shard)
            if is_changed is None:
                is_changed = self.alike(unit, shard)
            if is_changed:
                found.changed.append((i, unit))
            else:
                found.further.append(i)


def lies_at(pattern: str, shard: Input, folder: str) -> bool | None:
    """Whether a shard lies where a stored source pattern leads; None where that holds no folder.

    folder: of the process, for relative patterns.
    """
    remote = "://" in pattern
    if "/" not in pattern or pattern.count("{") != pattern.count("}") or len(pattern) > 4096:
        return None
    if remote != ("://" in shard.place):
        return False
    spelling = (pattern if remote else re.sub(r"/(?:\./|/)+", "/", pattern)).rstrip("/")
    try:
        fits = re.compile(_expression(spelling)).fullmatch
    except re.error:
        return None
    if remote:
        return bool(fits(shard.place))
    return bool(fits(os.path.relpath(shard.place, folder)))


def _expression(pattern: str) -> str:
    """A pattern with braces and globs as a regular expression; a range of numbers matches any."""
    parts, depth = [], 0
    for piece in re.findall(r"\{[^{},/]*\.\.[^{},/]*\}|\*\*/?|\[[^\]/]+\]|.", pattern.removeprefix("./")):
        if (piece.startswith("{") and len(piece) > 1) or piece in ("*", "?"):
            parts.append("[^/]" if piece == "?" else "[^/]*")
        elif piece in ("**", "**/"):
            parts.append("(?:.*/)?" if piece.endswith("/") else ".*")
        elif piece == "{":
            depth += 1
            parts.append("(?:")
        elif piece == "}" and depth:
            depth -= 1
            parts.append(")")
        elif piece == "," and depth:
            parts.append("|")
        elif piece.startswith("[") and len(piece) > 1:
            parts.append(piece.replace("[!", "[^").replace("\\", "\\\\"))
        else:
            parts.append(re.escape(piece))
    return "".join(parts)
