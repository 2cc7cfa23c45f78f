"""Decoding workers, processes or threads, which turn samples into prepared samples or rejections, and draw holes.

A worker process that dies is replaced. The sample that it was at is tried again; one that ends its process twice, or
that takes longer than limits.seconds, is rejected. Only a lack of memory, of which a machine and not the sample is the
cause, ends the stage.
"""

from __future__ import annotations

import collections
import queue
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from pipeline.config import EncodersConfig
from pipeline.distributed.children import own_command, own_environment
from pipeline.errors import DataError, Interrupted
from pipeline.log import log
from pipeline.models.encoders.tokenizer import load_tokenizer
from preprocess.source.conditions import Drawing, Holes
from preprocess.source.recipe import Recipe
from preprocess.source.rejected import CRASHED, Rejected, bounded, rejected
from preprocess.source.sample import Prepared
from preprocess.source.shard import Sample
from preprocess.source.worker import (
    CHUNK,
    STARTING,
    TIMED_OUT,
    WAITING,
    Drawn,
    Prepares,
    SharedMemory,
    draw_all,
    prepare_all,
    too_slow,
)

WORKER = "preprocess.source.worker"  # the module that a worker process runs
STOP_SECONDS = 5.0  # that a worker has to exit in before it is killed
DEATHS = 2  # of processes at one sample, or while no sample is decoded, after which there is no further try
KILLS = 3  # the same by SIGKILL, which the kernel sends to whoever is large when memory runs out
PAUSE_SECONDS = 1.0  # between two tries after SIGKILL


class Decoders:
    """`with Decoders(...) as decoders: decoders.submit(samples).result()`. `count` tasks run at a time."""

    def __init__(self, recipe: Recipe, encoders: EncodersConfig, count: int, *, processes: bool) -> None:
        self.recipe, self.encoders, self.count = recipe, encoders, count
        self._threads = ThreadPoolExecutor(count, "latentmill-decode")
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._tokenizer = load_tokenizer(encoders) if recipe.caption_key and not processes else None
        self._aborted = threading.Event()
        if processes:
            self._workers = [_Worker(recipe, encoders, self._aborted) for _ in range(count)]
            for worker in self._workers:
                self._idle.put(worker)

    def submit(self, samples: list[Sample], shard: str = "") -> Future[Prepares]:
        """Queues up to CHUNK samples. shard: which holds them, for messages. The future raises DataError when workers
        do not start, or run out of memory at a sample, and Interrupted after `abort`."""
        return self._threads.submit(self._run, samples, shard)

    def draw(self, wanted: list[Holes]) -> Future[Drawn]:
        """Queues the holes of up to CHUNK records. The future raises as that of `submit`, but for single samples."""
        return self._threads.submit(self._draw, wanted)

    def _run(self, samples: list[Sample], shard: str) -> Prepares:
        if not self._workers:
            return prepare_all(samples, self.recipe, self._tokenizer, lambda _: refuse_aborted(self._aborted))
        worker = self._idle.get()
        try:
            return worker.prepare(samples, shard)
        finally:
            self._idle.put(worker)

    def _draw(self, wanted: list[Holes]) -> Drawn:
        refuse_aborted(self._aborted)
        if not self._workers:
            return draw_all(wanted, self.recipe)
        worker = self._idle.get()
        try:
            return worker.draw(wanted)
        finally:
            self._idle.put(worker)

    def abort(self) -> None:
        """Makes tasks that run end at once, or with their sample where they run in threads: they raise Interrupted."""
        self._aborted.set()
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()


def refuse_aborted(aborted: threading.Event) -> None:
    """Raises Interrupted once it is set."""
    if aborted.is_set():
        raise Interrupted("stopped while samples were decoded")


class _Worker:
    """One worker process, with this side of the pipe and of the shared memory, and its successors."""

    def __init__(self, recipe: Recipe, encoders: EncodersConfig, aborted: threading.Event) -> None:
        self._aborted, self._lock = aborted, threading.Lock()
        areas = (max(width * height for width, height in target.sizes) for target in recipe.targets)
        self._recipe, self._encoders = recipe, encoders
        self._memory = SharedMemory(CHUNK * 3 * (sum(areas) + recipe.whole[0] * recipe.whole[1]))
        self._start()

    def _start(self) -> None:
        self._memory.at = STARTING
        parent_end, worker_end = socket.socketpair()
        with worker_end:
            descriptors = worker_end.fileno(), self._memory.descriptor
            command = own_command(WORKER, *map(str, descriptors), str(self._memory.size))
            with self._lock:
                refuse_aborted(self._aborted)
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=own_environment()
                )
        self._pipe = Connection(parent_end.detach())
        with suppress(OSError):  # a process that has died already is told apart by the first task
            self._pipe.send((self._recipe, self._encoders))

    def draw(self, wanted: list[Holes]) -> Drawn:
        """As `prepare`, of a task of drawing, in which no sample can be to blame."""
        deaths = 0
        while True:
            try:
                drawn: Drawn = self._ask(Drawing(wanted))
                return drawn
            except (EOFError, OSError):
                refuse_aborted(self._aborted)
                deaths += 1
                self._death(WAITING, deaths, [], "")
                self._pipe.close()
                self._start()

    def prepare(self, samples: list[Sample], shard: str) -> Prepares:
        """Runs one task, with as many processes as it takes. Raises DataError and Interrupted."""
        rejections: dict[int, Rejected] = {}
        remaining = list(range(len(samples)))
        deaths = collections.Counter[int]()
        while True:
            try:
                answer: Prepares = self._ask([samples[number] for number in remaining])
                results, seconds = answer
                break
            except (EOFError, OSError):
                refuse_aborted(self._aborted)
                place = self._memory.at
                number = remaining[place] if 0 <= place < len(remaining) else place
                deaths[number] += 1
                rejection = self._death(number, deaths[number], samples, shard)
                if rejection is not None:
                    rejections[number] = rejection
                    remaining.remove(number)
                self._pipe.close()
                self._start()
        for prepared in results:
            if isinstance(prepared, Prepared):
                for picture in prepared.pictures:
                    picture.pixels = self._memory.take(picture.pixels)
                if prepared.whole is not None:
                    prepared.whole = self._memory.take(prepared.whole)
        answered = dict(zip(remaining, results, strict=True)) | rejections
        return [answered[number] for number in range(len(samples))], seconds

    def _ask(self, task: list[Sample] | Drawing) -> Any:
        """Sends a task and waits for its result. Raises EOFError or OSError when the process dies."""
        self._pipe.send(task)
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"in a decoding worker: {answer}")
        return answer

    def _death(self, number: int, deaths: int, samples: list[Sample], shard: str) -> Rejected | None:
        """What the end of the process means, which has died `deaths` times at sample `number`, negative for none: the
        sample's rejection, or None when the task is tried again. Raises DataError when there is no point in that."""
        status = self._process.wait()
        by = signal.Signals(-status).name if status < 0 else ""
        cause = f"was killed by {by}" if by else f"ended with status {status}"
        if number < 0:
            if deaths >= KILLS:
                raise DataError(f"decoding workers do not stay alive: one {cause} before it decoded anything")
            log.warning(f"encode: a decoding worker {cause}; another one takes its place")
            return None
        sample = samples[number]
        where = f"sample {bounded(sample.key)} of {shard or 'the source'}"
        if status == -TIMED_OUT:
            return rejected(sample.key, too_slow(self._recipe.limits))
        if status == -signal.SIGKILL:
            if deaths >= KILLS:
                raise DataError(
                    f"decoding workers were killed by SIGKILL {deaths} times while they decoded {where}, as when "
                    "memory runs out: give fewer workers=, or a lower limits.pixels, which rejects larger images"
                )
            time.sleep(PAUSE_SECONDS)
        elif deaths >= DEATHS:
            return Rejected(bounded(sample.key), CRASHED, f"the process that decoded it {cause}, {deaths} times")
        log.warning(f"encode: a decoding worker {cause} while it decoded {where}; it is tried again")
        return None

    def kill(self) -> None:
        """Ends its process, of which no other takes the place once `aborted` is set."""
        with self._lock:
            self._process.kill()

    def stop(self) -> None:
        """Ends its process, and gives its memory back."""
        self._pipe.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._memory.close()
