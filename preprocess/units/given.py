"""What a call's source names: tars, tables and folders; and the units that they are made into.

A tar is a unit. Rows of a table and samples of a folder make units of `unit_size`. Tables are cut by themselves, so a
further file makes further units. A folder grows in place: what the plan of a destination says of it stays as it is
(preprocess/gathering/listing.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import DestinationExists, SourceError
from pipeline.storage.base import Storage
from pipeline.storage.braces import expand_braces
from pipeline.storage.globs import is_glob
from pipeline.storage.urls import open_storage
from preprocess.encoding.plan import Part, Plan
from preprocess.gathering.folder import Folder, FolderContents, list_folder
from preprocess.gathering.listing import pieces, read_listing
from preprocess.gathering.table import SUFFIXES, Table, TableContents, dataset_files
from preprocess.gathering.unit import unit_name
from preprocess.units import inputs
from preprocess.units.inputs import Input

ENDS = re.compile(r"\.[A-Za-z0-9]{1,8}")
"""How the names of objects end. What ends so in a bucket is no folder."""

OF_OTHERS = (".mds", ".mds.zstd", ".npz", ".safetensors", ".pt")
"""Ends of the names of files that other software caches, and that hold no pictures that are read."""


@dataclass(frozen=True)
class Cut:
    """How units are made of what is no tar: samples in each, and the column of a table's images ("" = found)."""

    unit_size: int = 1000
    image_column: str = ""


@dataclass
class Given:
    """What a source names. tars: each a unit. tables: files of rows. folders: listed once. late: number of samples of
    each folder that `units` made into no unit, since they came later."""

    source: str
    cut: Cut
    tars: list[Input] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    late: dict[str, int] = field(default_factory=dict)

    @property
    def is_gathered(self) -> bool:
        """Whether any unit is no tar."""
        return bool(self.tables or self.folders)

    def units(
        self, known: Mapping[str, Sequence[str]] | None = None, left_out: Container[str] = (), *, grown: bool = True
    ) -> list[Input]:
        """All units, in the order of their URLs. known: keys of the samples of folders that are planned, by unit.
        left_out: names of units whose files need not be there. grown: whether files that have come to a planned folder
        since are made into units. Raises SourceError."""
        found = [*self.tars, *_of_tables(self.tables, self.cut.unit_size)]
        for folder in self.folders:
            self.late.pop(folder.url, None)
            for piece in pieces(folder, self.cut.unit_size, known or {}, left_out):
                if piece.grown and not grown:
                    self.late[folder.url] = self.late.get(folder.url, 0) + len(piece.keys)
                    continue
                url = unit_name(folder.url, piece.number)
                contents = FolderContents(folder, piece.keys, url)
                size, real = folder.bytes_of(piece.keys), unit_name(folder.real, piece.number)
                found.append(Input(folder.storage, piece.name or url, url, real, size, contents, piece.name))
        return sorted(found, key=lambda one: one.url)

    def refuse_within(self, dest: Storage, datasets: Sequence[Storage]) -> None:
        """Raises DestinationExists where a folder lies in the destination, or the other way round."""
        inputs.refuse_within(self.source, self._files(), dest, datasets)
        root = dest.local_path("x")
        place = dest.url.rstrip("/") if root is None else os.path.realpath(root.parent)
        for folder in self.folders:
            if folder.is_local == (root is not None) and (_within(place, folder.real) or _within(folder.real, place)):
                raise DestinationExists(
                    f"source={self.source}: dest={dest.url} lies in that folder, or that folder in it, and encode "
                    "would take what it writes for samples: choose a dest outside"
                )

    def _files(self) -> list[Input]:
        tables = [Input(table.storage, table.key, table.url, table.real, table.bytes) for table in self.tables]
        return [*self.tars, *tables]


def look(source: str, cut: Cut) -> Given:
    """Finds what a source names. Lists each folder, and opens each table. Raises SourceError and StorageError."""
    given = Given(source, cut)
    names = [os.path.expanduser(name) if "://" not in name else name for name in expand_braces(source)]
    folders = [name for name in names if _is_folder(name)]
    if not folders:
        _add_files(given, inputs.find(source))
        return given
    for name in dict.fromkeys(names):
        if name not in folders:
            _add_files(given, inputs.find(name))
            continue
        storage = open_storage(name.rstrip("/") or "/")
        url = storage.url.rstrip("/") if "://" in name else os.path.abspath(storage.url)
        files = dataset_files(storage, url)
        if files is None:
            given.folders.append(list_folder(storage, url))
        else:
            _add_files(given, [_input(storage, key, url) for key in files])
    _refuse_twice(given)
    return given


def cut_of(plan: Plan | None, asked: Cut) -> Cut:
    """How the units of a plan were cut; as asked where it has none that were."""
    sizes = [Cut(part.unit_size, part.image_column) for part in (plan.parts if plan else ()) if part.unit_size]
    return sizes[0] if sizes else asked


def listed(storage: Storage, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Keys of the samples of all units of folders of a plan, by unit. Raises DestinationExists."""
    known: dict[str, tuple[str, ...]] = {}
    for part in plan.parts:
        if part.listing:
            known |= read_listing(storage, part.listing)
    return known


def require_cut(storage: Storage, parts: Iterable[Part], cut: Cut) -> None:
    """Raises DestinationExists where units of a plan were cut otherwise, since its rows would count twice."""
    for part in parts:
        if part.unit_size and (part.unit_size, part.image_column) != (cut.unit_size, cut.image_column):
            column = f" image_column={part.image_column}" if part.image_column != cut.image_column else ""
            raise DestinationExists(
                f"{storage.url} was begun with unit_size={part.unit_size}{column}, not unit_size={cut.unit_size}"
                f"{f' image_column={cut.image_column}' if column else ''}: use those, or choose another dest"
            )


def _of_tables(tables: Sequence[Table], unit_size: int) -> list[Input]:
    found = []
    for table in tables:
        for number, start in enumerate(range(0, table.opened.rows, unit_size)):
            count = min(unit_size, table.opened.rows - start)
            url, real = unit_name(table.url, number), unit_name(table.real, number)
            contents = TableContents(table, start, count, url)
            size = table.bytes_of(start, count)
            found.append(Input(table.storage, unit_name(table.key, number), url, real, size, contents))
    if tables and not found:
        raise SourceError(f"{tables[0].url}: it has no rows, nor has any other of the {len(tables)} tables")
    return found


def _add_files(given: Given, files: Iterable[Input]) -> None:
    for file in files:
        name = file.key.rpartition("/")[2].lower()
        if name == "index.json" or name.endswith(OF_OTHERS):
            raise SourceError(f"{file.url} is no tar, folder or table of pictures: {_advice(name)}")
        if name.endswith(SUFFIXES):
            given.tables.append(Table(file.storage, file.key, file.url, file.real, file.bytes, given.cut.image_column))
        else:
            given.tars.append(file)


def _advice(name: str) -> str:
    """What to do with a file that others cached."""
    latents = "latents are converted by `latentmill index dest=` (docs/how_to/convert_latents.md)"
    if ".mds" in name or name == "index.json":
        return f"pictures in MDS shards become tars by examples/mds_to_tars.py of the checkout, and {latents}"
    if name.endswith(".pt"):
        return f"{latents}, and SimpleTuner's .pt first by examples/simpletuner_latents.py of the checkout"
    return latents


def _input(storage: Storage, key: str, url: str) -> Input:
    path = storage.local_path(key)
    real = f"{url}/{key}" if path is None else os.path.realpath(path)
    if path is not None and not _within(real, os.path.realpath(url)):
        raise SourceError(f"{url}/{key} is a link to {real}, out of the folder: refused. Put the file itself there")
    return Input(storage, key, f"{url}/{key}", real, storage.stat(key).size)


def _refuse_twice(given: Given) -> None:
    """Raises SourceError for a folder that is given twice, or within another."""
    for i, one in enumerate(given.folders):
        for other in given.folders[i + 1 :]:
            if _within(one.real, other.real) or _within(other.real, one.real):
                raise SourceError(f"{one.url} and {other.url} are one folder, or one lies in the other: give it once")


def _within(place: str, folder: str) -> bool:
    """Whether a place is a folder or lies in it."""
    return f"{place.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def _is_folder(name: str) -> bool:
    """Whether a name is that of a folder with files for us: images, or a dataset on disk."""
    if "://" not in name:
        return not name.endswith(".tar") and os.path.isdir(name)
    if is_glob(name):
        return False
    if not name.endswith("/"):
        if ENDS.search(name.rpartition("/")[2]):
            return False
        folder, _, key = name.rpartition("/")
        if folder.count("/") >= 2 and open_storage(folder).exists(key):
            return False
    return bool(open_storage(name.rstrip("/")).list())
