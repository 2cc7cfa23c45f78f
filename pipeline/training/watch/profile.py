"""Records what some steps spend their time on, with PyTorch's profiler. What fails here is said, and training goes on:
a trace is not worth a run."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.distributed.world import World
from pipeline.log import log
from pipeline.runs.names import profile_key
from pipeline.storage.base import Storage
from pipeline.storage.staging import staging_folder, writing
from pipeline.training.watch.progress import ProgressWatch

KINDS = (ProfilerActivity.CPU, ProfilerActivity.CUDA)


class StepProfile:
    """Profiles steps of rank 0, whose trace then goes into the run directory.

    steps: numbers of the first and the last, counted from 1; None for none. A run that goes on between them, or ends
    there, profiles those that it takes. end: number of the run's last step. watch: while it is paused, as it is in
    evaluations and commits, nothing is recorded.
    """

    def __init__(
        self, steps: tuple[int, int] | None, *, end: int, run: Storage, world: World, watch: ProgressWatch
    ) -> None:
        self.first, self.last = (steps[0], min(steps[1], end)) if steps else (1, 0)
        self.run, self.world, self.watch = run, world, watch
        self._begun = 0  # number of the first step that was profiled
        self._profiler: Any = None
        watch.aside = self._aside

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Inside, step number `step` is taken. Collective."""
        if not self.first <= step <= self.last:
            yield
            return
        if not self._begun:
            self._begun = step
            if self.world.rank == 0:
                self._attempt(self._start)
        try:
            with record_function(f"step {step}"):
                yield
        except BaseException:
            if self._profiler is not None:
                self._profiler.stop()
            raise
        if step == self.last:
            with self.watch.paused():
                self.world.together(lambda: self._attempt(self._store), rank=0)

    def _start(self) -> None:
        profiler = profile(activities=KINDS[: 2 if self.world.device.type == "cuda" else 1])
        profiler.start()
        self._profiler = profiler

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside, nothing is recorded: an evaluation has too many operations to keep."""
        self._attempt(lambda: self._record(False))
        try:
            yield
        finally:
            self._attempt(lambda: self._record(True))

    def _record(self, on: bool) -> None:
        """Go on recording, or pause it, where it has begun."""
        if self._profiler is None:
            return
        if not on and self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # what is queued belongs to the step
        self._profiler.toggle_collection_dynamic(on, KINDS)

    def _store(self) -> None:
        """End the recording and store the trace."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        key = profile_key(self._begun, self.last)
        with staging_folder(self.run) as folder, writing(folder / "trace.json"):
            plain, packed = folder / "trace.json", folder / "trace.json.gz"
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as target:
                shutil.copyfileobj(source, target)
            self.run.put_file(key, packed)
        log.info(f"train: the profile of steps {self._begun} to {self.last} is {self.run.locate(key)}")

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do what training can do without."""
        try:
            action()
        except Exception as error:  # of the profiler, which has classes of its own, or of the store
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            log.warning(
                f"train: steps {self._begun} to {self.last} are not profiled: {reason}. Training goes on; name later "
                "steps in tracking.profile to try again"
            )
