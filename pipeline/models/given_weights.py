"""Weight files that a key of the configuration names, downloaded once and verified by their hash."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import NotFound, WeightsError
from pipeline.log import log
from pipeline.models.encoders.fetched import cache_root
from pipeline.parsing.redaction import REDACTED, redact
from pipeline.storage.base import temporary_path
from pipeline.storage.stores import scheme_of
from pipeline.storage.urls import open_storage, split_url

PINNED = re.compile(r"#sha256=([0-9a-f]{8,64})$")
NAMED = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")  # torch.hub's convention: a name ends with the beginning of its hash
CHUNK_BYTES = 16 * 1024 * 1024


def weights_file(source: str, key: str = "features_weights", kind: str = "") -> Path:
    """The local file that `source` names: a path, or a URL (of a bucket, http:// or https://), downloaded once into
    ~/.cache/latentmill/features. key, kind: of the configuration and what precedes `source` in its value, for messages.

    Its SHA-256 must begin with the digits after "#sha256=" in `source` or, without these, with the eight or more
    hexadecimal digits at the end of its name (pt_inception-2015-12-05-6726825d.pth). Raises WeightsError."""
    given, wanted = f"{key}={kind}{source}", f"{key}={kind}"
    pinned_hash = PINNED.search(source)
    location = source[: pinned_hash.start()] if pinned_hash else source
    name = re.split(r"[?#]", location)[0].rpartition("/")[2] if "://" in location else location  # without a signature
    named_hash = NAMED.search(name)
    expected_hash = pinned_hash[1] if pinned_hash else named_hash[1] if named_hash else ""
    if REDACTED in location:
        raise WeightsError(
            f"{given}: what is missing in this URL was not stored with the run; give "
            f"{wanted}URL anew, or begin runs with '${{oc.env:NAME}}' in its place"
        )
    if "://" not in location:
        path = Path(location).expanduser()
        if not path.is_file():
            raise WeightsError(f"{given}: there is no such file")
        return _verified(path, expected_hash, given)
    folder = hashlib.sha256(f"{location} {expected_hash}".encode()).hexdigest()[:16]
    path = cache_root().parent / "features" / folder / (redact(name) or "weights")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info(f"downloading {location} into {path}")
        temporary = temporary_path(path)
        try:
            with temporary.open("xb") as file:
                for chunk in _chunks(location, wanted):
                    file.write(chunk)
            _verified(temporary, expected_hash, given)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return _verified(path, expected_hash, given)


def _chunks(url: str, wanted: str) -> Iterator[bytes]:
    """The object's bytes in chunks. wanted: what a file is given with, for messages. Raises WeightsError when it cannot
    be fetched."""
    if scheme_of(url):
        root, name = split_url(url)
        storage = open_storage(root)
        try:
            size = storage.stat(name).size
        except NotFound:
            raise WeightsError(f"{wanted}{url}: there is no such object") from None
        for offset in range(0, size, CHUNK_BYTES):
            yield storage.get_range(name, offset, min(CHUNK_BYTES, size - offset))
        return
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            while chunk := response.read(CHUNK_BYTES):
                yield chunk
    except (urllib.error.URLError, OSError) as error:
        raise WeightsError(
            f"{url} cannot be fetched ({getattr(error, 'reason', error)}). Bring the file here by hand, and give "
            f"{wanted}FILE"
        ) from None


def _verified(path: Path, expected_hash: str, given: str) -> Path:
    if expected_hash:
        with path.open("rb") as file:
            actual_hash = hashlib.file_digest(file, "sha256").hexdigest()
        if not actual_hash.startswith(expected_hash):
            raise WeightsError(
                f"{given}: its SHA-256 begins with {actual_hash[: len(expected_hash)]}, not {expected_hash}; the file "
                "is damaged, or another one"
            )
    return path
