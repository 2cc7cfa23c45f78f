"""Files of feature networks: where they are, brought here once, and proved by hash."""

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
from pipeline.storage.base import temporary_path
from pipeline.storage.urls import open_storage, split_url

PINNED = re.compile(r"#sha256=([0-9a-f]{8,64})$")
NAMED = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")  # torch.hub's custom: the hash's beginning at the end of the name
CHUNK_BYTES = 16 * 1024 * 1024


def weights_file(source: str) -> Path:
    """The local file that `source` names: a path, or an s3://, http:// or https:// URL, downloaded once into
    ~/.cache/latentmill/features.

    Its SHA-256 must begin with what follows "#sha256=" in `source` or, without that, with the eight or more hexadecimal
    digits at the end of its name (pt_inception-2015-12-05-6726825d.pth). Raises WeightsError."""
    pinned = PINNED.search(source)
    place = source[: pinned.start()] if pinned else source
    named = NAMED.search(place)
    wanted = pinned[1] if pinned else named[1] if named else ""
    if "://" not in place:
        path = Path(place).expanduser()
        if not path.is_file():
            raise WeightsError(f"features_weights={source}: there is no such file")
        return _proved(path, wanted, source)
    key = hashlib.sha256(f"{place} {wanted}".encode()).hexdigest()[:16]
    path = cache_root().parent / "features" / key / place.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info(f"downloading {place} into {path}")
        temporary = temporary_path(path)
        try:
            with temporary.open("xb") as file:
                for piece in _pieces(place):
                    file.write(piece)
            _proved(temporary, wanted, source)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return _proved(path, wanted, source)


def _pieces(url: str) -> Iterator[bytes]:
    """The object's bytes. Raises WeightsError where it cannot be had."""
    if url.startswith("s3://"):
        root, key = split_url(url)
        storage = open_storage(root)
        try:
            size = storage.stat(key).size
        except NotFound:
            raise WeightsError(f"features_weights={url}: there is no such object") from None
        for offset in range(0, size, CHUNK_BYTES):
            yield storage.get_range(key, offset, min(CHUNK_BYTES, size - offset))
        return
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            while piece := answer.read(CHUNK_BYTES):
                yield piece
    except (urllib.error.URLError, OSError) as error:
        raise WeightsError(
            f"{url} cannot be fetched ({getattr(error, 'reason', error)}). Bring the file here by hand, and give "
            "features_weights=FILE"
        ) from None


def _proved(path: Path, wanted: str, source: str) -> Path:
    if wanted:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(wanted):
            raise WeightsError(
                f"features_weights={source}: its SHA-256 begins with {found[: len(wanted)]}, not {wanted}; the file is "
                "damaged, or another one"
            )
    return path
