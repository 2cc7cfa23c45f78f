"""Objects by URL, on a local disk or on S3, behind one small interface. The only importer of boto3.

A `Storage` is a root (a folder, or s3://bucket/prefix) and keys are relative posix paths under it. An object is there
whole or not at all: a local write goes to a temporary file beside its destination, is synced and then renamed, and S3
makes an object visible when its upload is complete. Nothing here trusts a store to keep bytes: readers compare hashes.
Two writers that race may both win on some stores, so what is written under one key must not depend on the writer.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError, NotFound, SourceError, StorageError

TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{16}\.tmp")
"""Names of files that are being written; never listed."""
MULTIPART_BYTES = 64 * 1024 * 1024
"""S3 objects larger than this are uploaded in parts."""
RESUMES = 8
"""Times that a body cut short is resumed without any byte gained in between."""

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object without reading it."""

    key: str
    """Relative to the storage that was asked."""
    size: int
    """Bytes."""
    etag: str
    """Changes when the object does; comparable only within one store."""


class Storage(ABC):
    """A root under which objects lie. All methods are safe to call from several threads."""

    url: str

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound, StorageError."""

    @abstractmethod
    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises NotFound, and StorageError when the object ends before that."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write the object, whole or not at all, over whatever is there."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one. False: there is one already, possibly this very call's own after a
        retried request, so compare bytes before calling it somebody else's."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises NotFound."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key starts with `prefix` (a string, not a folder), at any depth, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error when there is none."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's disk, or None."""

    @abstractmethod
    def child(self, prefix: str) -> Storage:
        """The storage whose root is `prefix` under this one."""

    def exists(self, key: str) -> bool:
        """Whether there is an object."""
        try:
            self.stat(key)
        except NotFound:
            return False
        return True

    def locate(self, key: str) -> str:
        """The object's full path or URL, for messages."""
        return f"{self.url}/{key}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def check_key(key: str) -> str:
    """`key` itself. Keys may come from a manifest that somebody else wrote: none may lead out of the storage."""
    parts = key.split("/")
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{key!r} is not a key: keys are relative paths without '.', '..' or empty parts")
    return key


# --------------------------------------------------------------------------------------------------------------------
# Local folders


class LocalStorage(Storage):
    """A folder. It need not exist before something is written."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.url = str(self.root)

    def local_path(self, key: str) -> Path:
        return self.root / check_key(key)

    def child(self, prefix: str) -> LocalStorage:
        return LocalStorage(self.local_path(prefix.rstrip("/")))

    def get(self, key: str) -> bytes:
        path = self.local_path(key)
        with _local_errors("read", path):
            return path.read_bytes()

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        path = self.local_path(key)
        with _local_errors("read", path), path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise StorageError(f"{path} ends at byte {offset + len(data)}; {offset + length} were expected")
        return data

    def put(self, key: str, data: bytes) -> None:
        path = self.local_path(key)
        with _local_errors("write", path):
            temporary = _write_temporary(path, data)
            try:
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.local_path(key)
        if path.exists():
            return False
        with _local_errors("write", path):
            temporary = _write_temporary(path, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
        return True

    def stat(self, key: str) -> ObjectInfo:
        path = self.local_path(key)
        with _local_errors("read", path):
            found = path.stat()
        if not path.is_file():
            raise NotFound(f"{path} is a folder")
        return _local_info(key, found)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        top = self.local_path(folder) if folder else self.root
        found = []
        for parent, folders, names in os.walk(top, onerror=_raise_unless_absent):
            folders.sort()
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if not key.startswith(prefix) or TEMPORARY.fullmatch(name):
                    continue
                try:
                    found.append(_local_info(key, path.stat()))
                except FileNotFoundError:
                    continue  # removed since the folder was read
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with _local_errors("delete", path):
            path.unlink(missing_ok=True)


class _local_errors:
    """Turns an OSError into an error that says what was tried, where, and what to do."""

    def __init__(self, action: str, path: Path) -> None:
        self.action, self.path = action, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) and self.action != "write":
            raise NotFound(f"{self.path} does not exist") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk is full: cannot write {self.path}. Free some space and run this again"
            ) from error
        raise StorageError(f"cannot {self.action} {self.path}: {error.strerror or error}") from error


def _write_temporary(path: Path, data: bytes) -> Path:
    """`data` in a synced temporary file beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local_info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key=key, size=found.st_size, etag=f"{found.st_mtime_ns:x}-{found.st_size:x}")


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StorageError(f"cannot list {error.filename}: {error.strerror}") from error


# --------------------------------------------------------------------------------------------------------------------
# S3


class S3Storage(Storage):
    """A bucket and prefix on S3 or on anything that speaks it (AWS_ENDPOINT_URL_S3). Credentials come from boto3's own
    chain: the environment, a profile, an instance's role."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")

    def local_path(self, key: str) -> None:
        return None

    def child(self, prefix: str) -> S3Storage:
        return S3Storage(self.bucket, self._name(prefix.rstrip("/")))

    def get(self, key: str) -> bytes:
        return self._read(key, 0, None)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = self._read(key, offset, offset + length)
        if len(data) != length:
            raise StorageError(f"{self.locate(key)} ends at byte {offset + len(data)}; {offset + length} were expected")
        return data

    def put(self, key: str, data: bytes) -> None:
        if len(data) <= MULTIPART_BYTES:
            self._call(key, lambda client: client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data))
            return
        from io import BytesIO

        # s3transfer aborts the upload when a part fails: nothing appears under the key.
        self._call(key, lambda client: client.upload_fileobj(BytesIO(data), self.bucket, self._name(key)))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        def put(client: Any) -> bool:
            client.put_object(Bucket=self.bucket, Key=self._name(key), Body=data, IfNoneMatch="*")
            return True

        return self._call(key, put, when={"PreconditionFailed": False, "412": False})

    def stat(self, key: str) -> ObjectInfo:
        found = self._call(key, lambda client: client.head_object(Bucket=self.bucket, Key=self._name(key)))
        return ObjectInfo(key=key, size=found["ContentLength"], etag=found["ETag"].strip('"'))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        root = f"{self.prefix}/" if self.prefix else ""

        def pages(client: Any) -> list[ObjectInfo]:
            paginator = client.get_paginator("list_objects_v2")
            return [
                ObjectInfo(key=item["Key"][len(root) :], size=item["Size"], etag=item["ETag"].strip('"'))
                for page in paginator.paginate(Bucket=self.bucket, Prefix=root + prefix)
                for item in page.get("Contents", ())
            ]

        return sorted(self._call(prefix, pages), key=lambda info: info.key)

    def delete(self, key: str) -> None:
        self._call(key, lambda client: client.delete_object(Bucket=self.bucket, Key=self._name(key)))

    def _name(self, key: str) -> str:
        """The key inside the bucket."""
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def _call(self, key: str, action: Callable[[Any], T], when: dict[str, T] | None = None) -> T:
        """`action(client)`, with boto3's errors as this module's; `when` maps S3's error codes to answers."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        where = f"{self.url}/{key}" if key else self.url
        try:
            return action(s3_client())
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if when and code in when:
                return when[code]
            raise _s3_error(code, where, self.bucket, str(error)) from error
        except NoCredentialsError as error:
            raise StorageError(
                f"no S3 credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageError(f"{where}: {error}") from error

    def _read(self, key: str, start: int, end: int | None) -> bytes:
        """Bytes start..end (to the end of the object when None). boto3 retries a request but not a body that is cut
        short on its way: that is resumed here, from where it broke off and only while the object is the same."""
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        data = bytearray()
        etag: str | None = None
        wanted: int | None = None
        failures = 0
        while wanted is None or len(data) < wanted:
            request: dict[str, Any] = {"Bucket": self.bucket, "Key": self._name(key)}
            if start or data or end is not None:
                request["Range"] = f"bytes={start + len(data)}-{'' if end is None else end - 1}"
            if etag is not None:
                request["IfMatch"] = etag
            response = self._call(key, partial(_get_object, request=request))
            if wanted is None:
                etag, wanted = response["ETag"], response["ContentLength"]
            held = len(data)
            try:
                for chunk in response["Body"].iter_chunks(1024 * 1024):
                    data += chunk
            except (BotoCoreError, HTTPError, OSError) as error:
                failures = 0 if len(data) > held else failures + 1
                if failures > RESUMES:
                    raise StorageError(f"{self.locate(key)}: the body broke off {failures} times: {error}") from error
                time.sleep(min(0.1 * 2**failures, 5.0))
            else:
                if len(data) == held and len(data) < wanted:
                    raise StorageError(f"{self.locate(key)} ends at byte {start + len(data)}; {wanted} were announced")
        return bytes(data)


def _get_object(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    return client.get_object(**request)


def _s3_error(code: str, where: str, bucket: str, text: str) -> StorageError:
    """The error class and line for an S3 error code."""
    if code in ("NoSuchKey", "404", "NotFound"):
        return NotFound(f"{where} does not exist")
    if code == "NoSuchBucket":
        return NotFound(f"{where}: there is no bucket {bucket}")
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        return StorageError(f"{where}: access refused ({code}); check the AWS credentials in the environment")
    if code == "InvalidRange":
        return StorageError(f"{where} ends before the bytes that were asked for")
    if code in ("PreconditionFailed", "412"):
        return StorageError(f"{where} changed while it was being read")
    return StorageError(f"{where}: {text}")


_clients: dict[int, Any] = {}
_clients_lock = threading.Lock()


def s3_client() -> Any:
    """This process's S3 client (boto3 clients are safe among threads, not across a fork)."""
    with _clients_lock:
        client = _clients.get(os.getpid())
        if client is None:
            import boto3
            from botocore.config import Config

            # Stores other than Amazon's rarely serve a bucket as a host name or know its newer checksum trailers.
            own_endpoint = bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
            config = Config(
                retries={"mode": "standard", "max_attempts": 8},
                connect_timeout=10,
                read_timeout=30,
                max_pool_connections=64,
                s3={"addressing_style": "path"} if own_endpoint else {},
                request_checksum_calculation="when_required" if own_endpoint else "when_supported",
                response_checksum_validation="when_required" if own_endpoint else "when_supported",
            )
            region = None if boto3.session.Session().region_name else "us-east-1"
            client = boto3.session.Session().client("s3", region_name=region, config=config)
            _clients.clear()
            _clients[os.getpid()] = client
        return client


# --------------------------------------------------------------------------------------------------------------------
# URLs and patterns


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
    if not bucket:
        raise ConfigError(f"{url}: no bucket; write s3://bucket/prefix")
    return S3Storage(bucket, prefix)


def split_url(url: str) -> tuple[str, str]:
    """(root, key) of one object: "s3://b/a/x.tar" -> ("s3://b/a", "x.tar"); "b.tar" -> (".", "b.tar")."""
    root, _, key = url.rpartition("/")
    if not key or (root.endswith("/") and "://" in url and root.count("/") < 3):
        raise ConfigError(f"{url!r} names no object")
    if not root:
        return ("/" if url.startswith("/") else "."), key
    return root, key


def expand(pattern: str) -> list[tuple[Storage, str]]:
    """The objects that a pattern names, sorted by URL, each once.

    Braces ({00000..00009}, {a,b}) name objects that must all exist; globs (*, **, ?, [..]) name those that do.
    Raises SourceError when nothing matches or when something that braces name is missing.
    """
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise SourceError(f"{pattern}: the braces do not match") from error
    literal = sorted({name for name in names if not _is_glob(name)})
    missing = _missing(literal)
    if missing:
        if len(missing) == 1 and Path(missing[0]).is_dir():
            raise SourceError(
                f"{missing[0]} is a folder; name its shards, for example '{missing[0].rstrip('/')}/*.tar'"
            )
        count = f"{len(missing)} of the {len(literal)} shards" if len(literal) > 1 else "it"
        raise SourceError(f"{pattern}: {count} cannot be found, the first missing is {missing[0]}")
    found = set(literal)
    for name in names:
        if _is_glob(name):
            found.update(_glob(name))
    if not found:
        raise SourceError(f"{pattern}: nothing matches")
    roots: dict[str, Storage] = {}
    shards = []
    for url in sorted(found):
        root, key = split_url(url)
        shards.append((roots.setdefault(root, open_storage(root)), key))
    return shards


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def _missing(urls: list[str]) -> list[str]:
    """Those that do not exist. On S3 each root is listed once instead of asking for every object."""
    missing = [url for url in urls if "://" not in url and not Path(url).expanduser().is_file()]
    remote: dict[str, list[str]] = {}
    for url in urls:
        if "://" in url:
            root, key = split_url(url)
            remote.setdefault(root, []).append(key)
    for root, keys in remote.items():
        start = "".join(same[0] for same in takewhile(lambda column: len(set(column)) == 1, zip(*keys)))
        present = {info.key for info in open_storage(root).list(start)}
        missing += [f"{root}/{key}" for key in keys if key not in present]
    return missing


def _glob(pattern: str) -> list[str]:
    """URLs that match a glob."""
    if "://" not in pattern:
        paths = glob(os.path.expanduser(pattern), recursive=True)
        return [path for path in paths if Path(path).is_file() and not TEMPORARY.fullmatch(Path(path).name)]
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    storage = open_storage(fixed)
    matches = _glob_regex(pattern[len(fixed) + 1 :]).fullmatch
    return [f"{fixed}/{info.key}" for info in storage.list() if matches(info.key)]


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression in which only ** crosses a slash."""
    pieces = re.findall(r"\*\*/?|\*|\?|\[[^\]]+\]|.", pattern)
    words = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = []
    for piece in pieces:
        if piece in words:
            parts.append(words[piece])
        elif len(piece) > 1:
            parts.append(piece.replace("[!", "[^").replace("\\", "\\\\"))
        else:
            parts.append(re.escape(piece))
    return re.compile("".join(parts))
