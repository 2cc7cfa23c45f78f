"""Advisory claims, which say who works on which unit, and expire (docs/explained/promises.md, 2).

A claim is a small object beside the dataset. Correctness does not depend on it: a unit has the same bytes whichever
worker encodes it. The owner renews its claim while it works. A worker that sees a claim unchanged for `seconds` of its
own clock takes the unit over, so clocks of different machines are never compared. No worker waits for a living one.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType

from pipeline.errors import NotFound, StorageError
from pipeline.log import log
from pipeline.storage.base import Storage

CLAIMS = "claims"
APPENDING = "append-"  # begins the names of claims by which workers show that they append shards
RENEWALS = 4  # of a claim in the time after which it counts as dead
POLL, LONGEST_POLL = 0.25, 4.0  # seconds between two looks at other workers' claims
PAGE = 1000  # objects that a store lists in one request
REQUESTS = 3  # by which a unit that may be claimed is looked at: its report, and a claim that is tried and judged
MINE, DOUBTFUL = "mine", "doubtful"


class Claims:
    """The claims of one worker: `with Claims(...) as claims: claims.take(number)`. A thread renews those that it
    owns."""

    def __init__(self, storage: Storage, seconds: float) -> None:
        self._storage, self._seconds = storage, seconds
        self._name = secrets.token_hex(8)
        self._owned: set[int | str] = set()
        self._first_seen: dict[int | str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._renewals = 0
        self._thread = threading.Thread(target=self._renew, name="latentmill-claims", daemon=True)
        self._thread.start()

    def take(self, number: int | str) -> bool:
        """Claims a unit, or what else a name stands for. Returns False when another worker has claimed it already."""
        with self._lock:
            taken = self._storage.put_if_absent(claim_key(number), self._body())
            if taken:
                self._owned.add(number)
            return taken

    def judge(self, number: int | str) -> bool | None:
        """Whether another worker's claim is dead: True when it has expired or is gone, False when it has been renewed
        since the first look at it, None while neither is known."""
        try:
            return self.judge_by(number, self._storage.stat(claim_key(number)).etag)
        except NotFound:
            return True

    def judge_by(self, number: int | str, etag: str | None) -> bool | None:
        """The same by the etag that the claim was listed with; None where it was not."""
        if etag is None:
            return True
        first_etag, since = self._first_seen.setdefault(number, (etag, time.monotonic()))
        if etag != first_etag:
            return False
        return True if time.monotonic() - since >= self._seconds else None

    def listed(self) -> dict[int, str]:
        """The etags of all claims on units, by number. A listing may be out of date."""
        found = ((info.key.removeprefix(f"{CLAIMS}/"), info) for info in self._storage.list(f"{CLAIMS}/"))
        numbered = ((int(name), info) for name, info in found if name.isascii() and name.isdigit())
        return {number: info.etag for number, info in numbered if info.key == claim_key(number)}

    def take_over(self, number: int | str) -> None:
        """Claims a unit whose claim is dead or gone."""
        with self._lock:
            self._storage.put(claim_key(number), self._body())
            self._owned.add(number)

    def release(self, number: int | str) -> None:
        """Deletes the claim on a unit that is done."""
        with self._lock:
            self._owned.discard(number)
            self._storage.delete(claim_key(number))

    def hold(self, number: int) -> bool:
        """Claims a unit, if need be from the dead. False: a living worker has it. May wait until that is known."""
        while not self.take(number):
            dead = self.judge(number)
            if dead:
                self.take_over(number)
                return True
            if dead is False:
                return False
            time.sleep(min(POLL, self._seconds / RENEWALS))
        return True

    # Appends ---------------------------------------------------------------------------------------------------------

    def join(self, part: str, place: str) -> None:
        """Shows others that this worker works on a proposed part, until it leaves or ends. part: digest of the part.
        place: digest of where this worker finds the shards."""
        self.take(f"{APPENDING}{part}-{place}-{self._name}")

    def leave(self, part: str, place: str) -> None:
        """Takes `join` back."""
        self.release(f"{APPENDING}{part}-{place}-{self._name}")

    def others(self, part: str = "", but: str = "") -> list[str]:
        """Names of the claims of other workers on a proposed part, or on any; some may be dead. but: without those that
        find the shards at this place."""
        names = [info.key.removeprefix(f"{CLAIMS}/") for info in self._storage.list(f"{CLAIMS}/{APPENDING}{part}")]
        theirs = [name for name in names if not name.endswith(f"-{self._name}")]
        return [name for name in theirs if not but or name.split("-")[2:3] != [but]]

    def others_append(self, part: str = "", but: str = "") -> bool:
        """Whether another living worker works on a proposed part, or on any. May wait `seconds` until it is known
        whether one lives. but: as for `others`."""
        waits = False
        while True:
            verdicts = {name: self.judge(name) for name in self.others(part, but)}
            if False in verdicts.values():
                return True
            for key in (key for key, dead in verdicts.items() if dead):
                self._storage.delete(claim_key(key))
            if None not in verdicts.values():
                return False
            if not waits:
                log.info(f"encode: looking for up to {self._seconds:g} s whether others append shards at this moment")
                waits = True
            time.sleep(min(POLL, self._seconds / RENEWALS))

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Holds a claim that one worker has at a time. Waits for others, and takes it from the dead."""
        while not self.take(name):
            if self.judge(name):
                self._storage.delete(claim_key(name))
                self._first_seen.pop(name, None)
                continue
            time.sleep(min(POLL, self._seconds / RENEWALS))
        try:
            yield
        finally:
            self.release(name)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the remaining claims, so that no worker has to wait for them to expire. An error of the store is
        suppressed here, lest it hide the error that ended the block."""
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):
            for number in list(self._owned):
                self.release(number)

    def _body(self) -> bytes:
        """The content of a claim. It differs at every renewal, so that the object's etag changes."""
        self._renewals += 1
        return f"{self._name} {self._renewals}\n".encode()

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / RENEWALS):
            with self._lock:
                for number in self._owned:
                    with suppress(StorageError):  # at worst another worker encodes this unit too
                        self._storage.put(claim_key(number), self._body())


def claim_key(number: int | str) -> str:
    """Key of the claim on a unit, or on what a name stands for."""
    return f"{CLAIMS}/{number}" if isinstance(number, str) else f"{CLAIMS}/{number:06d}"


class Finished:
    """Which units are done: those whose report lies at every destination. report_names: keys of the reports by number,
    all of which begin with `prefix`."""

    def __init__(self, storages: Sequence[Storage], report_names: Mapping[int, str], prefix: str) -> None:
        self._storages, self._names, self._prefix = storages, report_names, prefix

    def is_done(self, number: int) -> bool:
        """Whether a unit is done now."""
        return all(storage.exists(self._names[number]) for storage in self._storages)

    def listed(self) -> tuple[set[int], int]:
        """Numbers of the units that are done, and the number of objects that were listed for it. A listing may be out
        of date."""
        done, objects = set(self._names), 0
        for storage in self._storages:
            keys = {info.key for info in storage.list(self._prefix)}
            objects += len(keys)
            done = {number for number in done if self._names[number] in keys}
        return done, objects


class Work:
    """Hands out the unfinished units one by one to a worker that shares them with any number of other workers.

    is_done: whether a unit is finished now; called right before the unit is handed out. list_done: as Finished.listed.
    The worker's own share (units whose number is rank modulo world) comes first, then the shares of the others. Units
    that others have done or claimed are found one by one only as long as that takes no more requests than to list all
    reports and claims; then they are listed.
    """

    def __init__(
        self,
        numbers: list[int],
        rank: int,
        world: int,
        claims: Claims,
        is_done: Callable[[int], bool],
        list_done: Callable[[], tuple[set[int], int]],
    ) -> None:
        self._unfinished = sorted(numbers, key=lambda number: ((number - rank) % world, number))
        self._doubtful: list[int] = []  # claimed by workers that may live or not
        self._claims, self._is_done, self._list_done = claims, is_done, list_done
        self._misses, self._pages = 0, 1  # units found taken since the last listing, and requests that a listing takes
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Makes `next` return at once."""
        self._stopped.set()

    def next(self) -> int | None:
        """Claims the next unit. Returns None when every remaining unit is done or claimed by a living worker. May wait
        until it is known whether a claim is alive."""
        pause = POLL
        while (self._unfinished or self._doubtful) and not self._stopped.is_set():
            if not self._unfinished:
                self._stopped.wait(pause)
                pause = min(2 * pause, LONGEST_POLL)
                if REQUESTS * len(self._doubtful) < self._pages:
                    self._unfinished, self._doubtful, self._misses = self._doubtful, [], 0
                else:
                    self._look()
            elif self._misses >= self._pages:
                self._look()
            else:
                number = self._unfinished.pop(0)
                verdict = None if self._is_done(number) else self._claim(number)
                if verdict == MINE:
                    return number
                self._misses += 1
                if verdict == DOUBTFUL:
                    self._doubtful.append(number)
        return None

    def _look(self) -> None:
        """Drops the units that are done or that a living worker has claimed, by one listing of reports and one of
        claims. What a listing that is out of date calls free, `_claim` looks at again."""
        done, objects = self._list_done()
        claimed = self._claims.listed()
        left = [number for number in (*self._unfinished, *self._doubtful) if number not in done]
        dead = {number: self._claims.judge_by(number, claimed.get(number)) for number in left}
        self._unfinished = [number for number in left if dead[number]]
        self._doubtful = [number for number in left if dead[number] is None]
        self._misses, self._pages = 0, -(-objects // PAGE) + -(-len(claimed) // PAGE) or 1

    def _claim(self, number: int) -> str | None:
        """Returns MINE, DOUBTFUL, or None when the unit is done or a living worker has claimed it."""
        if not self._claims.take(number):
            dead = self._claims.judge(number)
            if not dead:
                return DOUBTFUL if dead is None else None
            self._claims.take_over(number)
        if self._is_done(number):  # finished between the first look and the claim
            self._claims.release(number)
            return None
        return MINE
