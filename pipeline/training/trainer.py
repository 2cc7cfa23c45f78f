"""The training loop, from top to bottom. One step trains on one global batch, and n counts the samples seen.

What a step does depends on (seed, n) and on the weights alone: which records, what the objective draws for them, such
as posterior samples, noises, timesteps and dropped captions, which learning rate and EMA decay. Decisions are taken by
all ranks together, at step boundaries: a rank that cannot read its data, a gradient that is not finite, or a signal
stops all of them alike.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import NoReturn

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.signals import StopRequest
from pipeline.distributed.world import World, shared
from pipeline.errors import Interrupted, LatentmillError
from pipeline.runs.directory import last_sample
from pipeline.tracking.progress import Progress
from pipeline.training.commits import Commits
from pipeline.training.engines.base import engine_name
from pipeline.training.evaluations import Evaluations
from pipeline.training.objectives.base import Objective, Prepared
from pipeline.training.recorder import Recorder
from pipeline.training.schedule import learning_rate
from pipeline.training.state import TrainingState
from pipeline.training.watch.named import largest_losses, not_finite, not_finite_samples, spike
from pipeline.training.watch.profile import StepProfile
from pipeline.training.watch.progress import ProgressWatch


class Trainer:
    """Trains one run to its last sample, from wherever it is. assembly.py puts one together."""

    def __init__(
        self,
        config: RunConfig,
        *,
        world: World,
        state: TrainingState,
        stream_from: Callable[[int], Stream],
        objective: Objective,
        recorder: Recorder,
        commits: Commits,
        evaluations: Evaluations,
        watch: ProgressWatch,
        profile: StepProfile,
    ) -> None:
        self.config, self.world, self.state, self.engine = config, world, state, state.engine
        self.stream_from, self.objective, self.recorder = stream_from, objective, recorder
        self.commits, self.evaluations = commits, evaluations
        self.watch, self.profile = watch, profile
        self.batch, self.end = config.optim.batch, last_sample(config)
        self.stop = StopRequest()

    @property
    def n(self) -> int:
        """Samples seen."""
        return self.state.n

    def run(self) -> None:
        """Train until the run's last sample. Raises Interrupted, after a commit, when a signal asked to stop."""
        with self.stop.listening(), self.commits.saver, self.watch.watching():
            self.resume()
            self._evaluate()
            for _ in self.steps():
                pass
            self.commits.settle()

    def resume(self) -> None:
        """Take up the newest good commit, if there is one. Collective."""
        self.commits.resume()
        self.recorder.start(self.n, engine_name(self.config.deepspeed))

    def steps(self) -> Iterator[int]:
        """Train from n to the last sample. Gives n after each step and what was due after it. Collective."""
        with ExitStack() as stack:
            stream = self.world.together(lambda: stack.enter_context(self.stream_from(self.n)))
            rank0 = self.world.rank == 0
            progress = stack.enter_context(Progress(self.end, "train", start=self.n, enabled=rank0))
            while self.n < self.end:
                self.watch.beat(self.n)
                with self.profile.around(self.n // self.batch + 1):
                    self._step(self._next_batch(stream))
                progress.update(self.batch, **self.recorder.meter.notes)
                self.commits.save_if_due()
                self.evaluations.validate_if_due()
                self._evaluate()
                yield self.n
        self.watch.stop()

    def _next_batch(self, stream: Stream) -> Batch:
        """This rank's next batch, when every rank has one, none was asked to stop, and no commit has failed."""
        batch, failure = None, None
        self.commits.note_finished()
        try:
            batch = next(stream)
        except LatentmillError as error:
            failure = error
        flags = [self.stop.number is not None, failure is not None, self.commits.failed]
        stops, failures, lost_commits = self.world.counted(flags)
        if failures:
            self.world.raise_together(failure)
        if lost_commits:
            self.commits.settle()
        if stops:
            self._stop()
        assert batch is not None
        assert batch.n == self.n, "the stream is at another sample than the loop"
        return batch

    def _step(self, batch: Batch) -> None:
        """One optimizer step on one global batch."""
        began = time.perf_counter()
        prepared = self.objective.prepare(batch)
        loss_B, figures = self._forward_and_backward(prepared)
        norms = self.engine.grad_norms()
        if not all(map(math.isfinite, norms.values())):
            self._refuse(prepared, loss_B, norms)
        lr = learning_rate(self.n, self.end, self.config.optim)
        norm = self.engine.main(norms)
        if jump := self._jump(loss_B, norm):
            self._skip(jump, batch, loss_B)
        else:
            self.engine.step(lr, norms)
        self.state.n += self.batch
        self.state.ema.update(self.n, self.batch)
        if not jump:
            figures |= self.objective.after_step(self.n)
        flops = self.objective.flops(prepared) * self.batch
        seconds = time.perf_counter() - began + batch.wait_s
        self.recorder.step(prepared, loss_B, figures, flops, norms, seconds)
        self.recorder.row_if_due(self.state, lr, norms)

    def _forward_and_backward(self, prepared: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the gradient of the rank's mean loss over micro-batches. Returns each sample's loss (b,), and the
        means over micro-batches of what the objective shows beside it."""
        losses, count = list[Tensor](), self.engine.micro_batches
        size, figures = len(prepared) // count, dict[str, Tensor]()
        for first in range(0, len(prepared), size):
            loss = self.objective.losses(prepared, slice(first, first + size))
            self.engine.backward(loss.total)
            losses.append(loss.loss_B)
            for name, value in loss.figures.items():
                figures[name] = figures.get(name, 0.0) + value.detach() / count
        return torch.cat([loss.detach() for loss in losses]), figures

    def _refuse(self, prepared: Prepared, loss_B: Tensor, norms: Mapping[str, float]) -> NoReturn:
        """All ranks stop before the optimizer; the error names the samples."""
        what, part = prepared.what, next(part for part, norm in norms.items() if not math.isfinite(norm))
        samples = not_finite_samples(self.world, prepared.batch, prepared.images, loss_B, what)
        newest = self.commits.newest_in_words()
        raise shared(not_finite(self.n, self.n + self.batch - 1, samples, newest, what, part))

    def _jump(self, loss_B: Tensor, norm: float) -> str:
        """What has jumped, in words; "" where the optimizer may step. The same on all ranks. Collective."""
        if not self.state.guard.on:
            return ""
        mean = self.world.sum([float(loss_B.double().sum())])[0] / self.batch
        return self.state.guard.jump(mean, norm)

    def _skip(self, jump: str, batch: Batch, loss_B: Tensor) -> None:
        """Drop a step that has jumped and say so, or stop: as the configuration has it, on all ranks alike."""
        guard = self.state.guard
        samples = f"samples {self.n} to {self.n + self.batch - 1}"
        what = f"{samples}: {jump}; largest losses: {largest_losses(self.world, batch, loss_B)}"
        if guard.config.action == "skip" and guard.row <= guard.config.most:
            self.engine.skip()
            self.recorder.tracker.alert("skipped", self.n + self.batch, f"{what}. The optimizer did not step")
            return
        raise shared(spike(what, guard.row, self.commits.newest_in_words()))

    def _evaluate(self) -> None:
        """What is due at this n; a signal that comes meanwhile stops training."""
        try:
            self.evaluations.evaluate_if_due(lambda: self.stop.number is not None)
        except Interrupted:
            self._stop()

    def _stop(self) -> NoReturn:
        """Commit and leave: some rank was asked to."""
        numbers = [number for number in self.world.gather(self.stop.number) if number is not None]
        if self.commits.newest != self.n and self.n > 0:
            self.commits.save()
        self.commits.settle()
        raise shared(
            Interrupted(
                f"stopped by {signal.Signals(numbers[0]).name} with {self.n} of {self.end} samples committed; "
                "the same command goes on from there"
            )
        )
