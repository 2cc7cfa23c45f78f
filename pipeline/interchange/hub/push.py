"""`latentmill export push=hub:owner/name`: the exported files become one commit of a repository on the hub.

    README.md       the model card (card.py)
    SHA256SUMS      what this and earlier pushes put there, as `sha256sum -c` reads it

A file there is ours while it has the hash that SHA256SUMS there gives it: a push replaces and removes such files alone.
Large files are sent first, one by one, and the hub keeps them: a push that was stopped goes on with the rest. The
commit that names them all comes last.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.errors import ConfigError, DestinationExists, StorageError
from pipeline.interchange.folder import LARGEST_SUMS, README, SUMS
from pipeline.interchange.hub.client import TOKEN, Again, Hub, Moved, Remote
from pipeline.log import log, show

T = TypeVar("T")
WAITS = (1.0, 4.0, 16.0)
"""Seconds before each further try. huggingface_hub tries most requests several times by itself."""
GIVEN = frozenset((".gitattributes", README, "LICENSE", "LICENSE.md", ".gitignore"))
"""Files that a repository may have before the first push."""
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
LARGEST_SMALL = 64 << 20
"""Bytes of a file outside of Git LFS: the hub takes none of more than 10 MB."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Hashes:
    """Of a file here. blob: git's, of the content."""

    sha256: str
    blob: str
    size: int

    def is_at(self, there: Remote | None) -> bool:
        """Whether a file on the hub has the same bytes."""
        return there is not None and (there.sha256 == self.sha256 if there.sha256 else there.blob == self.blob)


def look(hub: Hub, *, public: bool) -> None:
    """Ask the hub, before any work, whether the token and the repository will do. Raises ConfigError for a token that
    may only read, and for a repository that everybody can see where public=true is not given; StorageError where the
    hub cannot be reached. Rights of a fine-grained token show later, at the first request that writes."""
    private = patiently(lambda: _is_private(hub, public))
    if not patiently(hub.may_write):
        raise ConfigError(
            f"push=hub:{hub.repo}: the token of {TOKEN} may only read: make one that may write at "
            f"{hub.url}/settings/tokens"
        )
    if private and public:
        log.warning(f"export: {hub.page} is private and stays so: its settings there make it public")


def _is_private(hub: Hub, public: bool) -> bool | None:
    """As Hub.is_private. Raises ConfigError for a repository that everybody can see where `public` is not given."""
    private = hub.is_private()
    if private is False and not public:
        raise ConfigError(
            f"push=hub:{hub.repo}: {hub.page} is public, and public=true is not given: give it, or choose another push="
        )
    return private


def push(hub: Hub, files: Mapping[str, Path], message: str, *, public: bool, folder: Path) -> None:
    """One commit that makes the repository hold `files` (path there -> file here), or none where it does already.

    folder: for a list of hashes. Raises DestinationExists for what others put in the way, StorageError, ConfigError.
    """
    if README in files:
        _require_text(files[README])
    hashes = {path: _hash(file) for path, file in files.items()}
    kept: list[str] = []  # said once

    def once() -> None:
        _push_once(hub, dict(files), dict(hashes), message, public, folder, kept)

    patiently(once, what=f"nothing was committed to {hub.page}; the same command goes on with the rest")


def patiently(request: Callable[[], T], what: str = "the same command goes on") -> T:
    """A request that is made again, after WAITS, where the hub could not be reached or others were quicker.
    what: for the message, what stands then."""
    for wait in (*WAITS, None):
        try:
            return request()
        except (Again, Moved) as error:
            if wait is None:
                raise StorageError(f"{error}: {what}") from error
            log.warning(f"export: {error}: trying again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError


def _push_once(
    hub: Hub,
    files: dict[str, Path],
    hashes: dict[str, Hashes],
    message: str,
    public: bool,
    folder: Path,
    kept: list[str],
) -> None:
    """Compare, send what differs, and commit. files, hashes: they lose README.md where that of others stays, and gain
    the list of hashes. kept: whether that was said."""
    head = hub.head()
    if head is None:
        hub.create(public=public)
        head = hub.head()
        if head is None:
            raise Again(f"{hub.page} was made, and its branch {hub.branch} is not there yet")
    private = _is_private(hub, public)  # the export took its time, and others may have made it
    there = hub.files(head)
    ours = _ours(hub, head, there)
    if _keeps_readme(hub, head, hashes, there, ours):
        del files[README], hashes[README]
        if README not in kept:
            log.warning(
                f"export: {hub.page}: {README} there is not as a push left it, so it stays: remove it there to have "
                "this one"
            )
            kept.append(README)
    gone = [
        path
        for path in sorted(ours.keys() - hashes.keys() - {SUMS, README})
        if path in there and _is_ours(hub, head, path, there[path], ours)
    ]
    files[SUMS] = folder / SUMS
    files[SUMS].write_bytes("".join(f"{h.sha256}  {path}\n" for path, h in sorted(hashes.items())).encode())
    hashes[SUMS] = _hash(files[SUMS])
    changed = sorted(path for path in hashes if not hashes[path].is_at(there.get(path)))
    where = f"{hub.page} ({'' if private else 'not '}private), revision {hub.branch}"
    if not changed and not gone:
        show(f"export: {where}: nothing changed, commit {head[:12]}")
        return
    if README in changed:
        hub.validate(files[README].read_text(encoding="utf-8"))
    additions = hub.additions({path: files[path] for path in changed})
    for number, addition in enumerate(additions, 1):
        path, megabytes = addition.path_in_repo, hashes[addition.path_in_repo].size / 1e6
        if megabytes >= 1:
            log.info(f"export: {path} ({megabytes:,.1f} MB), file {number} of {len(additions)}, to {hub.page}")
        hub.upload(addition)
    commit = hub.commit(additions, gone, message, head)
    removed = f", {len(gone)} removed" if gone else ""
    show(f"export: {where}: commit {commit[:12]}, {len(changed)} of {len(files)} files changed{removed}")


def _keeps_readme(
    hub: Hub, head: str, hashes: Mapping[str, Hashes], there: Mapping[str, Remote], ours: Mapping[str, str]
) -> bool:
    """Whether the README.md there is of others and stays. Raises DestinationExists for any other file of theirs that
    would be written over."""
    differing = [path for path in sorted(hashes.keys() & there.keys()) if not hashes[path].is_at(there[path])]
    others = [path for path in differing if not _is_ours(hub, head, path, there[path], ours)]
    if in_the_way := [path for path in others if path != README]:
        raise DestinationExists(
            f"{hub.page}: {in_the_way[0]} is not as a push left it and would be written over: remove it there, or "
            "choose another push="
        )
    return README in others


def _ours(hub: Hub, head: str, there: Mapping[str, Remote]) -> dict[str, str]:
    """Path -> SHA-256 of what earlier pushes put there. Raises DestinationExists where the repository holds something
    else than a push."""
    if SUMS not in there:
        others = sorted(there.keys() - GIVEN)
        if others:
            raise DestinationExists(f"{hub.page} holds {others[0]} and no earlier push: choose another push=")
        return {}
    found: dict[str, str] = {}
    for line in hub.read(SUMS, head, LARGEST_SUMS).decode("utf-8", "replace").splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            raise DestinationExists(f"{hub.page}: {SUMS} is not what a push wrote: choose another push=")
        found[match[2]] = match[1]
    return found


def _is_ours(hub: Hub, head: str, path: str, there: Remote, ours: Mapping[str, str]) -> bool:
    """Whether a file on the hub is as a push left it."""
    if path not in ours:
        return False
    return ours[path] == (there.sha256 or hashlib.sha256(hub.read(path, head, LARGEST_SMALL)).hexdigest())


def _require_text(card: Path) -> None:
    """Raise ConfigError for a README.md that is no text: the hub takes none."""
    try:
        card.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"the {README} of dest is not UTF-8: write it so, or remove it, and export again to have a card"
        ) from None


def _hash(file: Path) -> Hashes:
    size = file.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with file.open("rb") as opened:
        while piece := opened.read(CHUNK):
            sha256.update(piece)
            blob.update(piece)
    return Hashes(sha256.hexdigest(), blob.hexdigest(), size)
