"""Copies of plain data without secrets, for data that leaves the machine or is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
SECRET_WORDS = frozenset(
    ["key", "apikey", "secret", "token", "password", "passwd", "passphrase", "credential", "credentials"]
)
PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
SIGNED_QUERY = re.compile(r"(?i)([?&](?:x-amz-signature|x-amz-security-token|sig|signature|token)=)[^&\s]+")


def redact(value: Any, key: str = "") -> Any:
    """A copy of plain data without secrets.

    Replaced are values whose key contains a word such as key, secret, token or password, and in URLs user names,
    passwords and the signatures of queries.
    """
    if isinstance(value, Mapping):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    if value not in ("", None) and SECRET_WORDS.intersection(words):
        return REDACTED
    if isinstance(value, str):
        return SIGNED_QUERY.sub(rf"\1{REDACTED}", PASSWORD_IN_URL.sub(REDACTED, value))
    return value
