"""Numbers and names of classes: categories of others have numbers with holes, classes of encode have none."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.conditions.facts import MOST_BOX_CLASSES
from pipeline.conditions.names import read_names
from pipeline.config import ConvertConfig
from pipeline.errors import ConfigError, SourceError
from preprocess.converting.boxes import (
    EMPTY,
    FINE,
    OUTSIDE,
    UNREADABLE,
    BoxColumns,
    Boxes,
    blocks,
    by_image,
    settle,
)
from preprocess.converting.rejects import Rejects
from preprocess.encoding.rejects import LISTED
from preprocess.source.sample import FILTERED

GROUP = " (group)"
"""What is added to the name of a class of groups."""
UNKNOWN, OF_CLASS, OF_GROUP = range(OUTSIDE + 1, OUTSIDE + 4)
"""What a box may be besides: of no category, or of one, or of a group, that the user leaves out."""
REASONS = {
    UNKNOWN: "category_unknown",
    OF_CLASS: f"{FILTERED}leave_out",
    OF_GROUP: f"{FILTERED}crowds",
    UNREADABLE: "box_unreadable",
    EMPTY: "box_empty",
    OUTSIDE: "box_outside",
}
GONE = -2
"""Number of an image that was left out itself; -1 is that of one that does not exist."""


@dataclass(frozen=True)
class Categories:
    """The classes of boxes. ids: (n,) int64, sorted, the categories' own numbers. numbers: (n,) int64, the class of
    each, -1 where it is left out. crowds: as in ConvertConfig. names: of the classes, in order."""

    ids: np.ndarray
    numbers: np.ndarray
    crowds: str
    names: tuple[str, ...]

    @property
    def singles(self) -> int:
        """Number of classes that are no groups."""
        return int((self.numbers >= 0).sum())


def categories_of(names: Mapping[int, str], config: ConvertConfig, where: str) -> Categories:
    """The classes of categories by their own numbers, which are counted anew in this order from 0.

    where: what holds them, for messages. Raises ConfigError for a name to leave out that none has, and for more classes
    than boxes can have.
    """
    ids = sorted(names)
    for name in config.leave_out:
        if name not in names.values():
            near = difflib.get_close_matches(name, set(names.values()), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {len(ids)} names, such as {names[ids[0]]}"
            raise ConfigError(f"leave_out={name}: {where} has no class of this name; {hint}")
    kept = [number for number in ids if names[number] not in config.leave_out]
    numbers = {number: position for position, number in enumerate(kept)}
    told = [names[number] for number in kept]
    if config.crowds == "own":
        told += [f"{name}{GROUP}" for name in told]
    if len(told) > MOST_BOX_CLASSES + 1:
        hint = "give crowds=same or crowds=leave_out" if config.crowds == "own" else "leave some out with leave_out="
        raise ConfigError(
            f"{where}: boxes would have {len(told)} classes, {MOST_BOX_CLASSES + 1} at most can be stored; {hint}"
        )
    return Categories(
        np.array(ids, dtype=np.int64),
        np.array([numbers.get(number, -1) for number in ids], dtype=np.int64),
        config.crowds,
        tuple(told),
    )


def settled(
    columns: BoxColumns,
    images: np.ndarray,
    categories: Categories,
    files: Sequence[str],
    slack: np.ndarray | float,
    rejects: Rejects,
) -> Boxes:
    """The boxes that are kept, by image; the others are counted.

    columns: with edges as fractions. images: (N,) int64, the number of each box's image among `files`, GONE where that
    was left out itself, and anything below 0 where the box is counted already; what is left out is written there.
    """
    codes, classes = np.zeros(len(images), dtype=np.uint8), np.zeros(len(images), dtype=np.int16)
    for part in blocks(len(images)):
        codes[part], classes[part] = _settled_part(columns, images, categories, slack, part)
    for code, reason in REASONS.items():
        _count(rejects, codes == code, reason, columns, images, files)
    images[codes != FINE] = GONE
    return by_image(images, classes, columns.edges_N4, len(files))


def _settled_part(
    columns: BoxColumns, images: np.ndarray, categories: Categories, slack: np.ndarray | float, part: slice
) -> tuple[np.ndarray, np.ndarray]:
    """What is wrong with some boxes, and their classes."""
    mine, groups = images[part], columns.column("group")[part] > 0
    own = _places(columns.column("category")[part], categories.ids)
    classes = np.full(len(own), -1, dtype=np.int64)
    if len(categories.ids):
        classes = np.where(own >= 0, categories.numbers[np.maximum(own, 0)], -1)
    codes = np.where(own < 0, UNKNOWN, np.where(classes < 0, OF_CLASS, FINE)).astype(np.uint8)
    if categories.crowds == "leave_out":
        codes[groups & (codes == FINE)] = OF_GROUP
    if categories.crowds == "own":
        classes[groups & (classes >= 0)] += categories.singles
    looked_at = np.where(codes == FINE, mine, GONE)
    codes = np.maximum(codes, settle(columns.edges_N4[part], looked_at, slack))
    codes[mine < 0] = FINE
    return codes, classes


def _places(values: np.ndarray, sorted_ids: np.ndarray) -> np.ndarray:
    """The place of each value in sorted numbers, -1 where it is not among them."""
    if not len(sorted_ids):
        return np.full(len(values), -1, dtype=np.int64)
    places = np.minimum(np.searchsorted(sorted_ids, values), len(sorted_ids) - 1)
    return np.where(sorted_ids[places] == values, places, -1)


def _count(
    rejects: Rejects, found: np.ndarray, reason: str, columns: BoxColumns, images: np.ndarray, files: Sequence[str]
) -> None:
    """Counts the boxes (N,) bool under a reason, with their edges and categories."""
    rows = np.flatnonzero(found)
    category = columns.column("category")
    for row in rows[:LISTED].tolist():
        edges = ", ".join(f"{edge:.6g}" for edge in columns.edges_N4[row].tolist())
        rejects.add(files[images[row]], reason, f"category {category[row]}, [{edges}] of the image")
    if len(rows) > LISTED:
        rejects.counts[reason] += len(rows) - LISTED


def in_files(values: np.ndarray, ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The number of each value's image: that of its id (ids: sorted), -1 where there is no such id."""
    found = np.full(len(values), -1, dtype=np.int64)
    for part in blocks(len(values) if len(ids) else 0):
        places = _places(values[part], ids)
        found[part] = np.where(places >= 0, numbers[np.maximum(places, 0)], -1)
    return found


def names_file(names: Sequence[str], what: str) -> bytes:
    """Names as a file that encode takes, a line each. what: whose names they are, for messages. Raises SourceError for
    a name that such a file cannot hold."""
    data = "".join(f"{name.strip()}\n" for name in names).encode("utf-8", "replace")
    try:
        if list(read_names(data, f"{what}.txt")) != [name.strip() for name in names]:
            raise ConfigError("one of them has several lines")
    except ConfigError as error:
        raise SourceError(f"the names of {what} cannot be stored: {error}") from None
    return data
