"""What lies at a destination before a verb writes there."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import DestinationExists
from pipeline.storage.base import Storage

SHOWN = 3
"""Keys that a refusal names."""


def require_free(storage: Storage, would_write: Callable[[str], bool], what: str) -> None:
    """Raise DestinationExists, which names the first keys, when the storage holds a key that would be written.

    would_write: whether a key is one of those. what: what would be written, as in "a dataset". Keys that nothing would
    be written to may lie there.
    """
    taken = [info.key for info in storage.list() if would_write(info.key)]
    if taken:
        more = f" and {len(taken) - SHOWN} more" if len(taken) > SHOWN else ""
        raise DestinationExists(
            f"{storage.url} holds {', '.join(taken[:SHOWN])}{more}, which would be written over and no earlier run "
            f"made: choose another place for {what}"
        )
