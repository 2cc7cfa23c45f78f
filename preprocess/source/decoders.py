"""Decoding workers, processes or threads, which turn samples into prepared samples or reasons of rejection.

A worker process imports neither PyTorch nor the main module, so it starts in half a second. It holds one end of a pipe:
when the process that started it dies in whatever way, the pipe ends and the worker exits. Pixels come back through
shared memory.
"""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np

from pipeline.config import EncodersConfig
from pipeline.distributed.children import own_command, own_environment
from pipeline.errors import DataError, RecordRejected
from pipeline.models.encoders.tokenizer import Tokenizer, load_tokenizer
from preprocess.source.recipe import Recipe
from preprocess.source.sample import Prepared, prepare
from preprocess.source.shard import Sample

CHUNK = 16  # samples per task
STOP_SECONDS = 5.0  # that a worker has to exit in before it is killed

Prepares = tuple[list[Prepared | str], float]
"""The result of a task: for each sample in order the prepared sample or the reason of its rejection, and the seconds
that the task took."""


def prepare_all(samples: list[Sample], recipe: Recipe, tokenizer: Tokenizer) -> Prepares:
    """Runs one task in this thread."""
    started = time.perf_counter()
    results: list[Prepared | str] = []
    for sample in samples:
        try:
            results.append(prepare(sample, recipe, tokenizer.ids))
        except RecordRejected as rejection:
            results.append(rejection.reason)
    return results, time.perf_counter() - started


class Decoders:
    """`with Decoders(...) as decoders: decoders.submit(samples).result()`. `count` tasks run at a time."""

    def __init__(self, recipe: Recipe, encoders: EncodersConfig, count: int, *, processes: bool) -> None:
        self.recipe, self.encoders, self.count = recipe, encoders, count
        self._threads = ThreadPoolExecutor(count, "latentmill-decode")
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._tokenizer: Tokenizer | None = None
        if processes:
            self._workers = [_Worker(recipe, encoders) for _ in range(count)]
            for worker in self._workers:
                self._idle.put(worker)
        else:
            self._tokenizer = load_tokenizer(encoders)

    def submit(self, samples: list[Sample]) -> Future[Prepares]:
        """Queues up to CHUNK samples. The future raises DataError when the worker dies while it decodes them."""
        return self._threads.submit(self._run, samples)

    def _run(self, samples: list[Sample]) -> Prepares:
        if self._tokenizer is not None:
            return prepare_all(samples, self.recipe, self._tokenizer)
        worker = self._idle.get()
        try:
            return worker.prepare(samples)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()


class _Worker:
    """One worker process, with this side of the pipe and of the shared memory."""

    def __init__(self, recipe: Recipe, encoders: EncodersConfig) -> None:
        areas = (max(width * height for width, height in target.sizes) for target in recipe.targets)
        self._memory = SharedMemory(CHUNK * 3 * sum(areas))
        parent_end, worker_end = socket.socketpair()
        with worker_end:
            descriptors = worker_end.fileno(), self._memory.descriptor
            command = own_command("preprocess.source.decoders", *map(str, descriptors), str(self._memory.size))
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=own_environment()
            )
        self._pipe = Connection(parent_end.detach())
        self._pipe.send((recipe, encoders))

    def prepare(self, samples: list[Sample]) -> Prepares:
        try:
            self._pipe.send(samples)
            answer: Prepares | str = self._pipe.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise DataError(
                f"a decoding worker {cause} while it decoded samples {samples[0].key} to {samples[-1].key}. If memory "
                "ran out, give fewer workers= or lower limits.pixels; if not, an image of these breaks its decoder: "
                "leave it out of the source"
            ) from None
        if isinstance(answer, str):
            raise RuntimeError(f"in a decoding worker: {answer}")
        for prepared in answer[0]:
            if isinstance(prepared, Prepared):
                for picture in prepared.pictures:
                    picture.pixels = self._memory.take(picture.pixels)
        return answer

    def stop(self) -> None:
        self._pipe.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._memory.close()


class SharedMemory:
    """Anonymous memory of `size` bytes, which a process that inherits the descriptor can map as well."""

    def __init__(self, size: int, descriptor: int = -1) -> None:
        self.size, self.descriptor = size, descriptor
        if descriptor < 0:
            self.descriptor = os.memfd_create("latentmill-decode")
            os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)
        self._used = 0

    def clear(self) -> None:
        """Lets later `put`s overwrite earlier ones."""
        self._used = 0

    def put(self, pixels: np.ndarray) -> np.ndarray:
        """Stores an array (H, W, 3) uint8. Returns its place, int64 (offset, H, W), for `take` in the other process."""
        end = self._used + pixels.size
        np.frombuffer(self._map, np.uint8)[self._used : end] = pixels.reshape(-1)
        place = np.array([self._used, *pixels.shape[:2]])
        self._used = end
        return place

    def take(self, place: np.ndarray) -> np.ndarray:
        """A copy of the array that `put` stored at this place."""
        offset, height, width = place.tolist()
        flat = np.frombuffer(self._map, np.uint8, height * width * 3, offset)
        return flat.reshape(height, width, 3).copy()

    def close(self) -> None:
        self._map.close()
        os.close(self.descriptor)


def serve(arguments: list[str]) -> None:
    """The main loop of a worker: receives lists of samples and sends Prepares, until the other end of the pipe is
    closed.

    arguments: the descriptors of the pipe and of the shared memory, and the size of the memory.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to every process of a job; the owner ends its workers
    pipe_descriptor, memory_descriptor, size = map(int, arguments)
    pipe, memory = Connection(pipe_descriptor), SharedMemory(size, memory_descriptor)
    recipe, encoders = pipe.recv()
    tokenizer = load_tokenizer(encoders)
    while True:
        try:
            samples = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            results, seconds = prepare_all(samples, recipe, tokenizer)
            memory.clear()
            for prepared in results:
                if isinstance(prepared, Prepared):
                    for picture in prepared.pictures:
                        picture.pixels = memory.put(picture.pixels)
            pipe.send((results, seconds))
        except Exception:
            pipe.send(traceback.format_exc())


if __name__ == "__main__":
    serve(sys.argv[1:])
