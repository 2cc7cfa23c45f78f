"""What a run records of its steps: the ledger, rows of metrics, and alerts."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.reading.batch import Batch
from pipeline.diffusion.objective import Randomness
from pipeline.diffusion.timesteps import noise_bucket
from pipeline.distributed.world import World
from pipeline.planning.flops import Flops, peak_tflops
from pipeline.runs.directory import last_sample
from pipeline.runs.ledger import Ledger, noise_digest, truncate_ledgers
from pipeline.runs.names import checkpoint_folder
from pipeline.storage.base import Storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.saver import Save
from pipeline.training.schedule import due
from pipeline.training.state import TrainingState
from pipeline.training.watch.alerts import Spikes
from pipeline.training.watch.meter import Meter

LOG_STEPS = 20
"""Optimizer steps between rows of metrics, unless tracking.every says otherwise."""


class Recorder:
    """Records the steps of one rank; rank 0 alone writes rows of metrics.

    folder: local folder for files that grow, where the run directory is not local. flops: FLOPs of a training step per
    image, None where they are not counted.
    """

    def __init__(
        self, config: TrainConfig, *, world: World, run: Storage, folder: Path, tracker: Tracker, flops: Flops | None
    ) -> None:
        self.config, self.world, self.run, self.tracker, self.flops = config, world, run, tracker, flops
        self.batch, self.end = config.optim.batch, last_sample(config)
        self.ledger = Ledger(run, folder, world.rank, world.size)
        self.meter = Meter(world, peak_tflops(world.device, config.tracking.peak_tflops))
        self.spikes = Spikes(config.tracking.spike)

    def start(self, n: int, engine: str) -> None:
        """Begin or go on at n samples: what lies beyond the commit at n is dropped. engine: its name. Collective."""
        self.world.together(lambda: truncate_ledgers(self.run, n), rank=0)
        self.ledger.start(n)
        self.tracker.start(n, world=self.world.size, engine=engine)

    def step(self, batch: Batch, draws: Randomness, loss_B: Tensor, norm: float, seconds: float) -> None:
        """One step of this rank. draws: on the rank's device. loss_B: (b,) each sample's loss. norm: of the gradient.
        seconds: the step's time, its wait for data included."""
        digest = noise_digest(
            batch.numbers.to(self.world.device), [draws.posterior, draws.noise, draws.timestep, draws.drop]
        )
        self.ledger.add(batch.numbers, batch.shards, batch.rows, digest)
        self.meter.add(
            loss_B,
            self.batch,
            seconds,
            batch.wait_s,
            bucket_B=noise_bucket(draws.timestep, self.config.diffusion),
            flops=self._flops(draws, batch),
            norm=norm,
        )

    def _flops(self, draws: Randomness, batch: Batch) -> float:
        """FLOPs of the global batch; 0 where they are not counted."""
        if self.flops is None:
            return 0.0
        text = batch.tensors.get("text", batch.tensors.get("tokens"))
        return self.flops(tuple(draws.noise.shape[1:]), text.shape[1] if text is not None else 0) * self.batch

    def row_if_due(self, state: TrainingState, lr: float, norm: float) -> None:
        """A row of metrics at state.n, when one is due, and alerts of what jumps in it. Collective."""
        every = self.config.tracking.every or LOG_STEPS * self.batch
        if not (due(state.n, every, self.batch) or state.n == self.end):
            return
        row = self.meter.flush() | {"lr": lr, "grad_norm": norm, "weight_norm": state.engine.weight_norm()}
        row |= {"steps_skipped": state.guard.skipped} if state.guard.on else {}
        self.tracker.log(state.n, row)
        for sentence in self.spikes.sentences(row):
            self.tracker.alert("spike", state.n, sentence)

    def commit(self, n: int) -> None:
        """Write the ledger up to n, which a commit at n needs: a resume drops what lies beyond its commit."""
        self.ledger.commit(n)

    def upload(self) -> None:
        """Bring what has been recorded into the run directory, before commit.json. Called from the saver's thread."""
        self.ledger.upload()
        self.tracker.commit()

    def saved(self, save: Save) -> None:
        """Note a checkpoint that is committed."""
        url = f"{self.run.url.rstrip('/')}/{checkpoint_folder(save.n)}"
        stall_s = save.wait_s + save.copy_s
        self.tracker.checkpoint(save.n, url, stall_s=stall_s, write_s=save.write_s, bytes=save.bytes)
