"""From a path or URL to its store."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.parsing.redaction import redact
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage


def open_storage(url: str) -> Storage:
    """The storage rooted at a folder or at s3://bucket/prefix. Raises ConfigError for anything else."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise ConfigError("an empty path: give a folder or s3://bucket/prefix")
        return LocalStorage(url)
    if scheme != "s3":
        raise ConfigError(f"{url}: {scheme}:// is not supported; give a local path or s3://bucket/prefix")
    bucket, _, prefix = rest.partition("/")
    if ":" in bucket or "@" in bucket:
        raise ConfigError(
            f"{redact(url)}: a user and password in a URL are not taken; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and write s3://bucket/prefix"
        )
    if not bucket:
        raise ConfigError(f"{url}: no bucket; write s3://bucket/prefix")
    from pipeline.storage.s3 import S3Storage

    return S3Storage(bucket, prefix)


def split_url(url: str) -> tuple[str, str]:
    """(root, key) of one object: "s3://b/a/x.tar" -> ("s3://b/a", "x.tar"); "b.tar" -> (".", "b.tar")."""
    root, _, key = url.rpartition("/")
    if not key or (root.endswith("/") and "://" in url and root.count("/") < 3):
        raise ConfigError(f"{url!r} names no object")
    if not root:
        return ("/" if url.startswith("/") else "."), key
    return root, key


def without_folders(path: str) -> str:
    """An absolute local path's last part, anything else as it is, for what is stored: without secrets."""
    return redact(path.rstrip("/").rpartition("/")[2] if path.startswith(("/", "~")) else path)
