"""The samples of each unit of a folder, as they were when it was planned: `plans/files-SHA256.json`.

A folder grows, and its sorted list with it. So that earlier units stay what they are, the part of a plan that gathers
a folder names the SHA-256 of a list of keys by unit; what is not in it becomes further units. The list lies under its
own hash before the plan names it, so that no worker ever sees a plan without it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.data.format.contract import canonical_json
from pipeline.errors import DestinationExists, NotFound, ParseError, SourceError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from preprocess.gathering.folder import Folder
from preprocess.gathering.unit import split_unit, unit_name

FOLDER = "plans"
LISTING = re.compile(rf"{FOLDER}/files-[0-9a-f]{{64}}\.json")
MOST_BYTES = 1 << 29
"""Bytes of a list: some ten million samples."""


@dataclass(frozen=True)
class _Listing:
    format: Literal[1]
    units: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Piece:
    """The samples of one unit. name: where the plan settles it, or "". number: of the unit among those of its folder.
    grown: whether they came to a folder that was planned before."""

    name: str
    number: int
    keys: list[str]
    grown: bool = False


def listing_key(sha256: str) -> str:
    """Key of a list."""
    return f"{FOLDER}/files-{sha256}.json"


def listing_bytes(units: Mapping[str, Sequence[str]]) -> bytes:
    """The file of a list. units: keys of samples by the name of their unit. Raises SourceError for too many."""
    data = canonical_json({"format": 1, "units": {name: list(keys) for name, keys in units.items()}})
    if len(data) > MOST_BYTES:
        raise SourceError(f"the list of files takes {len(data):,} bytes, {MOST_BYTES:,} at most: pack them into tars")
    return data


def read_listing(storage: Storage, sha256: str) -> dict[str, tuple[str, ...]]:
    """The keys of samples by unit. Raises DestinationExists for a list that is gone or damaged."""
    key = listing_key(sha256)
    try:
        data = storage.get(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ParseError("its SHA-256 is another one")
        return build(_Listing, parse_json(data, MOST_BYTES)).units
    except (NotFound, ParseError) as error:
        raise DestinationExists(
            f"{storage.locate(key)}, the list of files that its units are made of, cannot be read ({error}): restore "
            "it, or choose another dest"
        ) from None


def known_units(url: str, known: Mapping[str, Sequence[str]], keys: Container[str]) -> dict[str, Sequence[str]]:
    """Units of a plan that are of this folder, in the order of their numbers: those whose name begins as its path ends,
    if it holds any of their samples.

    url: of the folder. known: keys of samples by unit. keys: of the samples that the folder holds now.
    """
    by_prefix: dict[str, dict[str, Sequence[str]]] = {}
    for name, own in known.items():
        prefix = split_unit(name)[0]
        if url == prefix or url.endswith(f"/{prefix}"):
            by_prefix.setdefault(prefix, {})[name] = own
    for prefix in sorted(by_prefix, key=len, reverse=True):
        units = by_prefix[prefix]
        if any(key in keys for own in units.values() for key in own):
            return dict(sorted(units.items(), key=lambda unit: split_unit(unit[0])[1]))
    return {}


def pieces(folder: Folder, unit_size: int, known: Mapping[str, Sequence[str]], left_out: Container[str]) -> list[Piece]:
    """The units of a folder: those of the plan with their samples, then what has come since, sorted, in units of
    `unit_size` samples.

    known: keys of samples by unit, of the whole plan. left_out: names of units whose files need not be there. Raises
    SourceError for a sample of a unit that is gone.
    """
    keys = folder.keys()
    present = set(keys)
    planned = known_units(folder.url, known, present)
    found, number = list[Piece](), 0
    for name, own in planned.items():
        number = max(number, split_unit(name)[1] + 1)
        gone = next((key for key in own if key not in present), None)
        if gone is None:
            found.append(Piece(name, split_unit(name)[1], list(own)))
        elif name not in left_out:
            raise SourceError(
                f"{folder.url}/{gone} is gone, with all its files: the unit {name} is made of it. Put it back; or, if "
                "this is another folder, or only what came later is to be encoded, give that in a folder of another "
                "name"
            )
    prefix = split_unit(next(iter(planned)))[0] if planned else ""
    taken = {key for own in planned.values() for key in own}
    rest = [key for key in keys if key not in taken]
    for start in range(0, len(rest), unit_size):
        name = unit_name(prefix, number) if planned else ""
        found.append(Piece(name, number, rest[start : start + unit_size], grown=bool(planned)))
        number += 1
    return found
