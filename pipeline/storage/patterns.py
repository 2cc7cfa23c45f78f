"""The objects that a user's pattern names, on a local disk or on S3: braces, globs, and the sizes of the matches."""

from __future__ import annotations

import os
import re
from glob import glob
from itertools import takewhile
from pathlib import Path

from pipeline.errors import NotFound, SourceError
from pipeline.storage.base import TEMPORARY, Storage
from pipeline.storage.urls import open_storage, split_url


def expand(pattern: str) -> list[tuple[Storage, str]]:
    """(storage, key) of the objects that a pattern names, sorted by URL, each once.

    Braces ({00000..00009}, {a,b}) name objects that must all exist; globs (*, **, ?, [..]) name those that exist.
    Raises SourceError where nothing matches or where an object that braces name is missing.
    """
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise SourceError(f"{pattern}: the braces do not match") from error
    literal = sorted({name for name in names if not _is_glob(name)})
    missing = _missing(literal)
    if missing:
        if len(missing) == 1 and Path(missing[0]).is_dir():
            raise SourceError(
                f"{missing[0]} is a folder; name its shards, for example '{missing[0].rstrip('/')}/*.tar'"
            )
        count = f"{len(missing)} of the {len(literal)} shards" if len(literal) > 1 else "it"
        raise SourceError(f"{pattern}: {count} cannot be found, the first missing is {missing[0]}")
    urls = set(literal)
    for name in names:
        if _is_glob(name):
            urls.update(_glob(name))
    if not urls:
        raise SourceError(f"{pattern}: nothing matches")
    return _places(sorted(urls))


def sizes(places: list[tuple[Storage, str]]) -> list[int]:
    """Size in bytes of each object, in the given order. On S3 each root is listed once, from the common prefix of its
    keys, instead of one request per object. Raises SourceError that names the first missing object, StorageError."""
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


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def _glob(pattern: str) -> list[str]:
    """URLs that match a glob."""
    if "://" not in pattern:
        paths = glob(os.path.expanduser(pattern), recursive=True)
        return [path for path in paths if Path(path).is_file() and not TEMPORARY.fullmatch(Path(path).name)]
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    storage = open_storage(fixed)
    matches = _glob_regex(pattern[len(fixed) + 1 :]).fullmatch
    return [f"{fixed}/{info.key}" for info in storage.list() if matches(info.key)]


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression in which only ** crosses a slash."""
    pieces = re.findall(r"\*\*/?|\*|\?|\[[^\]]+\]|.", pattern)
    words = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = []
    for piece in pieces:
        if piece in words:
            parts.append(words[piece])
        elif len(piece) > 1:
            parts.append(piece.replace("[!", "[^").replace("\\", "\\\\"))
        else:
            parts.append(re.escape(piece))
    return re.compile("".join(parts))
