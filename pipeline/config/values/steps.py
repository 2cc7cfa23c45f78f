"""Numbers of optimizer steps: "100..109"."""

from __future__ import annotations

import re

from pipeline.errors import ConfigError

RANGE = re.compile(r"([1-9][0-9]{0,14})\.\.([1-9][0-9]{0,14})")
MOST = 100
"""Most steps that are profiled: a trace holds every operation of every step."""


def profiled_steps(text: str) -> tuple[int, int] | None:
    """The first and the last step of tracking.profile, counted from 1; None for "". Raises ConfigError."""
    if not text:
        return None
    match = RANGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"tracking.profile={text[:60]}: two numbers of steps are wanted, from 1 on, such as 100..104")
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MOST:
        raise ConfigError(
            f"tracking.profile={text}: these are {max(last - first + 1, 0)} steps, and from 1 to {MOST} are profiled"
        )
    return first, last
