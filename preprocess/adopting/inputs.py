"""The units of what `latentmill index dest=` converts: a tar, a shard of an MDS dataset, or some files of arrays each.

Which kind a source is follows from the names that it matches. Units are in the order of their URLs, and named as those
of `encode`: by as much of a path as tells them apart.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from pipeline.config import LimitsConfig
from pipeline.config.values.members import CONTAINERS
from pipeline.data.format.contract import Conversion
from pipeline.data.format.records import walk
from pipeline.errors import ConfigError, ShardCorrupt
from pipeline.storage.base import Storage
from preprocess.adopting.arrays import Foreign
from preprocess.adopting.loose import TEXT_OUTPUTS, LooseFile, LooseUnit
from preprocess.adopting.mds import INDEX, MdsFacts, MdsShard, read_mds_index
from preprocess.adopting.scan import RECORD_MEMBERS, LatentShard
from preprocess.encoding.plan import name_units
from preprocess.source.shard import KEY_LENGTH
from preprocess.units.inputs import find

Kind = Literal["tar", "mds", "npz", "safetensors"]


class Reader(Protocol):
    """What reads a unit: once `records` has ended, sha256 and bytes are those of all of it."""

    bytes: int

    @property
    def sha256(self) -> str: ...
    def records(self) -> Iterator[Foreign]: ...


class Opener(Protocol):
    """Opens a unit."""

    def __call__(self, limits: LimitsConfig) -> AbstractContextManager[Reader]: ...


@dataclass(frozen=True)
class Input:
    """One unit. where: its place, for messages."""

    name: str
    where: str
    open: Opener


class TarShard(LatentShard):
    """A tar of records, which may have any files."""

    def records(self) -> Iterator[Foreign]:
        """Yields the records in order. Raises ShardCorrupt."""
        seen = set[str]()
        for key, _, data, names in self.groups():
            if not key:
                self.passed_over += len(names)
                continue
            repeated = next((name for name, count in collections.Counter(names).items() if count > 1), "")
            if key in seen:
                yield Foreign(key, reason="key_repeated", detail="a record of this key stands in the tar before")
            elif repeated:
                yield Foreign(key, reason="member_repeated", detail=f"{repeated} is there twice")
            elif len(key) > KEY_LENGTH:
                detail = f"its name has more than {KEY_LENGTH} characters"
                yield Foreign(key[:100], reason="key_too_long", detail=detail)
            elif not data:
                detail = f"it has more than {RECORD_MEMBERS} x limits.member_bytes"
                yield Foreign(key, reason="record_too_large", detail=detail)
            else:
                yield self._record(key, memoryview(data))
            seen.add(key)

    @staticmethod
    def _record(key: str, data: memoryview) -> Foreign:
        try:
            files = {name: data[start : start + size] for _, name, start, size in walk(data)}
        except ShardCorrupt as error:
            return Foreign(key, reason="member_unreadable", detail=str(error))
        return Foreign(key, files)


def kind_of(source: str) -> tuple[Kind, list[tuple[Storage, str]]]:
    """The kind of what a pattern names, and the objects. Raises ConfigError for a mixture, or another kind."""
    places = [(found.storage, found.key) for found in find(source)]
    kinds: dict[str, str] = {}
    for storage, key in places:
        base = key.rpartition("/")[2]
        end = base.rpartition(".")[2].lower()
        kind = "mds" if base == INDEX else end if end in ("tar", *CONTAINERS) else ""
        kinds.setdefault(kind, storage.locate(key))
    if "" in kinds:
        hint = f": name the {INDEX} beside it" if kinds[""].endswith(".mds") else ""
        if kinds[""].endswith(".pt"):
            hint = (
                ": pickles are never opened; SimpleTuner's become .safetensors by examples/simpletuner_latents.py of "
                "the checkout"
            )
        raise ConfigError(
            f"source={source}: {kinds['']} is none of what is converted (.tar, .npz, .safetensors, the {INDEX} of MDS "
            f"shards){hint}"
        )
    if len(kinds) > 1:
        raise ConfigError(f"source={source} names several kinds ({', '.join(sorted(kinds.values()))}): name one")
    found: dict[str, Kind] = {"tar": "tar", "mds": "mds", "npz": "npz", "safetensors": "safetensors"}
    return found[next(iter(kinds))], places


def inputs_of(kind: Kind, places: list[tuple[Storage, str]], facts: Conversion, caption_key: str) -> list[Input]:
    """The units, in order. facts: what is read of each record. caption_key: "" where captions are not read. Raises
    SourceError and ConfigError."""
    if kind == "tar":
        names = name_units([storage.locate(key) for storage, key in places])
        return [
            Input(name, storage.locate(key), partial(TarShard, storage, key))
            for name, (storage, key) in zip(names, places, strict=True)
        ]
    if kind == "mds":
        shards = []
        for storage, key in places:
            folder = key.rpartition("/")[0]
            for shard in read_mds_index(storage, key):
                shards.append((storage, f"{folder}/{shard.raw_data.basename}".lstrip("/"), shard))
        names = name_units([storage.locate(key) for storage, key, _ in shards])
        return [
            Input(name, storage.locate(key), partial(_open_mds, storage, key, shard))
            for name, (storage, key, shard) in zip(names, shards, strict=True)
        ]
    return _loose(kind, places, facts, caption_key)


def _open_mds(storage: Storage, key: str, shard: MdsFacts, limits: LimitsConfig) -> MdsShard:
    return MdsShard(storage, key, shard, limits)


def _loose(kind: Kind, places: list[tuple[Storage, str]], facts: Conversion, caption_key: str) -> list[Input]:
    """Units of facts.unit_size files."""
    beside = beside_of(kind, facts, caption_key)
    urls = [storage.locate(key) for storage, key in places]
    start = len(common_folder(urls))
    files = [
        LooseFile(storage, key, url[start:])
        for (storage, key), url in zip(places, urls, strict=True)
        if not url.endswith(TEXT_OUTPUTS)
    ]
    if not files:
        raise ConfigError(f"{urls[0]}: of text states no latents can be made; name the files of latents")
    groups = [files[i : i + facts.unit_size] for i in range(0, len(files), facts.unit_size)]
    return [
        Input(f"{group[0].name}..{group[-1].name}", group[0].storage.locate(group[0].key), _opener(group, beside))
        for group in groups
    ]


def _opener(group: list[LooseFile], beside: list[str]) -> Opener:
    return lambda limits: LooseUnit(group, beside, limits)


def beside_of(kind: str, facts: Conversion, caption_key: str) -> list[str]:
    """The ends of the names of files that lie beside each file of arrays. Raises ConfigError when all do."""
    wanted = [facts.moments_member, facts.logvar_member, facts.text_member, facts.class_member, facts.boxes_member]
    names = [place.partition(":")[0] for place in [*wanted, caption_key] if place]
    if names[0].lower() != kind:
        raise ConfigError(
            f"moments_member={facts.moments_member}: source= names files that end in .{kind}, so {kind}:ARRAY is "
            f"wanted, such as {kind}:latents"
        )
    return list(dict.fromkeys(name for name in names if name != names[0]))


def common_folder(urls: list[str]) -> str:
    """The longest folder that all URLs begin with, and its slash; "" without any."""
    first, last = min(urls), max(urls)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(min(first, last)))
    return first[: first.rfind("/", 0, same) + 1]


def refuse_within(dest: str, places: list[tuple[Storage, str]]) -> None:
    """Raises ConfigError when something that is read lies in the new cache."""
    root = _absolute(dest)
    for storage, key in places:
        url = _absolute(storage.locate(key))
        if url.startswith(f"{root}/"):
            raise ConfigError(f"dest={dest}: {url} is read and lies in it; choose another folder")


def _absolute(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(Path(url).expanduser().resolve())
