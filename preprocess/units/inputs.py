"""The input shards that a call names: each once, under one spelling, and none of them where encode writes."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import LimitsConfig
from pipeline.errors import DestinationExists, SourceError
from pipeline.storage.base import Storage
from pipeline.storage.patterns import expand, sizes
from preprocess.gathering.unit import Contents, SourceUnit, split_unit
from preprocess.source.shard import SourceShard

HASHED_AT_ONCE = 8 * 1024 * 1024  # bytes
PRODUCTS = ("000000.tar", "000000-64x64.tar")
"""Names such as encode gives to its tars."""


@dataclass(frozen=True)
class Input:
    """One input shard. url: its absolute path, with links as they were given, or its s3:// URL. real: the same with all
    links followed. bytes: its size.

    Of files of a folder or rows of a table, `contents` is what they are; key, url and real end in @ and the unit's
    number. name: in the plan, where that is settled.
    """

    storage: Storage
    key: str
    url: str
    real: str
    bytes: int
    contents: Contents | None = field(default=None, repr=False, compare=False)
    name: str = ""

    def open(self, limits: LimitsConfig, name: str = "", stopped: threading.Event | None = None) -> SourceUnit:
        """The unit, to be read. name: in the plan, for advice. Raises NotFound, StorageError."""
        if self.contents is None:
            return SourceShard(self.storage, self.key, limits, name, stopped)
        return self.contents.open(limits, name, stopped)

    @property
    def place(self) -> str:
        """URL of what a source names: the tar, the table or the folder."""
        return self.url if self.contents is None else split_unit(self.url)[0]

    def sha256(self) -> str:
        """SHA-256 of all its bytes, or of the names and contents that it was gathered from. Reads it. Raises
        StorageError."""
        if self.contents is not None:
            with self.contents.open(LimitsConfig(), "", None) as unit:
                for _ in unit.samples():
                    pass
                return unit.sha256
        digest = hashlib.sha256()
        for start in range(0, self.bytes, HASHED_AT_ONCE):
            digest.update(self.storage.get_range(self.key, start, min(HASHED_AT_ONCE, self.bytes - start)))
        return digest.hexdigest()


@dataclass
class Hashes:
    """SHA-256 of input shards; each is read once."""

    _known: dict[str, str] = field(default_factory=dict)

    def of(self, shard: Input) -> str:
        """SHA-256 of all its bytes. Raises StorageError."""
        if shard.url not in self._known:
            self._known[shard.url] = shard.sha256()
        return self._known[shard.url]


def find(source: str) -> list[Input]:
    """The shards that a pattern names, in the order of their URLs as they were spelt.

    A shard that is spelt in two ways ('a/0.tar', './a//0.tar') counts once. Raises SourceError for one file under two
    names (links), since its samples would count twice, and where `expand` does.
    """
    places = expand(source)
    inputs: dict[str, Input] = {}
    folders: dict[str, str] = {}
    for (storage, key), size in zip(places, sizes(places), strict=True):
        url = real = absolute(storage, key)
        if storage.local_path(key) is not None:
            folder, name = os.path.split(url)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            real = os.path.realpath(url) if os.path.islink(url) else os.path.join(folders[folder], name)
        inputs.setdefault(url, Input(storage, key, url, real, size))
    seen: dict[object, Input] = {}
    for shard in inputs.values():
        for identity in _identities(shard):
            other = seen.setdefault(identity, shard)
            if other is not shard:
                raise SourceError(f"{shard.url} and {other.url} are one file: give it once, under one name")
    return list(inputs.values())


def absolute(storage: Storage, key: str) -> str:
    """The URL of an object, and of a local file its absolute path, without '.', '..' and doubled slashes."""
    place = storage.locate(key)
    return place if storage.local_path(key) is None else os.path.abspath(os.path.expanduser(place))


def _identities(shard: Input) -> list[object]:
    """What is equal for two names of one object."""
    identities: list[object] = [shard.real]
    if shard.storage.local_path(shard.key) is not None:
        status = os.stat(shard.url)
        if status.st_nlink > 1 and stat.S_ISREG(status.st_mode):
            identities.append((status.st_dev, status.st_ino))
    return identities


# --------------------------------------------------------------------------------------------------------------------
# Inputs and the destination


def refuse_within(source: str, inputs: Sequence[Input], dest: Storage, datasets: Sequence[Storage]) -> None:
    """Raises DestinationExists when an input lies under the destination, or when the pattern would name what encode
    writes there, since a rerun would then take that for shards.

    dest: the destination; datasets: it, or those under it of several resolutions.
    """
    root = dest.local_path("x")
    advice = "choose a dest outside of the folders that source= names, or name the shards so that it is left out"
    folder = dest.url if root is None else os.path.realpath(root.parent)
    above: dict[str, set[tuple[int, int]]] = {}
    for shard in inputs:
        if (shard.storage.local_path(shard.key) is None) != (root is None):
            continue
        within = shard.real.startswith(f"{folder.rstrip('/')}/")
        if within or (root is not None and _is_below(os.path.dirname(shard.real), root.parent, above)):
            raise DestinationExists(
                f"source={source}: {shard.url} lies under dest={dest.url}, where encode writes: {advice}"
            )
    for pattern in _patterns(source):
        for dataset in datasets:
            for name in PRODUCTS:
                if _names(pattern, dataset, name):
                    raise DestinationExists(
                        f"source={source} would also name what encode writes to dest={dest.url} "
                        f"({dataset.locate(name)}): {advice}"
                    )


def _is_below(folder: str, dest: Path, above: dict[str, set[tuple[int, int]]]) -> bool:
    """Whether the destination is a local folder, or one above it, under another path, as by a mount. above: device and
    inode of a folder and of all above it, as far as they are known."""
    try:
        wanted = os.stat(dest)
    except OSError:
        return False
    if folder not in above:
        statuses = [path.stat() for path in (Path(folder), *Path(folder).parents)]
        above[folder] = {(status.st_dev, status.st_ino) for status in statuses}
    return (wanted.st_dev, wanted.st_ino) in above[folder]


def _patterns(source: str) -> list[str]:
    """The globs that a source names; its braces were expanded before, so their number is bounded."""
    from braceexpand import braceexpand

    return [name for name in braceexpand(source, escape=False) if re.search(r"[*?\[]", name)]


def _names(pattern: str, dataset: Storage, name: str) -> bool:
    """Whether a glob names an object of a dataset, should it exist."""
    path = dataset.local_path(name)
    if ("://" in pattern) != (path is None):
        return False
    if path is None:
        return _fits(pattern.split("/"), dataset.locate(name).split("/"), hidden=True)
    fixed, special = _split(os.path.expanduser(pattern).split("/"))
    start = os.path.realpath("/".join(fixed) or ("/" if pattern.startswith("/") else "."))
    real_path = os.path.join(os.path.realpath(path.parent), name)
    return _fits([*start.rstrip("/").split("/"), *special], real_path.split("/"), hidden=False)


def _split(parts: list[str]) -> tuple[list[str], list[str]]:
    """The parts of a glob before the first with a special character, and the rest."""
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    return parts[:first], [part for part in parts[first:] if part]


def _fits(pattern: Sequence[str], parts: Sequence[str], hidden: bool) -> bool:
    """Whether the parts of a path match those of a glob. hidden: whether wildcards match names that begin with a
    dot."""
    reached = {0}  # numbers of parts that the pattern so far may have taken
    for piece in pattern:
        if piece == "**":
            further = set(reached)
            for at in reached:
                while at < len(parts) and (hidden or not parts[at].startswith(".")):
                    at += 1
                    further.add(at)
            reached = further
            continue
        shown = hidden or piece.startswith(".")
        reached = {
            at + 1
            for at in reached
            if at < len(parts) and fnmatch.fnmatchcase(parts[at], piece) and (shown or not parts[at].startswith("."))
        }
    return len(parts) in reached
