"""Time limits in Slurm's notation."""

from __future__ import annotations

import re

TIME = re.compile(
    r"(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?|(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)|(?P<mm>\d+)(:(?P<ms>\d+))?"
)
"""days-hours[:minutes[:seconds]], hours:minutes:seconds or minutes[:seconds]."""


def limit_seconds(text: str) -> float | None:
    """A time limit in Slurm's notation, in seconds: infinite for UNLIMITED and 0, None for a text that is no limit."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = TIME.fullmatch(text)
    if not match:
        return None
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    minutes = 60 * (24 * part["d"] + part["dh"] + part["h"]) + part["dm"] + part["m"] + part["mm"]
    return 60 * minutes + part["ds"] + part["s"] + part["ms"] or float("inf")
