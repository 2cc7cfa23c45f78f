"""Encoders that `latentmill fetch` has brought into a folder or bucket: what is there, and each file proved before use.

    encoders.json   names, sources, sizes and hashes: the manifest
    vae/            config.json, diffusion_pytorch_model.safetensors: as diffusers reads them
    text/           open_clip_config.json, open_clip_model.safetensors, bpe.txt.gz: as models/encoders/text.py does

What lies in a bucket is downloaded once, into ~/.cache/latentmill/encoders/HASH. Nothing here needs PyTorch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, NotFound, StorageError, WeightsError
from pipeline.log import log
from pipeline.storage.base import Storage, check_key
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage, without_folders

MANIFEST, FORMAT = "encoders.json", 1
Part = Literal["vae", "text"]
FIELDS: dict[Part, tuple[str, ...]] = {"vae": ("vae", "vae_subfolder"), "text": ("text", "text_pretrained")}
"""The fields of EncodersConfig that name each part."""
CHUNK_BYTES = 64 * 1024 * 1024
_proved: set[tuple[str, int, int, str]] = set()
"""(path, size, mtime in ns, SHA-256) of files that this process has hashed."""


def part_folder(config: EncodersConfig, part: Part) -> Path:
    """The local folder that holds the autoencoder's or the text tower's files, each as the manifest at
    `config.weights` says. Raises WeightsError for other encoders, and for a file that is missing or damaged."""
    if config.seed >= 0:
        raise ConfigError(f"encoders.seed={config.seed} wants random weights, encoders.weights real ones: choose one")
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
            prove(storage.local_path(key), facts, storage.url)
        return storage.local_path(part)
    folder = cache_root() / hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            for key, facts in files.items():
                _bring(storage, key, facts, folder / key.removeprefix(f"{part}/"))
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}. XDG_CACHE_HOME names another place for it"
        ) from error
    return folder


def names(config: EncodersConfig, part: Part) -> dict[str, str]:
    """What the part is called in the configuration, without this machine's folders."""
    return {field: without_folders(getattr(config, field)) for field in FIELDS[part]}


def cache_root() -> Path:
    """Where files out of buckets are kept on this machine."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named if named.startswith("/") else "~/.cache").expanduser() / "latentmill" / "encoders"


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest. Raises WeightsError when there is none or when it cannot be read, StorageError."""
    try:
        raw = storage.get(MANIFEST)
    except NotFound:
        raise WeightsError(
            f"{storage.url} holds no {MANIFEST}: run `latentmill fetch encoders=... dest={storage.url}` first, where "
            "there is internet"
        ) from None
    try:
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this program reads {FORMAT}")
        for part, fields in FIELDS.items():
            _ = [str(manifest["names"][field]) for field in fields]
            for key, facts in manifest.get(part, {"files": {}})["files"].items():
                if not check_key(key).startswith(f"{part}/") or len(facts["sha256"]) != 64 or facts["size"] < 0:
                    raise ValueError(key)
    except (ValueError, KeyError, TypeError, AttributeError, StorageError) as error:
        raise WeightsError(f"{storage.url}/{MANIFEST} cannot be read: {error!r}") from None
    return manifest


def prove(path: Path, facts: dict[str, Any], url: str) -> None:
    """Raises WeightsError unless the file has the size and the SHA-256 that the manifest at `url` says."""
    try:
        found = path.stat()
        known = (str(path), found.st_size, found.st_mtime_ns, facts["sha256"])
        if known in _proved:
            return
        if found.st_size == facts["size"]:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]:
                    _proved.add(known)
                    return
    except OSError as error:
        raise _spoilt(str(path), error.strerror or str(error), url) from None
    raise _spoilt(str(path), f"it has {found.st_size:,} bytes, and not the hash of the {facts['size']:,} fetched", url)


def chunks(storage: Storage, key: str, facts: dict[str, Any]) -> Iterator[bytes]:
    """The object, piece by piece. Raises WeightsError, after the last piece, unless it is what `facts` say."""
    url, digest = storage.url, hashlib.sha256()
    try:
        size = storage.stat(key).size
        if size != facts["size"]:
            raise _spoilt(storage.locate(key), f"it has {size:,} bytes of {facts['size']:,}", url)
        for offset in range(0, size, CHUNK_BYTES):
            piece = storage.get_range(key, offset, min(CHUNK_BYTES, size - offset))
            digest.update(piece)
            yield piece
    except NotFound:
        raise _spoilt(storage.locate(key), "there is no such object", url) from None
    if digest.hexdigest() != facts["sha256"]:
        raise _spoilt(storage.locate(key), "its bytes have another hash than those fetched", url)


@contextmanager
def one_line() -> Iterator[None]:
    """Around what asks the hub: its clients log every retry, and here one error says what there is to say."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def unreachable(error: BaseException) -> str:
    """Why the Hugging Face hub did not give something: the root of the error in one short line."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    told = next((e for e in chain if type(e).__module__.startswith("huggingface_hub")), error)
    if type(told).__name__ == "LocalEntryNotFoundError":  # nothing of it is in the hub's own cache, and then:
        return f"no connection: {_short(chain[-1])}"
    return _short(told)


def _short(error: BaseException) -> str:
    """The first words of an error."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:160]}..."


def _bring(storage: Storage, key: str, facts: dict[str, Any], path: Path) -> None:
    """Makes `path` hold the object, proved. One that is there and right is left alone."""
    try:
        return prove(path, facts, storage.url)
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
    """One process at a time downloads; the others wait and find the files there. Where the file system has no locks,
    each downloads for itself, which is as safe."""
    with (folder / ".lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):  # of a process that was killed, possibly on another machine: hence the hour
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        yield


def _spoilt(where: str, why: str, url: str) -> WeightsError:
    return WeightsError(f"{where} is missing or damaged ({why}): run `latentmill fetch ... dest={url}` again")
