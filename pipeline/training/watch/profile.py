"""Records what some steps spend their time on, with PyTorch's profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.distributed.world import World
from pipeline.log import log
from pipeline.runs.names import profile_key
from pipeline.storage.base import Storage
from pipeline.training.watch.progress import ProgressWatch


class StepProfile:
    """Profiles steps of rank 0, whose trace then goes into the run directory.

    steps: numbers of the first and the last, counted from 1; None for none. A run that goes on between them, or ends
    there, profiles those that it takes. end: number of the run's last step.
    """

    def __init__(
        self, steps: tuple[int, int] | None, *, end: int, run: Storage, world: World, watch: ProgressWatch
    ) -> None:
        self.first, self.last = (steps[0], min(steps[1], end)) if steps else (1, 0)
        self.run, self.world, self.watch = run, world, watch
        self._begun = 0  # number of the first step that was profiled
        self._profiler: Any = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Inside, step number `step` is taken. Collective."""
        if not self.first <= step <= self.last:
            yield
            return
        self._begun = self._begun or step
        if self.world.rank == 0 and self._profiler is None:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if self.world.device.type == "cuda" else []
            self._profiler = profile(activities=kinds)
            self._profiler.start()
        try:
            with record_function(f"step {step}"):
                yield
        except BaseException:
            self._stop()
            raise
        if step == self.last:
            with self.watch.paused():
                self.world.together(self._store, rank=0)

    def _stop(self) -> None:
        """End the recording, if there is one."""
        if self._profiler is not None:
            self._profiler.stop()

    def _store(self) -> None:
        """Store the trace. Raises StorageError."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self._stop()
        key = profile_key(self._begun, self.last)
        with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
            path = Path(folder) / "trace.json.gz"
            self._profiler.export_chrome_trace(str(path))
            self.run.put_file(key, path)
        self._profiler = None
        log.info(f"train: the profile of steps {self._begun} to {self.last} is {self.run.locate(key)}")
