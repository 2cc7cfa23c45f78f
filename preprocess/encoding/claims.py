"""Who works on which unit: advisory claims that expire (docs/explained/promises.md, 2).

A claim is a small object beside the dataset. Nothing correct depends on it: units have the same bytes whoever encodes
them. Its owner renews it while it works; whoever sees it unchanged for `seconds` of its own clock takes the unit over,
so no clocks are compared. Nobody waits for a worker that lives.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from pipeline.errors import NotFound, StorageError
from pipeline.storage.base import Storage

CLAIMS = "claims"
RENEWALS = 4  # in the time after which a claim counts as dead
POLL = 0.25  # seconds between looks at others' claims, at the shortest
MINE, DOUBTFUL = "mine", "doubtful"


class Claims:
    """`with Claims(...) as claims: claims.take(number)`. Renews what it holds in a thread of its own."""

    def __init__(self, storage: Storage, seconds: float) -> None:
        self._storage, self._seconds = storage, seconds
        self._name = secrets.token_hex(8)
        self._held: set[int] = set()
        self._seen: dict[int, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats = 0
        self._thread = threading.Thread(target=self._renew, name="latentmill-claims", daemon=True)
        self._thread.start()

    def take(self, number: int) -> bool:
        """Whether the unit is ours now: nobody had claimed it."""
        with self._lock:
            mine = self._storage.put_if_absent(claim_key(number), self._body())
            if mine:
                self._held.add(number)
            return mine

    def judge(self, number: int) -> bool | None:
        """Another's claim: False when it lives (it has been renewed since it was first looked at), True when it is dead
        or gone, None while that cannot be said."""
        try:
            etag = self._storage.stat(claim_key(number)).etag
        except NotFound:
            return True
        first, since = self._seen.setdefault(number, (etag, time.monotonic()))
        if etag != first:
            return False
        return True if time.monotonic() - since >= self._seconds else None

    def take_over(self, number: int) -> None:
        """Claim a unit whose claim is dead or gone."""
        with self._lock:
            self._storage.put(claim_key(number), self._body())
            self._held.add(number)

    def release(self, number: int) -> None:
        """The unit is done."""
        with self._lock:
            self._held.discard(number)
            self._storage.delete(claim_key(number))

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives up what is still held, so that nobody need wait for it to expire. A store that fails now does not hide
        what went wrong before."""
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):
            for number in list(self._held):
                self.release(number)

    def _body(self) -> bytes:
        """Differs from one renewal to the next, so that the object's etag does."""
        self._beats += 1
        return f"{self._name} {self._beats}\n".encode()

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / RENEWALS):
            with self._lock:
                for number in self._held:
                    with suppress(StorageError):  # the worst is that somebody encodes this unit as well
                        self._storage.put(claim_key(number), self._body())


def claim_key(number: int) -> str:
    """Key of the claim on a unit."""
    return f"{CLAIMS}/{number:06d}"


class Work:
    """Units still to be done, one by one, to a worker that shares them with any number of others.

    is_done: whether a unit is finished now, asked right before it is handed out. Its own share (units whose number is
    rank modulo world) comes first, then everybody else's.
    """

    def __init__(
        self, numbers: list[int], rank: int, world: int, claims: Claims, is_done: Callable[[int], bool]
    ) -> None:
        self._open = sorted(numbers, key=lambda number: ((number - rank) % world, number))
        self._claims, self._is_done = claims, is_done
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let `next` return at once."""
        self._stopped.set()

    def next(self) -> int | None:
        """The next unit, claimed; None when every one left is done or in living hands. May wait for a claim to show
        whether it lives."""
        doubtful: list[int] = []
        while self._open and not self._stopped.is_set():
            number = self._open.pop(0)
            verdict = None if self._is_done(number) else self._claim(number)
            if verdict == MINE:
                self._open += doubtful
                return number
            if verdict == DOUBTFUL:
                doubtful.append(number)
            if not self._open and doubtful:
                self._open, doubtful = doubtful, []
                self._stopped.wait(POLL)
        return None

    def _claim(self, number: int) -> str | None:
        """MINE, DOUBTFUL, or None when the unit is done or somebody alive works on it."""
        if not self._claims.take(number):
            dead = self._claims.judge(number)
            if not dead:
                return DOUBTFUL if dead is None else None
            self._claims.take_over(number)
        if self._is_done(number):  # finished since it was asked
            self._claims.release(number)
            return None
        return MINE
