"""Globs: *, ?, [..] within a name and ** across folders, on a local disk and over the keys of a bucket."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.storage.base import TEMPORARY, Storage

SHOWN = 3
"""Names that a refusal shows."""


def is_glob(name: str) -> bool:
    """Whether `name` has a character that a glob gives a meaning."""
    return any(character in name for character in "*?[")


def local_matches(pattern: str) -> list[str]:
    """Paths of the files that match, in no order. Names that begin with a dot match only a part that does.

    Raises SourceError, which names the first of them, for what matches and cannot be read (a dangling link, a pipe, a
    device) and for a folder that may not be listed: a shard must not be left out without a word.
    """
    matches, wrong = [], []
    parts = [part for part in pattern.split("/") if part]
    for path in _walk("/" if pattern.startswith("/") else "", parts, ()):
        if TEMPORARY.fullmatch(Path(path).name):
            continue
        if os.path.isfile(path):
            matches.append(path)
        elif not os.path.isdir(path):
            wrong.append(f"{path} ({_what(path)})")
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise SourceError(
            f"{pattern}: {len(wrong)} of what matches cannot be read: {', '.join(sorted(wrong)[:SHOWN])}{more}. "
            "Restore them, or remove them if they are not wanted"
        )
    return matches


def key_matches(storage: Storage, pattern: str) -> list[str]:
    """Keys of the storage that match."""
    matches = glob_regex(pattern).fullmatch
    return [info.key for info in storage.list() if matches(info.key)]


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression in which only ** crosses a slash. Raises SourceError for [..] that has no
    meaning, such as [b-a]."""
    pieces = re.findall(r"\*\*/?|\*|\?|\[!?\]?[^\]/]*\]|.", pattern, re.DOTALL)
    words = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = []
    for piece in pieces:
        if piece in words:
            parts.append(words[piece])
        elif len(piece) > 1:
            negated, members = piece[1] == "!", piece[1:-1].removeprefix("!")
            escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", members)
            parts.append(f"[{'^/' if negated else ''}{escaped}]")
        else:
            parts.append(re.escape(piece))
    try:
        return re.compile("".join(parts), re.DOTALL)
    except re.error as error:
        raise SourceError(f"{pattern}: {error}; [..] lists characters, as in [0-4]") from None


def _walk(folder: str, parts: list[str], above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths under `folder` ("" is the current one, otherwise it ends in "/") that match the parts of a pattern. above:
    the folders, by device and inode, that ** has come through, so that a link to one of them is no endless way."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        status = os.stat(folder or ".")
        if (status.st_dev, status.st_ino) in above:
            return
        above = (*above, (status.st_dev, status.st_ino))
        yield from _walk(folder, rest, ()) if rest else ()
        for entry in _entries(folder):
            if not entry.name.startswith("."):
                if entry.is_dir():
                    yield from _walk(f"{folder}{entry.name}/", parts, above)
                elif not rest:
                    yield folder + entry.name
        return
    if not is_glob(part) or os.path.lexists(folder + part):  # a name with brackets that is there is meant as it is
        names = [part] if os.path.lexists(folder + part) else []
    else:
        matches = glob_regex(part).fullmatch
        hidden = part.startswith(".")
        names = [e.name for e in _entries(folder) if matches(e.name) and (hidden or not e.name.startswith("."))]
    for name in names:
        if not rest:
            yield folder + name
        elif os.path.isdir(folder + name):
            yield from _walk(f"{folder}{name}/", rest, above)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds. Raises SourceError where it may not be listed."""
    try:
        with os.scandir(folder or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SourceError(f"{folder or '.'} cannot be listed ({error.strerror}), and shards may lie in it") from None


def _what(path: str) -> str:
    """What a path is that is neither a file nor a folder."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to {os.readlink(path)}, which is not there"
    return "a pipe, a socket or a device"
