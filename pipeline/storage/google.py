"""Puts to Google Cloud Storage that are to fail where the object exists.

Google's XML API takes S3's requests as they are, but ignores `If-None-Match: *` on a put. Its own condition,
`x-goog-if-generation-match: 0`, it refuses beside any `x-amz-` header (400 ExcessHeaderValues), and S3's signature is
made of those. Such a put is therefore signed anew with Google's own signature, which is S3's with other words and the
same key (GOOG4-HMAC-SHA256, https://cloud.google.com/storage/docs/authentication/signatures).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

ALGORITHM, SCOPE = "GOOG4-HMAC-SHA256", "auto/storage/goog4_request"
ABSENT = {"x-goog-if-generation-match": "0"}
"""The condition that an object does not exist."""
AMAZONS = ("x-amz-", "amz-sdk-")
"""What the names of Amazon's own headers begin with."""
USUAL_PORT = {"http": ":80", "https": ":443"}
"""What a request's Host leaves out."""


def sign_conditional_puts(client: Any, key_id: str, secret: str) -> None:
    """Make a boto3 client send puts with `If-None-Match: *` as Google understands them."""

    def resign(request: Any, **_: Any) -> None:
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        if headers.get("if-none-match") != "*":
            return
        payload = headers["x-amz-content-sha256"]
        for name in list(request.headers):
            if name.lower().startswith(AMAZONS) or name.lower() in ("authorization", "if-none-match"):
                del request.headers[name]
        signed = signature(request.method, request.url, payload, ABSENT, key_id, secret, datetime.now(UTC))
        for name, value in signed.items():
            request.headers[name] = value

    client.meta.events.register("before-send.s3.PutObject", resign)


def signature(
    method: str, url: str, payload: str, conditions: Mapping[str, str], key_id: str, secret: str, now: datetime
) -> dict[str, str]:
    """The headers of a request that Google is to take: `conditions`, the time, the body's SHA-256 `payload` (64
    hexadecimal digits) and Authorization. url: with its path as it is sent."""
    parts, second = urlsplit(url), now.strftime("%Y%m%dT%H%M%SZ")
    headers = {"x-goog-content-sha256": payload, "x-goog-date": second, **conditions}
    host = parts.netloc.lower().removesuffix(USUAL_PORT.get(parts.scheme, ""))  # as it is sent
    covered = dict(sorted({"host": host, **headers}.items()))
    names = ";".join(covered)
    lines = [f"{name}:{value}" for name, value in covered.items()]
    request = "\n".join([method, parts.path or "/", parts.query, *lines, "", names, payload])
    scope = f"{second[:8]}/{SCOPE}"
    digest = hashlib.sha256(request.encode()).hexdigest()
    key = f"GOOG4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signed = hmac.digest(key, "\n".join([ALGORITHM, second, scope, digest]).encode(), "sha256").hex()
    words = f"{ALGORITHM} Credential={key_id}/{scope}, SignedHeaders={names}, Signature={signed}"
    return {**headers, "Authorization": words}


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
