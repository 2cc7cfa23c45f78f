"""What a store with S3's protocol answers, read with distrust: sizes, bodies, listed keys, and errors as our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import NotFound, StorageError
from pipeline.storage.base import TEMPORARY
from pipeline.storage.patience import Patience
from pipeline.storage.stores import store_of

PASSING_STATUS = (408, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed later."""
PASSING_CODES = (
    "SlowDown",
    "InternalError",
    "RequestTimeout",  # comes with status 400
    "OperationAborted",  # 409: another request changes the same key
    "ConditionalRequestConflict",  # the same for conditional puts
    "BadDigest",  # bytes were damaged on their way to the store
    "XAmzContentSHA256Mismatch",
)
"""S3's error codes after which the same request may succeed later, whatever their status."""
REFUSALS = (
    "401",
    "403",
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",  # Google's, for a key that it does not know
    "SignatureDoesNotMatch",
)
"""S3's error codes for whoever may not ask."""
LISTING = b"ListBucketResult"
"""What a listing's text begins with."""
FIRST_BYTES = 64 * 1024 * 1024
"""Memory that is taken at once for an object that announces this size or more; more follows as bytes arrive."""
LARGEST_OBJECT = 1 << 50
"""Larger objects than any store keeps: a size beyond it is no size."""


class Body:
    """The bytes of an object as they come. Without a view, memory is taken as bytes arrive and not as a header
    announces them."""

    def __init__(self, view: memoryview | None) -> None:
        self._view, self._buffer = view, bytearray()
        self.size = 0 if view is None else len(view)
        """Bytes that belong to it."""
        self.received = 0

    def expect(self, announced: Any, start: int, where: str, *, first: bool) -> None:
        """Take the size that an answer announces, in bytes. start: offset in the object of the first byte. first:
        whether this is the first answer. Raises StorageError where it is not what is left."""
        announced = object_size(announced, where)
        if first and self._view is None:
            self.size = announced
        if announced != self.size - self.received:
            if first:
                raise StorageError(f"{where} ends at byte {start + announced}; {start + self.size} were expected")
            raise StorageError(f"{where}: {self.size - self.received} bytes were left, and {announced} came")

    def add(self, chunk: bytes) -> None:
        """Take the next bytes; what comes beyond `size` is dropped."""
        chunk = chunk[: self.size - self.received]
        end = self.received + len(chunk)
        if self._view is not None:
            self._view[self.received : end] = chunk
        else:
            if end > len(self._buffer):
                grown = min(self.size, max(end, FIRST_BYTES, 2 * len(self._buffer)))
                self._buffer.extend(bytes(grown - len(self._buffer)))
            self._buffer[self.received : end] = chunk
        self.received = end

    def content(self) -> memoryview:
        """All of it."""
        return self._view if self._view is not None else memoryview(self._buffer)


def object_size(value: Any, where: str) -> int:
    """A size that a store has named, in bytes. Raises StorageError for what is none."""
    if type(value) is not int or not 0 <= value <= LARGEST_OBJECT:
        raise StorageError(
            f"{where}: the store names {'no size' if value is None else f'the size {value}'}. Check that "
            f"{store_of(where).endpoint} is a store with S3's protocol"
        )
    return value


def etag_of(answer: Mapping[str, Any]) -> str:
    """The ETag of an answer; "" where there is none."""
    return str(answer.get("ETag") or "").strip('"')


def is_object(key: str) -> bool:
    """Whether a listed key is an object that can be asked for, and no folder's marker ("a/"), key with empty parts or
    temporary file."""
    parts = key.split("/")
    return bool(key) and all(part not in ("", ".", "..") for part in parts) and not TEMPORARY.fullmatch(parts[-1])


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: there was no connection, no complete answer, or the server says
    so."""
    from botocore.exceptions import (
        ClientError,
        ConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
    )
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code in PASSING_CODES or status in PASSING_STATUS
    passing = (ConnectionError, FlexibleChecksumError, HTTPClientError, IncompleteReadError, ResponseParserError)
    return isinstance(error, passing)


def s3_error(error: Exception, where: str, bucket: str, patience: Patience) -> StorageError:
    """The error with which an exception of boto3 is reported. where: the object's URL."""
    from botocore.exceptions import ClientError, NoCredentialsError

    if isinstance(error, NoCredentialsError):
        return StorageError(
            f"no S3 credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ClientError):
        code, text = error.response.get("Error", {}).get("Code", ""), error.response.get("Error", {}).get("Message", "")
        if code in ("NoSuchKey", "404", "NotFound"):
            return NotFound(f"{where} does not exist")
        if code == "NoSuchBucket":
            return NotFound(f"{where}: there is no bucket {bucket}")
        if code in REFUSALS:
            store = store_of(where)
            keys = "the AWS credentials" if store.scheme == "s3" else f"{store.key_id} and {store.secret}"
            return StorageError(f"{where}: access refused ({code}); check {keys} in the environment")
        if code == "InvalidRange":
            return StorageError(f"{where} ends before the bytes that were asked for")
        if code in ("PreconditionFailed", "412"):
            return StorageError(f"{where} changed while it was being read")
        text = f"{code}: {text}"
    return StorageError(f"{where}, {patience}: {text}" if may_pass(error) else f"{where}: {text}")


def refuse_half_an_answer(response_dict: Mapping[str, Any], operation_model: Any, **_: Any) -> None:
    """Refuse an incomplete answer. botocore parses one without counting its bytes, so that a truncated listing would
    look like an empty folder."""
    from botocore.exceptions import IncompleteReadError
    from botocore.parsers import ResponseParserError

    body, announced = response_dict["body"], response_dict["headers"].get("content-length")
    if operation_model.name == "ListObjectsV2" and response_dict["status_code"] == 200 and LISTING not in body[:2000]:
        raise ResponseParserError(f"it is no listing but {body[:60]!r}")  # an empty folder has one, too
    if announced is None or not isinstance(body, bytes) or operation_model.http["method"] == "HEAD":
        return
    if len(body) != int(announced):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(announced))
