"""An exported folder among other people's files: what in it is ours, and how a new export takes the old one's place.

    latentmill.json   which run and weights; a folder that has it may be exported into again
    SHA256SUMS        the files of the export, as `sha256sum -c` reads them

A file is ours while it has a hash that SHA256SUMS gives it. An export replaces and removes such files alone, one by
one: what others put there or changed stays. The list is written first, with the hashes of before and after, so that a
kill at any place leaves a folder that the same command mends.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.errors import DestinationExists, ParseError, StorageError
from pipeline.interchange.readme import is_readme
from pipeline.log import log
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.staging import is_empty, obey_umask, require_folder, require_place, require_writable

MARKER, SUMS, README = "latentmill.json", "SHA256SUMS", "README.md"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENIZER = ("tokenizer", "tokenizer_config", "special_tokens_map", "vocab", "added_tokens")
FILES = frozenset(
    [MARKER, README, "model_index.json", "tokenizer/merges.txt", "config.json", WEIGHTS]
    + [f"{part}/scheduler_config.json" for part in ("scheduler", "low_res_scheduler")]
    + [f"{part}/{name}" for part in ("unet", "vae", "vqvae") for name in ("config.json", WEIGHTS)]
    + ["task.json", "task.safetensors", "class_embedding.safetensors"]
    + ["text_encoder/config.json", "text_encoder/model.safetensors"]
    + [f"tokenizer/{name}.json" for name in TOKENIZER]
)
"""Every file that an export may write, besides SHA256SUMS."""
LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
LARGEST_SUMS = 1 << 20
CHUNK_BYTES = 16 << 20
Hashes = dict[str, set[str]]
"""Key -> the hashes with which a file there is ours."""


class Destination:
    """Where an export goes. `ours`: the hashes of the earlier export's files there.

    Raises DestinationExists where it is no place for a folder, holds something else, or holds files that others put or
    changed where an export writes.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: dict[tuple[str, str], str] = {}
        require_folder(storage)
        self.ours: Hashes = {} if is_empty(storage) else self._earlier()
        require_writable(storage)

    def publish(self, folder: Path) -> None:
        """Move the files of a finished folder there, and remove those of the earlier export that it lacks. Raises
        DestinationExists, StorageError."""
        storage, ours = self.storage, self.ours
        obey_umask(folder)
        new = {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file()}
        assert new.keys() <= FILES, f"files that no list of exports names: {sorted(new.keys() - FILES)}"
        self._refuse_changed(new)
        if self._is_changed(README):
            log.info(f"export: {storage.locate(README)} was changed since it was written, so it stays as it is")
            del new[README]
        if not storage.exists(MARKER):
            storage.put(MARKER, (folder / MARKER).read_bytes())
        both = {key: ours.get(key, set()) | ({new[key]} if key in new else set()) for key in {*ours, *new}}
        storage.put(SUMS, _sums(both))
        for key in sorted(new, key=lambda key: key == MARKER):
            storage.put_file(key, folder / key)
        for key in sorted(ours.keys() - new.keys()):
            if storage.exists(key) and not self._is_changed(key):
                storage.delete(key)
                _remove_empty(storage, key)
        storage.put(SUMS, _sums({key: {digest} for key, digest in new.items()}))

    def _earlier(self) -> Hashes:
        """The hashes of an earlier export, from a destination that holds one and nothing of others in its way."""
        storage = self.storage
        if not storage.exists(MARKER) or not _is_marker(storage.get(MARKER)):
            raise DestinationExists(f"{storage.url} is not empty and no earlier export: choose another dest")
        for key in (*FILES, SUMS):
            require_place(storage, key)
        self.ours = self._read_sums() if storage.exists(SUMS) else self._before_sums()
        self.ours.setdefault(MARKER, set()).add(self._hash(MARKER))
        self._refuse_changed(FILES)
        return self.ours

    def _read_sums(self) -> Hashes:
        problem = f"{self.storage.locate(SUMS)} is not what an export wrote: move it away, or choose another dest"
        if self.storage.stat(SUMS).size > LARGEST_SUMS:
            raise DestinationExists(problem)
        ours: Hashes = {}
        for line in self.storage.get(SUMS).decode("utf-8", "replace").splitlines():
            found = LINE.fullmatch(line)
            if found is None or found[2] not in FILES:
                raise DestinationExists(problem)
            ours.setdefault(found[2], set()).add(found[1])
        return ours

    def _before_sums(self) -> Hashes:
        """The files of an export that wrote no SHA256SUMS: all but a README with other words than it could hold."""
        there = [key for key in FILES if self.storage.exists(key)]
        if README in there and not is_readme(self.storage.get(README).decode("utf-8", "replace")):
            there.remove(README)
        return {key: {self._hash(key)} for key in there}

    def _refuse_changed(self, keys: Iterable[str]) -> None:
        """Raise DestinationExists where others changed a file that would be written over; README.md stays theirs."""
        changed = [key for key in sorted(keys) if key != README and self._is_changed(key)]
        if changed:
            more = f" and {len(changed) - 1} more are" if len(changed) > 1 else " is"
            raise DestinationExists(
                f"{self.storage.locate(changed[0])}{more} not as an export wrote it and would be written over: move "
                f"{'them' if len(changed) > 1 else 'it'} away, or choose another dest"
            )

    def _is_changed(self, key: str) -> bool:
        """Whether the destination has a file at `key` that is not ours."""
        return self.storage.exists(key) and (key not in self.ours or self._hash(key) not in self.ours[key])

    def _hash(self, key: str) -> str:
        """SHA-256 of an object, read once for each of its versions."""
        info = self.storage.stat(key)
        if (key, info.etag) not in self._known:
            digest = hashlib.sha256()
            for offset in range(0, info.size, CHUNK_BYTES):
                digest.update(self.storage.get_range(key, offset, min(CHUNK_BYTES, info.size - offset)))
            self._known[key, info.etag] = digest.hexdigest()
        return self._known[key, info.etag]


def _is_marker(data: bytes) -> bool:
    """Whether these are the facts of an export."""
    try:
        facts = parse_json(data, LARGEST_SUMS)
    except ParseError:
        return False
    return isinstance(facts, dict) and {"contract", "weights", "n"} <= facts.keys()


def _sums(hashes: Mapping[str, Iterable[str]]) -> bytes:
    return "".join(f"{digest}  {key}\n" for key in sorted(hashes) for digest in sorted(hashes[key])).encode()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_empty(storage: Storage, key: str) -> None:
    """Remove the folder of a key that was deleted, where it is empty on a local disk."""
    if isinstance(storage, LocalStorage) and "/" in key:
        with suppress(OSError, StorageError):
            storage.local_path(key).parent.rmdir()
