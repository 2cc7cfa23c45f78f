"""The objects that a pattern of a user names, on a local disk or in a bucket: braces, globs, and their sizes."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

from pipeline.errors import NotFound, SourceError
from pipeline.storage.base import Storage
from pipeline.storage.braces import expand_braces
from pipeline.storage.globs import is_glob, key_matches, local_matches
from pipeline.storage.urls import open_storage, split_url


def expand(pattern: str) -> list[tuple[Storage, str]]:
    """(storage, key) of the objects that a pattern names, sorted by URL, each once.

    Braces ({00000..00009}, {a,b}) name objects that must all exist; globs (*, **, ?, [..]) name those that exist.
    A name that is there is meant as it is, brackets and all. Raises SourceError where nothing matches, where an object
    that braces name is missing, and where something matches that cannot be read.
    """
    names = [os.path.expanduser(name) if "://" not in name else name for name in expand_braces(pattern)]
    for name in names[:1]:
        _refuse_other_notations(pattern, name)
    plain = {name for name in names if not is_glob(name) or ("://" not in name and os.path.isfile(name))}
    for name in plain:
        _refuse_names(name)
    missing = _missing(sorted(plain))
    if missing:
        raise SourceError(f"{pattern}: {_missing_text(pattern, missing, len(plain))}")
    urls = set(plain)
    for name in names:
        if name not in plain:
            urls.update(_glob(name))
    if not urls:
        hint = "; for a bracket that is part of a name, write [[]" if "[" in pattern else ""
        raise SourceError(f"{pattern}: nothing matches{hint}")
    for url in urls - plain:
        _refuse_names(url)
    return _places(sorted(urls))


def sizes(places: list[tuple[Storage, str]]) -> list[int]:
    """Size in bytes of each object, in the given order. In a bucket each root is listed once, from the common prefix of
    its keys, instead of one request per object. Raises SourceError that names the first missing one, StorageError."""
    listed = _listed(places)
    object_sizes = []
    for storage, key in places:
        try:
            object_sizes.append(listed[storage.url][key] if storage.url in listed else storage.stat(key).size)
        except (KeyError, NotFound) as error:
            raise SourceError(f"{storage.locate(key)} cannot be found") from error
    return object_sizes


def _places(urls: list[str]) -> list[tuple[Storage, str]]:
    """(storage, key) of each URL; URLs under one root share their storage."""
    roots: dict[str, Storage] = {}
    places = []
    for root, key in map(split_url, urls):
        if root not in roots:
            roots[root] = open_storage(root)
        places.append((roots[root], key))
    return places


def _listed(places: list[tuple[Storage, str]]) -> dict[str, dict[str, int]]:
    """Root -> key -> size in bytes, for every root that is not on a local disk, by one listing of the keys' common
    prefix."""
    keys: dict[str, list[str]] = {}
    storages = {}
    for storage, key in places:
        if storage.local_path(key) is None:
            storages[storage.url] = storage
            keys.setdefault(storage.url, []).append(key)
    listed = {}
    for root, storage in storages.items():
        first, last = min(keys[root]), max(keys[root])
        start = "".join(character for character, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))
        listed[root] = {info.key: info.size for info in storage.list(start)}
    return listed


def _missing(urls: list[str]) -> list[str]:
    """The URLs at which nothing exists."""
    missing = [url for url in urls if "://" not in url and not Path(url).expanduser().is_file()]
    remote = _places([url for url in urls if "://" in url])
    listed = _listed(remote)
    return missing + [storage.locate(key) for storage, key in remote if key not in listed[storage.url]]


def _missing_text(pattern: str, missing: list[str], count: int) -> str:
    """What a message says about names at which nothing is."""
    first = missing[0]
    if "," in pattern and "{" not in pattern:
        return f"{first} cannot be found; several patterns are written as one, {{a.tar,b.tar}}"
    if len(missing) == 1 and "://" not in first and Path(first).is_dir():
        return f"{first} is a folder; name its shards, for example '{first.rstrip('/')}/*.tar'"
    if "://" not in first and os.path.lexists(first):
        return f"{first} is no file but a link to nothing, a pipe, a socket or a device"
    shards = f"{len(missing)} of the {count} shards" if count > 1 else "it"
    return f"{shards} cannot be found, the first missing is {first}"


def _refuse_other_notations(pattern: str, name: str) -> None:
    """Raise SourceError for what other programs read and this one does not."""
    if name.startswith("pipe:"):
        raise SourceError(f"{pattern}: commands (pipe:) are not run; give paths, or s3://, gs:// or az:// URLs")
    if "::" in name:
        raise SourceError(f"{pattern}: several patterns are written as one, {{a.tar,b.tar}}, not a.tar::b.tar")


def _refuse_names(url: str) -> None:
    """Raise SourceError for a name that cannot be stored in a plan or asked for."""
    try:
        url.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{url}: its name is not UTF-8; rename it") from None
    if "://" in url and "//" in url.split("://", 1)[1]:
        raise SourceError(f"{url}: two slashes in a key are not supported; copy the object to another key")


def _glob(pattern: str) -> list[str]:
    """URLs that match a glob."""
    if "://" not in pattern:
        return local_matches(pattern)
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    if fixed.count("/") < 2:
        raise SourceError(f"{pattern}: the name of a bucket is written out")
    return [f"{fixed}/{key}" for key in key_matches(open_storage(fixed), pattern[len(fixed) + 1 :])]
