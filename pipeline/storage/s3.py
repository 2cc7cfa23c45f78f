"""Objects in a bucket on S3, or on another store with its protocol. Only this module imports boto3, inside functions.

Which stores these are, and what leads to them, is in stores.py; what Google's needs besides, in google.py.

Requests that fail are retried with growing random waits until PATIENCE_SECONDS pass without progress. boto3's own
retries are off, because they are few, share a budget among threads and cover an answer's headers but not its body.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import ConfigError, LatentmillError, StorageError
from pipeline.parsing.redaction import holds_secret, redact
from pipeline.storage.answers import (
    Body,
    etag_of,
    is_object,
    may_pass,
    object_size,
    refuse_half_an_answer,
    s3_error,
)
from pipeline.storage.base import ObjectInfo, Storage, check_key, local_errors, temporary_path
from pipeline.storage.google import sign_conditional_puts
from pipeline.storage.pace import keep_pace
from pipeline.storage.patience import Patience, answered
from pipeline.storage.stores import STORES, Store

MULTIPART_BYTES = 64 * 1024 * 1024
"""S3 objects larger than this are uploaded in parts."""
PART_BYTES = 16 * 1024 * 1024
"""Size of a part; larger where an object would have over 10,000 parts. S3 requires 5 MiB or more."""
CHUNK_BYTES = 1024 * 1024
"""Bytes of a body that are read at once."""
PART_THREADS = 4
"""Parts of one object that are uploaded at the same time; each is held in memory."""
CONNECT_SECONDS = 10.0
"""Longest time in which a connection to S3 must be made."""
EMPTY_PAGES = 100
"""Pages without an object that a listing may have."""
READ_SECONDS = 30.0
"""How long S3 may be silent in the middle of an answer."""
AMAZONS = re.compile(r"\.amazonaws\.com(\.cn)?$")
"""How the host names of Amazon's own stores end."""


class S3Storage(Storage):
    """A bucket and prefix on S3, or on another store with its protocol (AWS_ENDPOINT_URL_S3). boto3 finds the
    credentials of s3:// as usual: in the environment, a profile or an instance's role."""

    def __init__(self, bucket: str, prefix: str = "", store: Store = STORES["s3"]) -> None:
        self.bucket, self.prefix, self.store = bucket, prefix.strip("/"), store
        self.url = f"{store.scheme}://{bucket}/{self.prefix}".rstrip("/")

    def local_path(self, key: str) -> None:
        return None

    def child(self, prefix: str) -> S3Storage:
        return S3Storage(self.bucket, self._name(prefix.rstrip("/")), self.store)

    def get(self, key: str) -> bytes:
        return bytes(self._read(key, 0, None))

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        if len(view):
            self._read(key, offset, view)

    def put(self, key: str, data: bytes) -> None:
        if len(data) <= MULTIPART_BYTES:
            self._call("put_object", key, {"Body": data})
        else:
            self._put_parts(key, len(data), lambda start, end: data[start:end])

    def put_file(self, key: str, path: Path) -> None:
        def read(start: int, end: int) -> bytes:
            with local_errors("read", path), path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)

        with local_errors("read", path):
            size = path.stat().st_size
        if size <= MULTIPART_BYTES:
            self._call("put_object", key, {"Body": read(0, size)})
        else:
            self._put_parts(key, size, read)
        with local_errors("delete", path):
            path.unlink(missing_ok=True)

    def staging_path(self) -> Path:
        return temporary_path(Path(tempfile.gettempdir(), "latentmill"))

    def sweep(self, seconds: float) -> None:
        return None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if (os.getpid(), self.store.scheme) not in _conditional:
            self._require_conditions(check_key(key))
        return self._put_if_absent(key, data)

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        request = {"Body": data, "IfNoneMatch": "*"}
        answers = {"PreconditionFailed": False, "412": False, "NotImplemented": None}
        answer = self._call("put_object", key, request, when=answers)
        if answer is None:
            raise self._unconditional("refuses a put with If-None-Match as not implemented")
        return answer is not False

    def _require_conditions(self, key: str) -> None:
        """Put an object of its own beside `key` twice: a store that takes it a second time ignores the condition, and
        two processes would each believe that they alone train a run or encode a shard. Amazon's is not asked, another
        store once in a process. Raises StorageError."""
        endpoint = urlsplit(s3_client(self.store).meta.endpoint_url).hostname or ""
        if not AMAZONS.search(endpoint):
            probe = f"{key[: key.rfind('/') + 1]}.conditional.{secrets.token_hex(8)}.tmp"  # no listing has it
            ignored = self._put_if_absent(probe, b"") and self._put_if_absent(probe, b"")
            try:
                self._call("delete_object", probe)
            except StorageError:
                pass  # it may put and not delete
            if ignored:
                raise self._unconditional("takes a put with If-None-Match though the object exists")
        _conditional.add((os.getpid(), self.store.scheme))

    def _unconditional(self, what: str) -> StorageError:
        """The error for a store without conditional puts."""
        google = "; write gs://bucket/prefix for Google's" if self.store.scheme == "s3" else ""
        return StorageError(
            f"{self.url}: the store at {redact(s3_client(self.store).meta.endpoint_url)} {what}, so that nothing could "
            "keep two processes from writing one run or one cache. Use a store that has conditional puts, or a later "
            f"version of it{google}"
        )

    def stat(self, key: str) -> ObjectInfo:
        answer = self._call("head_object", key)
        return ObjectInfo(key, object_size(answer.get("ContentLength"), self.locate(key)), etag_of(answer))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        root = f"{self.prefix}/" if self.prefix else ""
        request: dict[str, Any] = {"Prefix": root + prefix}
        infos: dict[str, ObjectInfo] = {}
        tokens: set[str] = set()
        while True:
            page = self._call("list_objects_v2", prefix, request)
            before = len(infos)
            for item in page.get("Contents", ()):
                key = item.get("Key", "")
                if not key.startswith(root + prefix):
                    raise self._lies(prefix, f"a listing of {root + prefix!r} holds {key!r}")
                if is_object(key[len(root) :]):
                    size = object_size(item.get("Size"), f"{self.url}/{key[len(root) :]} in a listing")
                    infos[key] = ObjectInfo(key[len(root) :], size, etag_of(item))
            if not page.get("IsTruncated"):
                return sorted(infos.values(), key=lambda info: info.key)
            token = page.get("NextContinuationToken")
            if not token or token in tokens or (len(infos) == before and len(tokens) > EMPTY_PAGES):
                raise self._lies(prefix, "a listing says that more follows, and nothing does")
            tokens.add(token)
            request["ContinuationToken"] = token

    def delete(self, key: str) -> None:
        self._call("delete_object", key)

    def _name(self, key: str) -> str:
        """The key inside the bucket."""
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def _put_parts(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        """Upload `size` bytes in parts, each of which is retried separately. read(start, end): returns any piece of the
        bytes. The object appears when all parts are uploaded. The bucket's lifecycle rule removes parts that remain
        where an abort failed."""
        step = max(PART_BYTES, -(-size // 10_000))
        # boto3 sends Amazon a checksum with every part, and the upload must announce that.
        sums = {} if self.store.reached_at() else {"ChecksumAlgorithm": "CRC32"}
        upload = {"UploadId": self._call("create_multipart_upload", key, sums).get("UploadId")}
        if not upload["UploadId"]:
            raise self._lies(key, "an upload was begun, and the answer does not name it")

        def send(number: int) -> dict[str, Any]:
            data = read((number - 1) * step, min(number * step, size))
            answer = self._call("upload_part", key, {**upload, **sums, "PartNumber": number, "Body": data})
            return {"PartNumber": number} | {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}

        try:
            with ThreadPoolExecutor(PART_THREADS) as pool:
                sending = [pool.submit(send, number) for number in range(1, -(-size // step) + 1)]
                try:
                    parts = [future.result() for future in sending]
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
            self._call("complete_multipart_upload", key, {**upload, "MultipartUpload": {"Parts": parts}})
        except BaseException:
            try:
                self._call("abort_multipart_upload", key, upload, patience=Patience(0.0))
            except LatentmillError:
                pass  # the first failure is raised
            raise

    def _call(
        self,
        operation: str,
        key: str,
        request: Mapping[str, Any] | None = None,
        *,
        when: Mapping[str, Any] | None = None,
        patience: Patience | None = None,
    ) -> Any:
        """S3's answer to an operation on the object `key` (for a listing: on the prefix). when: the result for some of
        S3's error codes. Other failures are retried where that may help, and then raised as StorageError."""
        from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
        from botocore.parsers import ResponseParserError

        where = f"{self.url}/{key}" if key else self.url
        target = {"Bucket": self.bucket} | ({} if operation == "list_objects_v2" else {"Key": self._name(key)})
        patience = patience or Patience()
        while True:
            try:
                answer = getattr(s3_client(self.store), operation)(**target, **(request or {}))
                answered.add(os.getpid())
                return answer
            except ParamValidationError as error:
                said = " ".join(str(error).split())[:300]
                raise ConfigError(f"{where}: {said}; write {self.store.scheme}://bucket/prefix") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # botocore parses what it is sent
                raise self._lies(key, f"its answer cannot be read ({type(error).__name__}: {error})") from error
            except (BotoCoreError, ClientError, ResponseParserError) as error:
                if isinstance(error, ClientError):
                    answered.add(os.getpid())
                    code = error.response.get("Error", {}).get("Code", "")
                    if when and code in when:
                        return when[code]
                if not (may_pass(error) and patience.wait()):
                    raise s3_error(error, where, self.bucket, patience) from error

    def _lies(self, key: str, what: str) -> StorageError:
        """The error for an answer that no store with S3's protocol gives."""
        where = f"{self.url}/{key}" if key else self.url
        return StorageError(f"{where}: {what[:300]}. Check that {self.store.endpoint} is a store with S3's protocol")

    def _read(self, key: str, start: int, view: memoryview | None) -> memoryview:
        """The object's bytes from `start` on: as many as fit into `view`, which is filled, or with view=None all of
        them. A body that breaks off is resumed from there, unless the object has changed since. Raises NotFound,
        StorageError."""
        from botocore.exceptions import BotoCoreError, FlexibleChecksumError
        from urllib3.exceptions import HTTPError

        body = Body(view)
        etag: str | None = None
        patience = Patience()
        while etag is None or body.received < body.size:
            request: dict[str, Any] = {}
            if start or body.received or view is not None:
                request["Range"] = f"bytes={start + body.received}-{start + body.size - 1 if view is not None else ''}"
            if etag:
                request["IfMatch"] = etag
            response = self._call("get_object", key, request, patience=patience)
            try:
                body.expect(response.get("ContentLength"), start, self.locate(key), first=etag is None)
            except StorageError:
                response["Body"].close()
                raise
            etag, received_before = etag_of(response), body.received
            failure: Exception = EOFError("it ended early")
            try:
                for chunk in response["Body"].iter_chunks(CHUNK_BYTES):
                    body.add(chunk)
            except FlexibleChecksumError as error:
                failure, body.received = error, 0
            except (BotoCoreError, HTTPError, OSError) as error:
                failure = error
            if etag and body.received > received_before:
                patience.gained()
            if body.received < body.size:
                if not patience.wait():
                    raise StorageError(f"{self.locate(key)}: the body broke off, {patience}: {failure}") from failure
                if not etag:  # nothing says whether the rest would be of the same object
                    body.received = 0
        return body.content()


_clients: dict[tuple[int, str], Any] = {}
_clients_lock = threading.Lock()
_conditional: set[tuple[int, str]] = set()
"""Process and scheme of the stores that are known to have conditional puts."""


def s3_client(store: Store = STORES["s3"]) -> Any:
    """This process's client of a store (threads may share a boto3 client, but a fork may not). Raises ConfigError where
    the environment names an endpoint that is no URL."""
    mine = (os.getpid(), store.scheme)
    with _clients_lock:
        client = _clients.get(mine)
        if client is None:
            client = _new_client(store)
            for other in [other for other in _clients if other[0] != mine[0]]:
                del _clients[other]
            _clients[mine] = client
        return client


def _new_client(store: Store) -> Any:
    """A boto3 client of a store. Raises ConfigError."""
    import boto3
    from botocore.config import Config

    # Other stores rarely give each bucket a host name, or support Amazon's newer checksum trailers.
    endpoint, keys = store.reached_at(), store.keys()
    checksums = "when_required" if endpoint else "when_supported"
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=64,
        s3={"addressing_style": "path"} if endpoint else {},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    )
    session = boto3.session.Session()
    given: dict[str, str] = {"region_name": session.region_name or "us-east-1"}
    if keys is not None:
        region = "auto" if store.scheme == "gs" else "us-east-1"
        given = {"region_name": region, "aws_access_key_id": keys[0], "aws_secret_access_key": keys[1]}
        given["endpoint_url"] = endpoint
    try:
        client = session.client("s3", config=config, **given)
    except ValueError as error:
        raise ConfigError(f"{store.scheme}://: {error}; write {store.endpoint} as https://host:port") from error
    if holds_secret(client.meta.endpoint_url):
        raise ConfigError(
            f"{store.scheme}://: the endpoint {redact(client.meta.endpoint_url)} holds a user and password, which are "
            f"not taken from there; set {store.key_id} and {store.secret}, and leave them out of it"
        )
    client.meta.events.register("before-parse.s3", refuse_half_an_answer)
    if keys is not None and store.scheme == "gs":
        sign_conditional_puts(client, *keys)
    keep_pace(client)
    return client
