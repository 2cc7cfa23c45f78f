"""A decoding worker: a process that turns samples into prepared samples or rejections, and draws holes of records.

It imports neither PyTorch nor the main module, so it starts in half a second. It holds one end of a pipe: when the
process that started it dies in whatever way, the pipe ends and the worker exits. Pixels come back through shared
memory, which also says which sample it is at, should it die.

A sample that takes longer than limits.seconds of processor time ends the process, since a decoder in C can be stopped
in no other way. One that asks for more memory than the limits can explain gets none, which is an exception.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pipeline.config import LimitsConfig
from pipeline.errors import RecordRejected
from pipeline.models.encoders.tokenizer import Tokenizer, load_tokenizer
from preprocess.source.conditions import Drawing, Holes, draw_holes
from preprocess.source.image import MOST_CROPS
from preprocess.source.recipe import Recipe
from preprocess.source.rejected import SLOW, Rejected, rejected
from preprocess.source.sample import Prepared, prepare
from preprocess.source.shard import Sample

CHUNK = 16  # samples per task
CHUNK_BYTES = 64 * 1024 * 1024  # of members, after which a task takes no further sample
TIMED_OUT = signal.SIGPROF  # what ends a worker whose sample takes too long
STARTING, WAITING = -2, -1  # instead of a sample's number
MARK_BYTES = 64  # of shared memory before the pixels
PIXEL_BYTES = 40  # memory that a pixel takes while it is decoded, laid over white and resized
MOST_ADDRESSES = 1 << 60  # that a limit can be set to
OTHER_BYTES = 1 << 30  # memory for everything but pixels and members

Prepares = tuple[list[Prepared | Rejected], float]
"""The result of a task: for each sample in order the prepared sample or its rejection, and the seconds that the task
took."""
Drawn = tuple[list[np.ndarray], float]
"""The result of a task of drawing: the packed holes of each record in order, and the seconds that the task took."""


def prepare_all(
    samples: list[Sample],
    recipe: Recipe,
    tokenizer: Tokenizer | None,
    begin: Callable[[int], None] = lambda number: None,
) -> Prepares:
    """Runs one task in this thread. Whatever a sample raises is its rejection. tokenizer: None where no captions are
    taken. begin: called with the number of each sample before it."""
    tokenize = None if tokenizer is None else tokenizer.ids
    started = time.perf_counter()
    results: list[Prepared | Rejected] = []
    for number, sample in enumerate(samples):
        begin(number)
        began = time.thread_time()
        try:
            prepared = prepare(sample, recipe, tokenize)
            if time.thread_time() - began > recipe.limits.seconds:
                raise too_slow(recipe.limits)
            results.append(prepared)
        except Exception as error:
            results.append(rejected(sample.key, error))
    return results, time.perf_counter() - started


def draw_all(wanted: Sequence[Holes], recipe: Recipe) -> Drawn:
    """Runs one task of drawing in this thread."""
    started, facts = time.perf_counter(), recipe.conditions.mask
    assert facts is not None, "holes are drawn for caches with masks"
    drawn = [draw_holes(one, facts) for one in wanted]
    return drawn, time.perf_counter() - started


def too_slow(limits: LimitsConfig) -> RecordRejected:
    """The rejection of a sample that took too long."""
    return RecordRejected(SLOW, f"a processor worked on it for more than limits.seconds={limits.seconds:g}")


class SharedMemory:
    """Anonymous memory for `size` bytes of pixels and a number, which a process that inherits the descriptor can map as
    well."""

    def __init__(self, size: int, descriptor: int = -1) -> None:
        self.size, self.descriptor = size, descriptor
        if descriptor < 0:
            self.descriptor = os.memfd_create("latentmill-decode")
            os.ftruncate(self.descriptor, MARK_BYTES + size)
        self._map = mmap.mmap(self.descriptor, MARK_BYTES + size)
        self._used = MARK_BYTES

    @property
    def at(self) -> int:
        """Number of the sample that the worker is at; STARTING or WAITING while it is at none."""
        return int.from_bytes(self._map[:8], "little", signed=True)

    @at.setter
    def at(self, number: int) -> None:
        self._map[:8] = number.to_bytes(8, "little", signed=True)

    def clear(self) -> None:
        """Lets later `put`s overwrite earlier ones."""
        self._used = MARK_BYTES

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
        """Unmaps it here."""
        self._map.close()
        os.close(self.descriptor)


def serve(arguments: list[str]) -> None:
    """The main loop of a worker: receives lists of samples and sends Prepares, or a Drawing and sends Drawn, until the
    other end of the pipe is closed.

    arguments: the descriptors of the pipe and of the shared memory, and the size of the memory.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to every process of a job; the owner ends its workers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a decoder that crashes leaves no file behind
    pipe_descriptor, memory_descriptor, size = map(int, arguments)
    pipe, memory = Connection(pipe_descriptor), SharedMemory(size, memory_descriptor)
    recipe, encoders = pipe.recv()
    tokenizer = load_tokenizer(encoders) if recipe.caption_key else None
    bound_memory(recipe)

    def begin(number: int) -> None:
        memory.at = number
        signal.setitimer(signal.ITIMER_PROF, recipe.limits.seconds)

    while True:
        memory.at = WAITING
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if isinstance(task, Drawing):
                pipe.send(draw_all(task.wanted, recipe))
                continue
            results, seconds = prepare_all(task, recipe, tokenizer, begin)
            signal.setitimer(signal.ITIMER_PROF, 0)
            memory.at = WAITING
            memory.clear()
            for prepared in results:
                if isinstance(prepared, Prepared):
                    for picture in prepared.pictures:
                        picture.pixels = memory.put(picture.pixels)
                    if prepared.whole is not None:
                        prepared.whole = memory.put(prepared.whole)
            pipe.send((results, seconds))
        except Exception:
            pipe.send(traceback.format_exc())


def bound_memory(recipe: Recipe) -> None:
    """Gives this process as much address space as whole samples within the limits can take."""
    crops = max(width * height for target in recipe.targets for width, height in target.sizes)
    pixels = max(recipe.limits.pixels, MOST_CROPS * crops)
    most = own_bytes() + OTHER_BYTES + PIXEL_BYTES * pixels + 8 * CHUNK_BYTES + 8 * recipe.limits.member_bytes
    most = min(most, MOST_ADDRESSES)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def own_bytes() -> int:
    """Address space of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


if __name__ == "__main__":
    serve(sys.argv[1:])
