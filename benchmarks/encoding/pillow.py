"""Pillow's own rate: decoding, resizing and cropping JPEGs that are in memory, with nothing around it."""

from __future__ import annotations

import io
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

from PIL import Image


@dataclass(frozen=True)
class Rate:
    """images, in wall and CPU seconds of all processes concerned, on so many cores."""

    images: int
    seconds: float
    cpu_seconds: float
    cores: int

    @property
    def per_second(self) -> float:
        return self.images / self.seconds

    @property
    def per_core(self) -> float:
        """Images a second and core, by the clock."""
        return self.per_second / self.cores

    @property
    def per_core_second(self) -> float:
        """Images per second of CPU time that was used: others' work on the machine hardly changes it."""
        return self.images / self.cpu_seconds


def decode(jpegs: list[bytes], side: int) -> None:
    """Open, load, convert, resize (Lanczos) until the crop is covered, crop the middle."""
    for data in jpegs:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = image.convert("RGB")
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image.crop((left, top, left + side, top + side))


def one_core(jpegs: list[bytes], side: int) -> Rate:
    """Decode in this process and thread."""
    started, cpu = time.perf_counter(), time.thread_time()
    decode(jpegs, side)
    return Rate(len(jpegs), time.perf_counter() - started, time.thread_time() - cpu, 1)


def all_cores(jpegs: list[bytes], side: int, cores: int) -> Rate:
    """Decode in a process for each core at the same time, so that no core is idle. Each process decodes all images."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores)
    results: multiprocessing.Queue[tuple[float, float]] = context.Queue()
    arguments = (jpegs, side, barrier, results)
    processes = [context.Process(target=_decode_together, args=arguments) for _ in range(cores)]
    for process in processes:
        process.start()
    times = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return Rate(cores * len(jpegs), max(wall for wall, _ in times), sum(cpu for _, cpu in times), cores)


def _decode_together(
    jpegs: list[bytes], side: int, barrier: Barrier, results: multiprocessing.Queue[tuple[float, float]]
) -> None:
    decode(jpegs[:2], side)
    barrier.wait()
    rate = one_core(jpegs, side)
    results.put((rate.seconds, rate.cpu_seconds))
