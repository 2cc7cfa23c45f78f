"""Turns encoded batches into published units: one thread writes tars, others upload complete units."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from preprocess.encoding.encoder import Encoded
from preprocess.encoding.output import Destination, UnitFacts, UnitOutput
from preprocess.encoding.plan import Unit
from preprocess.encoding.tally import UPLOADS, Tally

QUEUED = 3  # encoded batches that may wait for the writer


class Publisher:
    """`with Publisher(...) as publisher`: `add` the batches of a unit in order, then `end` or `drop` the unit; call
    `finish` last.

    variants: records per sample. done: called with each unit once it is fully published. An error in a thread is raised
    by a later call. Leaving the block publishes the units that have ended and removes the files of the others.
    """

    def __init__(
        self, destinations: list[Destination], variants: int, tally: Tally, done: Callable[[Unit], None]
    ) -> None:
        self._destinations, self._variants, self._tally, self._done = destinations, variants, tally, done
        self._writer = ThreadPoolExecutor(1, "latentmill-write")
        self._uploader = ThreadPoolExecutor(UPLOADS, "latentmill-upload")
        self._writes: collections.deque[Future[None]] = collections.deque()
        self._uploads: collections.deque[Future[None]] = collections.deque()
        self._output = UnitOutput(destinations)

    def add(self, encoded: Encoded) -> None:
        """Queues a batch of the current unit. May wait for the writer."""
        self._writes.append(self._writer.submit(self._write, self._output, encoded))
        drain(self._writes, QUEUED)

    def end(self, facts: UnitFacts) -> None:
        """Ends the current unit, whose batches are complete. May wait for uploads of earlier units."""
        drain(self._writes)
        self._uploads.append(self._uploader.submit(self._upload, self._output, facts))
        self._output = UnitOutput(self._destinations)
        drain(self._uploads, UPLOADS)

    def drop(self) -> None:
        """Discards the current unit."""
        drain(self._writes)
        self._output.discard()
        self._output = UnitOutput(self._destinations)

    def finish(self) -> None:
        """Waits until every unit that has ended is published."""
        drain(self._uploads)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception):
            with suppress(Exception):  # the first error is the one that is raised
                drain(self._uploads)
        self._writer.shutdown(cancel_futures=True)
        self._uploader.shutdown(cancel_futures=True)
        self._output.discard()

    def _write(self, output: UnitOutput, encoded: Encoded) -> None:
        with self._tally.timed("write"):
            output.add(encoded)

    def _upload(self, output: UnitOutput, facts: UnitFacts) -> None:
        try:
            with self._tally.timed("upload"):
                output.publish(facts, self._variants)
                self._done(facts.unit)
        finally:
            output.discard()


def drain(futures: collections.deque[Future[None]], most: int = 0) -> None:
    """Waits until at most `most` futures are left. Raises what one of them raised."""
    while len(futures) > most:
        futures.popleft().result()
