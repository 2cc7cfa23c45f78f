"""Text of others made fit to be shown and stored: control characters are escaped, secrets are left out.

`printable` and `redact` (redaction.py) are the only places that do so; `safe` does both. The logger, the line with
which a verb fails and results on a terminal go through them.
"""

from __future__ import annotations

import re

from pipeline.parsing.redaction import REDACTED, redact, redact_values

__all__ = ["LONGEST_LINE", "REDACTED", "one_line", "printable", "redact", "redact_values", "safe"]

LONGEST_LINE = 4000
"""Characters of one line of a message; what is longer is cut in its middle."""
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters, marks of writing direction and halves of surrogate pairs escaped, as in \\x1b and
    \\u202e. Newlines and tabs stay."""
    return UNPRINTABLE.sub(_escaped, text)


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


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
