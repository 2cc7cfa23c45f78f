"""Text of others made fit to be shown and stored: control characters are escaped, secrets are left out.

`printable` and `redact` are the only places that do so; `safe` does both. The logger, the line with which a verb fails
and results on a terminal go through them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
SECRET_WORDS = frozenset(
    ["key", "apikey", "secret", "token", "password", "passwd", "passphrase", "credential", "credentials"]
)
PASSWORD_IN_URL = re.compile(r"(?<=://)[^\s\"'<>]{1,4096}@(?=[^\s\"'<>@/?#]*)")
SIGNED_QUERY = re.compile(
    r"(?i)([?&](?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|token|awsaccesskeyid)=)[^&\s\"'<>]+"
)
LONGEST_LINE = 4000
"""Characters of one line of a message; what is longer is cut in its middle."""
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters, marks of writing direction and halves of surrogate pairs escaped, as in \\x1b and
    \\u202e. Newlines and tabs stay."""
    return UNPRINTABLE.sub(_escaped, text)


def redact(text: str) -> str:
    """`text` without the users, passwords and signed queries of URLs."""
    if "://" not in text and "=" not in text:
        return text
    return SIGNED_QUERY.sub(rf"\1{REDACTED}", PASSWORD_IN_URL.sub(f"{REDACTED}@", text))


def safe(text: str) -> str:
    """`text` without secrets and with control characters escaped."""
    return printable(redact(text))


def one_line(text: str) -> str:
    """`text` as one safe line of LONGEST_LINE characters at most."""
    line = safe(" ".join(text.split()))
    if len(line) <= LONGEST_LINE:
        return line
    half = LONGEST_LINE // 2
    return f"{line[:half]} [{len(line) - 2 * half} characters left out] {line[-half:]}"


def redact_values(value: Any, key: str = "") -> Any:
    """A copy of plain data without secrets.

    Replaced are values whose key contains a word such as key, secret, token or password, and in texts what `redact`
    replaces.
    """
    if isinstance(value, Mapping):
        return {k: redact_values(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(v, key) for v in value]
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    if value not in ("", None) and SECRET_WORDS.intersection(words):
        return REDACTED
    return redact(value) if isinstance(value, str) else value


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
