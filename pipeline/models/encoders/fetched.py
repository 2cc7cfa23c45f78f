"""Encoders that `latentmill fetch` has stored in a folder or bucket: reads them, and verifies each file before use.

    encoders.json   the manifest: names, sources, sizes and hashes
    vae/            config.json, diffusion_pytorch_model.safetensors: the layout that diffusers reads
    text/           open_clip_config.json, open_clip_model.safetensors, bpe.txt.gz: the layout of open_clip

Files of a bucket are downloaded once, into ~/.cache/latentmill/encoders/HASH. Nothing here needs PyTorch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.config import EncodersConfig
from pipeline.config.values.bounds import Between
from pipeline.errors import ConfigError, NotFound, ParseError, StorageError, WeightsError
from pipeline.log import log
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage, without_folders

MANIFEST, FORMAT = "encoders.json", 1
Part = Literal["vae", "text"]
FIELDS: dict[Part, tuple[str, ...]] = {"vae": ("vae", "vae_subfolder"), "text": ("text", "text_pretrained")}
"""The fields of EncodersConfig that name each part."""
FILES: dict[Part, frozenset[str]] = {
    "vae": frozenset(["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]),
    "text": frozenset(["text/open_clip_config.json", "text/open_clip_model.safetensors", "text/bpe.txt.gz"]),
}
"""The files of each part, all of which the manifest lists."""
MANIFEST_BYTES = 1 << 20
CHUNK_BYTES = 64 * 1024 * 1024
_verified: set[tuple[str, int, int, str]] = set()
"""(path, size, mtime in ns, SHA-256) of the files that this process has hashed and found right."""


def part_folder(config: EncodersConfig, part: Part) -> Path:
    """The local folder with the files of the autoencoder or the text tower, verified by the manifest at
    `config.weights`.

    Raises WeightsError if that place holds other encoders, or if a file is missing or damaged.
    """
    if config.seed >= 0:
        raise ConfigError(
            f"encoders.seed={config.seed} asks for random weights, encoders.weights for real ones: choose one"
        )
    storage = open_storage(config.weights)
    manifest = read_manifest(storage)
    for field, value in names(config, part).items():
        if manifest["names"][field] != value:
            raise WeightsError(
                f"{storage.url} holds encoders.{field}={manifest['names'][field]}, not {value}: give the encoders= "
                "that it was fetched with, or fetch these into another dest"
            )
    if part not in manifest:
        raise WeightsError(f"{storage.url} is not complete: run `latentmill fetch ... dest={storage.url}` again")
    files = manifest[part]["files"]
    if isinstance(storage, LocalStorage):
        for key, facts in files.items():
            verify(storage.local_path(key), facts, storage.url)
        return storage.local_path(part)
    folder = cache_root() / hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            for key, facts in files.items():
                _download(storage, key, facts, folder / key.removeprefix(f"{part}/"))
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}. XDG_CACHE_HOME names another place for it"
        ) from error
    return folder


def names(config: EncodersConfig, part: Part) -> dict[str, str]:
    """The configuration's fields that name the part, without this machine's folders."""
    return {field: without_folders(getattr(config, field)) for field in FIELDS[part]}


def cache_root() -> Path:
    """The folder on this machine that keeps files from buckets."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache_home if cache_home.startswith("/") else "~/.cache").expanduser() / "latentmill" / "encoders"


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest at `storage`. Raises WeightsError when it is missing or cannot be read, and StorageError."""
    try:
        raw = storage.get(MANIFEST)
    except NotFound:
        raise WeightsError(
            f"{storage.url} holds no {MANIFEST}: run `latentmill fetch encoders=... dest={storage.url}` first, where "
            "there is internet"
        ) from None
    try:
        manifest = parse_json(raw, MANIFEST_BYTES)
        typed = build(_Manifest, manifest, unknown="pass")
        if typed.format != FORMAT:
            raise ParseError(f"format {typed.format}, this program reads {FORMAT}")
        sections: dict[Part, _Section | None] = {"vae": typed.vae, "text": typed.text}
        for part, section in sections.items():
            if section is None:
                continue
            if section.files.keys() != FILES[part]:
                differing = sorted(section.files.keys() ^ FILES[part])
                raise ParseError(
                    f"{part}.files: {differing[0]} is {'missing' if differing[0] in FILES[part] else 'too many'}"
                )
            if section.hashes() != HASHES[part]:
                raise ParseError(f"{part}: {', '.join(sorted(HASHES[part]))} are wanted")
    except ParseError as error:
        raise WeightsError(
            f"{storage.url}/{MANIFEST} cannot be read: {error}. Fetch the encoders again into an empty dest"
        ) from None
    return manifest


class Hex64:
    """A bound on text: a SHA-256."""

    words = "64 hexadecimal digits are wanted"

    @staticmethod
    def admits(text: str) -> bool:
        return re.fullmatch(r"[0-9a-f]{64}", text) is not None


HASHES: dict[Part, set[str]] = {"vae": {"vae_sha256"}, "text": {"text_sha256", "image_sha256"}}
"""The hashes of weights that each part has."""


@dataclass(frozen=True)
class _File:
    sha256: Annotated[str, Hex64()]
    size: Annotated[int, Between(0, 2**53)]


@dataclass(frozen=True)
class _Section:
    """What is read of a part."""

    name: str
    files: dict[str, _File]
    vae_sha256: Annotated[str, Hex64()] | None = None
    text_sha256: Annotated[str, Hex64()] | None = None
    image_sha256: Annotated[str, Hex64()] | None = None

    def hashes(self) -> set[str]:
        return {name for name, value in vars(self).items() if name.endswith("_sha256") and value is not None}


@dataclass(frozen=True)
class _Names:
    vae: str
    vae_subfolder: str
    text: str
    text_pretrained: str


@dataclass(frozen=True)
class _Manifest:
    format: int
    names: _Names
    vae: _Section | None = None
    text: _Section | None = None


def require_hashes(config: EncodersConfig, part: Part, **loaded: str) -> None:
    """Raise WeightsError unless the loaded networks have the hashes that the manifest at `config.weights` tells."""
    storage = open_storage(config.weights)
    section = read_manifest(storage)[part]
    for name, digest in loaded.items():
        if section[name] != digest:
            raise WeightsError(
                f"{storage.url}/{part} holds other weights than {MANIFEST} tells ({name}: {digest[:12]} there, "
                f"{section[name][:12]} in it): fetch the encoders again into an empty dest"
            )


def verify(path: Path, facts: dict[str, Any], url: str) -> None:
    """Raise WeightsError unless the file has the size and the SHA-256 of `facts`, the entry in the manifest at
    `url`."""
    try:
        stat = path.stat()
        fingerprint = (str(path), stat.st_size, stat.st_mtime_ns, facts["sha256"])
        if fingerprint in _verified:
            return
        if stat.st_size == facts["size"] and path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]:
                    _verified.add(fingerprint)
                    return
    except OSError as error:
        raise _damaged(str(path), error.strerror or str(error), url) from None
    raise _damaged(str(path), f"its {stat.st_size:,} bytes differ from the {facts['size']:,} fetched", url)


def chunks(storage: Storage, key: str, facts: dict[str, Any]) -> Iterator[bytes]:
    """The object, in chunks. Raises WeightsError, after the last one, unless it has the size and hash of `facts`."""
    url, digest = storage.url, hashlib.sha256()
    try:
        size = storage.stat(key).size
        if size != facts["size"]:
            raise _damaged(storage.locate(key), f"it has {size:,} bytes of {facts['size']:,}", url)
        for offset in range(0, size, CHUNK_BYTES):
            piece = storage.get_range(key, offset, min(CHUNK_BYTES, size - offset))
            digest.update(piece)
            yield piece
    except NotFound:
        raise _damaged(storage.locate(key), "there is no such object", url) from None
    if digest.hexdigest() != facts["sha256"]:
        raise _damaged(storage.locate(key), "its bytes have another hash than those fetched", url)


@contextmanager
def quiet_hub_clients() -> Iterator[None]:
    """A context for requests to the hub, whose clients log every retry: here the final error says what happened."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled_level)


def hub_error(error: BaseException) -> str:
    """Why a request to the Hugging Face hub failed: the root cause of the error in one short line."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    reported = next((e for e in chain if type(e).__module__.startswith("huggingface_hub")), error)
    if type(reported).__name__ == "LocalEntryNotFoundError":  # not in the hub's cache, and:
        return f"no connection: {_short(chain[-1])}"
    return _short(reported)


def _short(error: BaseException) -> str:
    """The first 160 characters of an error's message, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:160]}..."


def _download(storage: Storage, key: str, facts: dict[str, Any], path: Path) -> None:
    """Download the object to `path` and verify it, unless a right copy is there."""
    try:
        return verify(path, facts, storage.url)
    except WeightsError:
        log.info(f"downloading {storage.locate(key)} ({facts['size'] / 1e6:,.1f} MB) into {path}")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            for piece in chunks(storage, key, facts):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock under which one process at a time downloads into the folder; the others wait and then find the files. On a
    file system without locks each process downloads for itself, which is also safe."""
    with (folder / ".lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # Of a process that was killed. It may have run on another machine, so only files of an hour ago are removed.
        for leftover in folder.glob(".*.tmp"):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink(missing_ok=True)
        yield


def _damaged(where: str, why: str, url: str) -> WeightsError:
    return WeightsError(f"{where} is missing or damaged ({why}): run `latentmill fetch ... dest={url}` again")
