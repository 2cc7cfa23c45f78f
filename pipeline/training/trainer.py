"""The training loop, from top to bottom. One step trains on one global batch, and n counts the samples seen.

What a step does depends on (seed, n) and on the weights alone: which records, which posterior samples, noises,
timesteps and dropped captions, which learning rate and EMA decay. Decisions are taken by all ranks together, at step
boundaries: a rank that cannot read its data, a gradient that is not finite, or a signal stops all of them alike.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.diffusion.objective import Objective, Randomness, training_randomness
from pipeline.diffusion.posterior import sample_posterior
from pipeline.diffusion.timesteps import noise_bucket
from pipeline.distributed.signals import StopRequest
from pipeline.distributed.world import World, shared
from pipeline.errors import Interrupted, LatentmillError, RunError
from pipeline.planning.flops import Flops, peak_tflops
from pipeline.runs import checkpoint
from pipeline.runs.directory import checkpoint_folder, evaluated, last_sample
from pipeline.runs.fragments import Fragment
from pipeline.runs.ledger import Ledger, noise_digest, truncate_ledgers
from pipeline.runs.profiles import OWN, kind_of
from pipeline.runs.retention import Retention
from pipeline.storage.base import Storage
from pipeline.tracking.progress import Progress
from pipeline.tracking.tracker import Tracker
from pipeline.training.ema import Ema
from pipeline.training.engines.base import Engine
from pipeline.training.saver import Save, Saver, Stamp
from pipeline.training.schedule import due, learning_rate
from pipeline.training.validation import ValidationLoss
from pipeline.training.watch.alerts import Spikes, Stalls
from pipeline.training.watch.guard import Guard
from pipeline.training.watch.meter import Meter
from pipeline.training.watch.named import largest_losses, not_finite, not_finite_samples, spike
from pipeline.training.watch.watchdog import Watchdog

LOG_STEPS = 20  # optimizer steps between rows of metrics, unless the configuration says otherwise

Evaluate = Callable[[dict[str, Tensor], int, Callable[[], bool]], Mapping[str, Any] | None]
"""(full EMA weights by parameter name, n, whether this rank was asked to stop) -> metrics to log; called on every rank.
Raises Interrupted, on all of them, when it has left because one was."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is stamped with, to be refused when another run would read it."""

    config: str
    """Digest of the configuration."""
    manifests: dict[str, str]
    """Digest of each dataset's manifest, by role."""
    mixture: tuple[int, ...] = ()
    """Weights of the datasets, in integers; () of one."""


@dataclass(frozen=True)
class Latents:
    """What the cache's contract says of a latent."""

    scale: float
    shift: float


class Trainer:
    """Trains one run to its last sample, from wherever it is.

    stream_from: the rank's batches from sample number n on. text_of: text states of ids, where the cache holds only
    those. evaluate, validation: None for none. flops: of the network, None where they are not counted. fence: raises
    when this process may no longer commit. folder: local folder for files that grow, when the run directory is not
    local.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World,
        engine: Engine,
        latents: Latents,
        run: Storage,
        folder: Path,
        tracker: Tracker,
        identity: Identity,
        stream_from: Callable[[int], Stream],
        text_of: Callable[[Tensor], Tensor] | None = None,
        evaluate: Evaluate | None = None,
        validation: ValidationLoss | None = None,
        fence: Callable[[], None] | None = None,
        flops: Flops | None = None,
    ) -> None:
        self.config, self.world, self.engine, self.latents = config, world, engine, latents
        self.run_storage, self.tracker, self.identity = run, tracker, identity
        self.stream_from, self.text_of, self.evaluate, self.fence = stream_from, text_of, evaluate, fence
        self.validation = validation
        self.objective = Objective(config.diffusion, world.device)
        self.ledger = Ledger(run, folder, world.rank, world.size)
        self.batch = config.optim.batch
        self.end = last_sample(config)
        self.ema = Ema(config.ema, [fragment.view for fragment in engine.owned()])
        self.watchdog = Watchdog(config.watchdog_s)
        self.signals = StopRequest()
        self.flops = flops
        self.meter = Meter(world, peak_tflops(world.device, config.tracking.peak_tflops))
        self.guard = Guard(config.guard)
        self.spikes = Spikes(config.tracking.spike)
        self.stalls = Stalls(config.tracking.stall_s if world.rank == 0 else 0.0, partial(tracker.alert, "stall"))
        self.saver = Saver(
            run,
            world,
            Stamp(self._engine_name(), identity.config, identity.manifests, engine.shapes, identity.mixture),
            retention=Retention.of(config.checkpoint),
            background=config.checkpoint.background,
            fence=fence,
            before=[self.ledger.upload, tracker.commit],
        )
        self.n = 0
        self.saved = -1
        """n of the newest save that was begun, or taken up."""

    def run(self) -> None:
        """Train until the run's last sample. Raises Interrupted, after a commit, when a signal asked to stop."""
        with self.signals.listening(), self.saver, self.watchdog:
            self.resume()
            self._evaluate_if_due()
            for _ in self.steps():
                pass
            self._settle()

    @property
    def stopped_by(self) -> int | None:
        """The signal that asked to stop, if one has."""
        return self.signals.number

    def resume(self) -> None:
        """Take up the newest good checkpoint, if there is one. Collective."""
        commit = checkpoint.newest_good(self.run_storage, self.world)
        if commit is not None:
            before, now = ({**one, "val": ""} for one in (commit.manifests, self.identity.manifests))
            if before != now or commit.mixture != list(self.identity.mixture):
                what = "another dataset" if before != now else "another mixture"
                raise shared(RunError(f"{self.run_storage.url} was trained on {what}; choose another run="))
            read = checkpoint.Reader(self.run_storage, commit)
            self.engine.load(read, commit.steps)
            self.guard.load(commit.guard or {"skipped": commit.n // self.batch - commit.steps})
            for kind, fragments in self._averages().items():
                for fragment in fragments:
                    stop = fragment.offset + len(fragment.view)
                    fragment.view.copy_(read(kind, fragment.name, fragment.offset, stop))
            self.n = self.saved = self.saver.committed = commit.n
        failure = None
        try:
            if self.world.rank == 0:
                truncate_ledgers(self.run_storage, self.n)
        except LatentmillError as error:
            failure = error
        self.world.raise_together(failure)
        self.ledger.start(self.n)
        self.tracker.start(self.n, world=self.world.size, engine=self._engine_name())

    def steps(self) -> Iterator[int]:
        """Train from n to the last sample. Gives n after each step and what was due after it. Collective."""
        with ExitStack() as stack:
            opened: list[Stream] = []
            self._together(lambda: opened.append(stack.enter_context(self.stream_from(self.n))))
            rank0 = self.world.rank == 0
            progress = stack.enter_context(Progress(self.end, "train", start=self.n, enabled=rank0))
            stack.enter_context(self.stalls)
            while self.n < self.end:
                self.watchdog.beat(self.n)
                self.stalls.beat(self.n)
                batch = self._next_batch(*opened)
                self._step(batch)
                progress.update(self.batch, **self.meter.notes)
                if due(self.n, self.config.checkpoint.every, self.batch) or self.n == self.end:
                    self.save()
                self._validate_if_due()
                self._evaluate_if_due()
                yield self.n
        self.watchdog.stop()

    def _next_batch(self, stream: Stream) -> Batch:
        """This rank's next batch, when every rank has one, none was asked to stop, and no save has failed."""
        batch, failure = None, None
        self._note(self.saver.finished())
        try:
            batch = next(stream)
        except LatentmillError as error:
            failure = error
        flags = [self.stopped_by is not None, failure is not None, self.saver.failed]
        stops, failures, lost = self.world.sum([float(flag) for flag in flags])
        if failures:
            self.world.raise_together(failure)
        if lost:
            self._settle()
        if stops:
            self._stop()
        assert batch is not None
        assert batch.n == self.n, "the stream is at another sample than the loop"
        return batch

    def _step(self, batch: Batch) -> None:
        """One optimizer step on one global batch."""
        began = time.perf_counter()
        device, config = self.world.device, self.config
        numbers = batch.numbers.to(device)
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.tensors.items()}
        if self.text_of is not None:
            tensors["text"] = self.text_of(tensors.pop("tokens"))
        moments = tensors.pop("moments")
        shape = (moments.shape[1] // 2, *moments.shape[2:])  # differs from batch to batch where there are buckets
        draws = training_randomness(config.seed, numbers, shape, config.diffusion, config.task.drop)
        latents = sample_posterior(moments, draws.posterior, self.latents.scale, self.latents.shift)

        losses = []
        for rows in self._micro_batches(len(numbers)):
            inputs = {name: tensor[rows] for name, tensor in tensors.items()}
            losses.append(self._losses(latents[rows], draws, rows, inputs))
            self.engine.backward(losses[-1].mean())
        loss_B = torch.cat([loss.detach() for loss in losses])

        norm = self.engine.grad_norm()
        if not math.isfinite(norm):
            self._refuse(batch, latents, loss_B)
        lr = learning_rate(self.n, self.end, config.optim)
        if self.guard.on and (jump := self.guard.jump(self._mean(loss_B), norm)):
            self._skip(jump, batch, loss_B)
        else:
            self.engine.step(lr, norm)
        self.n += self.batch
        self.ema.update(self.n, self.batch)
        noise = noise_digest(numbers, [draws.posterior, draws.noise, draws.timestep, draws.drop])
        self.ledger.add(batch.numbers, batch.shards, batch.rows, noise)
        text = tensors.get("text")
        flops = self.flops(shape, text.shape[1] if text is not None else 0) * self.batch if self.flops else 0
        bucket_B = noise_bucket(draws.timestep, config.diffusion)
        seconds = time.perf_counter() - began + batch.wait_s
        self.meter.add(loss_B, self.batch, seconds, batch.wait_s, bucket_B=bucket_B, flops=flops, norm=norm)
        if due(self.n, config.tracking.every or LOG_STEPS * self.batch, self.batch) or self.n == self.end:
            row = self.meter.flush() | {"lr": lr, "grad_norm": norm, "weight_norm": self.engine.weight_norm()}
            row |= {"steps_skipped": self.guard.skipped} if self.guard.on else {}
            self.tracker.log(self.n, row)
            for sentence in self.spikes.found(row):
                self.tracker.alert("spike", self.n, sentence)

    def _losses(self, latents: Tensor, draws: Randomness, rows: slice, inputs: dict[str, Tensor]) -> Tensor:
        """Each sample's loss (b,) for some rows of the batch."""
        return self.objective.loss(
            lambda x, t: self.engine(x, t, inputs, draws.drop[rows]), latents, draws.noise[rows], draws.timestep[rows]
        )

    def _micro_batches(self, rows: int) -> Iterator[slice]:
        size = rows // self.engine.micro_batches
        return (slice(start, start + size) for start in range(0, rows, size))

    def _mean(self, loss_B: Tensor) -> float:
        """Over the global batch, the same on all ranks. Collective."""
        return self.world.sum([float(loss_B.double().sum())])[0] / self.batch

    def _skip(self, jump: str, batch: Batch, loss_B: Tensor) -> None:
        """Drop a step that has jumped and say so, or stop: as the configuration has it, on all ranks alike."""
        samples = f"samples {self.n} to {self.n + self.batch - 1}"
        what = f"{samples}: {jump}; largest losses: {largest_losses(self.world, batch, loss_B)}"
        if self.guard.config.action == "skip" and self.guard.row <= self.guard.config.most:
            self.engine.skip()
            self.tracker.alert("skipped", self.n + self.batch, f"{what}. The optimizer did not step")
            return
        raise shared(spike(what, self.guard.row, self._last_commit()))

    def _last_commit(self) -> str:
        self._note(self.saver.finished())
        committed = self.saver.committed
        return f"last commit at {committed} samples" if committed >= 0 else "nothing committed yet"

    def _refuse(self, batch: Batch, latents: Tensor, loss_B: Tensor) -> NoReturn:
        """All ranks stop before the optimizer; the error names the samples."""
        found = not_finite_samples(self.world, batch, latents, loss_B)
        raise shared(not_finite(self.n, self.n + self.batch - 1, found, self._last_commit()))

    # ----------------------------------------------------------------------------------------------------------------
    # Commits, evaluations, signals

    def save(self) -> None:
        """Begin to commit the state at n, with the ledger and the metrics up to it. Collective."""
        self.stalls.pause()
        with self.watchdog.paused():
            self._together(self._before_commit)
            state = {"weights": self.engine.owned(), **self.engine.moments(), **self._averages()}
            steps = self.n // self.batch - self.guard.skipped
            self._note(self.saver.begin(self.n, steps, state, self.guard.state(), self._snapshots_due()))
            self.saved = self.n

    def _before_commit(self) -> None:
        """What must not be missing where there is a commit; of it a resume drops what lies beyond its commit."""
        if self.fence is not None:
            self.fence()
        self.ledger.commit(self.n)

    def _settle(self) -> None:
        """Wait until what was begun is committed. Collective."""
        self.stalls.pause()
        with self.watchdog.paused():
            self._note(self.saver.settle())
        self.watchdog.stop()

    def _note(self, saves: Sequence[Save]) -> None:
        """Say which commits have ended."""
        for save in saves:
            url = f"{self.run_storage.url.rstrip('/')}/{checkpoint_folder(save.n)}"
            self.tracker.checkpoint(
                save.n, url, stall_s=save.wait_s + save.copy_s, write_s=save.write_s, bytes=save.bytes
            )

    def _validate_if_due(self) -> None:
        """The loss of held-out records, of the weights themselves."""
        every = self.config.eval.loss_every or self.config.checkpoint.every
        if self.validation is None or not (due(self.n, every, self.batch) or self.n == self.end):
            return
        self.stalls.pause()

        def losses(latents: Tensor, draws: Randomness, inputs: dict[str, Tensor]) -> Tensor:
            if self.text_of is not None:
                inputs["text"] = self.text_of(inputs.pop("tokens"))
            return self._losses(latents, draws, slice(None), inputs)

        with self.watchdog.paused():
            found = self.validation(losses, self.latents.scale, self.latents.shift)
        self.tracker.log(self.n, found, kind="val")

    def _evaluate_if_due(self) -> None:
        """Evaluate the EMA weights before, during and after training; never twice at one n, also over restarts."""
        if self.evaluate is None:
            return
        if not (self.n in (0, self.end) or due(self.n, self.config.eval.every, self.batch)):
            return
        if self.world.first(evaluated(self.run_storage, self.n)):
            return
        if self.n > 0 and self.saved != self.n and self.config.eval.where == "train":
            self.save()  # an evaluation is long, and may be killed
        self.stalls.pause()
        weights = self.engine.gather(self._averages()[OWN])
        try:
            with self.watchdog.paused():
                metrics = self.evaluate(weights, self.n, lambda: self.stopped_by is not None)
        except Interrupted:
            self._stop()
        if metrics:
            self.tracker.log(self.n, metrics, kind="eval")

    def _averages(self) -> dict[str, list[Fragment]]:
        """This rank's share of every average, by kind."""
        owned = self.engine.owned()
        return {
            kind: [Fragment(f.name, f.offset, average) for f, average in zip(owned, averages, strict=True)]
            for kind, averages in self.ema.averages.items()
        }

    def _snapshots_due(self) -> list[str]:
        """Kinds of which a snapshot is kept with the commit at n: the first at or after a multiple of ema.snapshots."""
        every, before = self.config.ema.snapshots, max(self.saved, 0)
        if not every or self.n // every == before // every:
            return []
        return [kind_of(width) for width in self.config.ema.widths]

    def _engine_name(self) -> str:
        settings = self.config.deepspeed
        return f"zero{settings.stage}" if settings.engine == "deepspeed" else settings.engine

    def _together(self, action: Callable[[], None]) -> None:
        """Every rank acts, or every rank raises."""
        failure = None
        try:
            action()
        except LatentmillError as error:
            failure = error
        self.world.raise_together(failure)

    def _stop(self) -> NoReturn:
        """Commit and leave: some rank was asked to."""
        numbers = [number for number in self.world.gather(self.stopped_by) if number is not None]
        if self.saved != self.n and self.n > 0:
            self.save()
        self._settle()
        raise shared(
            Interrupted(
                f"stopped by {signal.Signals(numbers[0]).name} with {self.n} of {self.end} samples committed; "
                "the same command goes on from there"
            )
        )
