"""Names of units: as users give them, and as messages show them to be given."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pipeline.errors import ConfigError
from preprocess.source.advice import PLAIN_NAME, argument

SHOWN = 20
"""Names that a message lists so that they can be given to a key."""


def option(key: str, names: Sequence[str]) -> str:
    """KEY=[NAME,NAME] as it can be typed into a shell. Of more than SHOWN names the first are shown, and how many there
    are."""
    listed = list(names[:SHOWN])
    if len(listed) > 1 and all(map(PLAIN_NAME.fullmatch, listed)):
        text = f"{key}=[{','.join(listed)}]"
    else:  # a key that is repeated makes a list, whatever is in its names
        text = " ".join(f"{key}={argument(name)}" for name in listed)
    return text if len(names) <= SHOWN else f"{text} (the first {SHOWN} of {len(names)})"


def resolve(key: str, given: Sequence[str], names: Sequence[str]) -> list[int]:
    """Numbers of the units that a key names, by their names in the plan or by longer or shorter ends of their paths.

    key: for messages. Raises ConfigError for a name that no unit has, or several.
    """
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for name in given:
        near = name.rstrip("/")
        if near in numbers:
            found.append(numbers[near])
            continue
        ends = [number for other, number in numbers.items() if near.endswith(f"/{other}")]
        if ends:
            found.append(max(ends, key=lambda number: len(names[number])))
            continue
        starts = [number for other, number in numbers.items() if other.endswith(f"/{near}")]
        if len(starts) == 1:
            found.append(starts[0])
        elif starts:
            several = ", ".join(names[number] for number in starts[:SHOWN])
            raise ConfigError(f"{option(key, [name])}: {len(starts)} input shards are named so: {several}; give one")
        else:
            close = difflib.get_close_matches(near, names[:10_000], n=1, cutoff=0.0)
            hint = f"; did you mean {option(key, close)}?" if close else ""
            raise ConfigError(f"{option(key, [name])}: none of the {len(names)} input shards has this name{hint}")
    return sorted(set(found))
