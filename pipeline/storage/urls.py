"""From a path or URL to its store."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.parsing.redaction import redact
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.stores import OTHER_SPELLINGS, STORES


def open_storage(url: str) -> Storage:
    """The storage rooted at a folder or at s3://bucket/prefix, gs://bucket/prefix or az://container/prefix. Raises
    ConfigError for anything else, and where gs:// or az:// lack their variables."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise ConfigError("an empty path: give a folder, or a URL in a bucket (s3://, gs://, az://)")
        return LocalStorage(url)
    store = STORES.get(scheme)
    if store is None:
        ours = OTHER_SPELLINGS.get(scheme.lower(), scheme.lower())
        others = "give a local path, or s3://, gs:// or az://bucket/prefix"
        advice = f"write {ours}://bucket/prefix" if ours in STORES else others
        raise ConfigError(f"{redact(url)}: {scheme}:// is not supported; {advice}")
    bucket, _, prefix = rest.partition("/")
    if ":" in bucket or "@" in bucket:
        profile = ", or AWS_PROFILE" if scheme == "s3" else ""
        raise ConfigError(
            f"{redact(url)}: a user and password in a URL are not taken; set {store.key_id} and "
            f"{store.secret}{profile}, and write {scheme}://bucket/prefix"
        )
    if not bucket:
        raise ConfigError(f"{url}: no bucket; write {scheme}://bucket/prefix")
    store.reached_at()
    store.keys()
    from pipeline.storage.s3 import S3Storage

    return S3Storage(bucket, prefix, store)


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
