"""What is known of a sample that was rejected."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import RecordRejected
from pipeline.parsing.text import one_line

FAILED = "sample_failed"
"""Reason of a sample on which this program's own code raised something."""
SLOW = "too_slow"
"""Reason of a sample that took longer than limits.seconds."""
CRASHED = "decoder_crashed"
"""Reason of a sample on which the decoding process died, twice."""
ALOUD = (FAILED, SLOW, CRASHED)
"""Reasons that nobody expects, which are logged with the sample's key."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
LONGEST = 300  # characters of a key or a message


@dataclass(frozen=True)
class Rejected:
    """A rejected sample. reason: the word by which it is counted. message: what was found; it may be "". Both texts are
    single, printable, bounded lines that depend on the sample alone."""

    key: str
    reason: str
    message: str = ""


def rejected(key: str, error: Exception) -> Rejected:
    """The rejection that an exception of one sample amounts to, whatever it is."""
    if isinstance(error, RecordRejected):
        reason, message = error.reason, str(error).removeprefix(error.reason).removeprefix(": ")
    else:
        reason, message = FAILED, f"{type(error).__name__}: {error}"
    return Rejected(bounded(key), reason, bounded(ADDRESS.sub("", message)))


def bounded(text: str) -> str:
    """A text as one printable line of at most LONGEST characters."""
    line = one_line(text[: 4 * LONGEST])
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
