"""The id under which wandb knows a run: drawn once, kept by a run that goes on or is moved, and not by its copy.

    wandb.id      the id, in the run directory, where a resumed run finds it
    wandb.place   where the run lay when it was last tracked: an absolute path or a URL of a bucket, with references in
                  place of what came from the environment

A run directory that lies elsewhere than wandb.place says has been moved if nothing with its id is at the old place any
more, and is a copy if something is. A copy gets an id of its own, or two runs would write one history. Where the
old place cannot be looked at from here (another machine's disk, another bucket), a local path counts as moved, and
what came out of a bucket as copied.
"""

from __future__ import annotations

import os
import re
import secrets

from pipeline.config.loading.references import Resolved, holds_reference, resolve
from pipeline.errors import ConfigError, NotFound, StorageError
from pipeline.log import log
from pipeline.parsing.redaction import redact
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.stores import bucket_of
from pipeline.storage.urls import open_storage

ID_KEY, PLACE_KEY = "wandb.id", "wandb.place"
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Ids that wandb takes."""
LONGEST = 4096
"""Bytes of either file that are read."""


def identity_of(run: Storage) -> str:
    """wandb's id of the run in this directory, which is drawn and stored where there is none, or where the directory is
    a copy. Raises StorageError."""
    here, stored = place_of(run), _text(run, ID_KEY)
    if not stored and run.put_if_absent(ID_KEY, _drawn()):
        run.put(PLACE_KEY, _bytes(here))
    stored = stored or _text(run, ID_KEY)
    if not ID.fullmatch(stored):
        log.warning(f"{run.locate(ID_KEY)} holds no id of wandb: the run gets a new one")
        return _anew(run, here)
    place = _place_stored(run)
    if place == here:
        return stored
    if place and _is_copy(run, here, place, stored):
        identity = _anew(run, here)
        log.info(f"{run.url} is a copy of the run in {place}: wandb knows it as {identity} from now on")
        return identity
    if not place or not _is_same(run, place):
        run.put(PLACE_KEY, _bytes(here))
    return stored


def place_of(run: Storage) -> str:
    """Where a run directory lies, as one name for all spellings of its path."""
    path = run.local_path(ID_KEY)
    return os.path.realpath(path.parent) if path is not None else run.url


def _is_copy(run: Storage, here: str, place: str, identity: str) -> bool:
    """Whether another directory, at `place`, is the run with this id."""
    there = _reachable(here, place)
    if there is None:
        return bool(bucket_of(place))
    try:
        return _text(there, ID_KEY) == identity and not _is_same(run, place)
    except StorageError:  # it cannot be read
        return False


def _is_same(run: Storage, place: str) -> bool:
    """Whether the directory at `place` is this one under another name (a mount, a link): what is written here appears
    there."""
    there = _reachable(place_of(run), place)
    if there is None:
        return False
    probe = f"wandb.{secrets.token_hex(8)}"
    run.put(probe, b"")
    try:
        return there.exists(probe)
    except StorageError:  # it cannot be looked at
        return False
    finally:
        run.delete(probe)


def _reachable(here: str, place: str) -> Storage | None:
    """The storage at `place` if it is a local folder, or in the bucket that `here` is in: a name in a stranger's run
    directory makes no request to anybody else's bucket."""
    if place.startswith("/") and "\0" not in place:
        return LocalStorage(place)
    bucket = bucket_of(here)
    return open_storage(place) if bucket and bucket_of(place) == bucket else None


def _anew(run: Storage, here: str) -> str:
    """Draw an id and store it in place of the one that is there."""
    run.put(ID_KEY, _drawn())
    run.put(PLACE_KEY, _bytes(here))
    return _text(run, ID_KEY)


def _bytes(place: str) -> bytes:
    """A place as it is stored: what came from the environment as a reference to it."""
    return redact(place).encode("utf-8", "surrogateescape")  # as `_text` reads it: a path may be no Unicode


def _place_stored(run: Storage) -> str:
    """The place that was stored; "" for none, and for one that the environment here does not give."""
    text = _text(run, PLACE_KEY)
    if not holds_reference(text):
        return text
    try:
        found = resolve(text, os.environ, PLACE_KEY)
    except ConfigError:
        return ""
    return found.text or "" if isinstance(found, Resolved) else ""


def _drawn() -> bytes:
    return secrets.token_hex(4).encode()


def _text(run: Storage, key: str) -> str:
    """The text of a small file; "" for none, and for one that is no line of text."""
    try:
        if run.stat(key).size > LONGEST:
            return ""
        return run.get(key).decode("utf-8", "surrogateescape").strip()
    except NotFound:
        return ""
