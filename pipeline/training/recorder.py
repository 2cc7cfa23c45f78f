"""What a run records of its steps: the ledger, rows of metrics, and alerts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.reading.device import to_device
from pipeline.distributed.world import World
from pipeline.planning.flops import peak_tflops
from pipeline.runs.directory import last_sample
from pipeline.runs.ledger import Ledger, noise_digest, truncate_ledgers
from pipeline.runs.names import checkpoint_folder
from pipeline.storage.base import Storage
from pipeline.tracking.tracker import Tracker
from pipeline.training.objectives.base import Prepared
from pipeline.training.saver import Save
from pipeline.training.schedule import due
from pipeline.training.state import TrainingState
from pipeline.training.watch.alerts import Spikes
from pipeline.training.watch.meter import Meter

LOG_STEPS = 20
"""Optimizer steps between rows of metrics, unless tracking.every says otherwise."""


class Recorder:
    """Records the steps of one rank; rank 0 alone writes rows of metrics.

    folder: local folder for files that grow, where the run directory is not local. columns: digest of the columns that
    are read with the records; "" without any.
    """

    def __init__(
        self, config: RunConfig, *, world: World, run: Storage, folder: Path, tracker: Tracker, columns: str = ""
    ) -> None:
        self.config, self.world, self.run, self.tracker = config, world, run, tracker
        self.batch, self.end = config.optim.batch, last_sample(config)
        self.ledger = Ledger(run, folder, world.rank, world.size, columns)
        self.meter = Meter(world, peak_tflops(world.device, config.tracking.peak_tflops))
        self.spikes = Spikes(config.tracking.spike)

    def start(self, n: int, engine: str) -> None:
        """Begin or go on at n samples: what lies beyond the commit at n is dropped. engine: its name. Collective."""
        self.world.together(lambda: truncate_ledgers(self.run, n), rank=0)
        self.ledger.start(n)
        self.tracker.start(n, world=self.world.size, engine=engine)

    def step(
        self,
        prepared: Prepared,
        loss_B: Tensor,
        figures: Mapping[str, Any],
        flops: float,
        norms: Mapping[str, float],
        seconds: float,
    ) -> None:
        """One step of this rank. loss_B: (b,) each sample's loss. figures: what the objective shows beside it. flops:
        of the global batch. norms: of the gradient of each part. seconds: the step's time, its wait for data
        included."""
        batch = prepared.batch
        digest = noise_digest(to_device(batch.numbers, self.world.device), prepared.digest)
        self.ledger.add(batch.numbers, batch.shards, batch.rows, digest)
        self.meter.add(
            loss_B,
            self.batch,
            seconds,
            batch.wait_s,
            bucket_B=prepared.bucket_B,
            flops=flops,
            norms=norms,
            figures=figures,
        )

    def row_if_due(self, state: TrainingState, lr: float, norms: Mapping[str, float]) -> None:
        """A row of metrics at state.n, when one is due, and alerts of what jumps in it. Collective."""
        every = self.config.tracking.every or LOG_STEPS * self.batch
        if not (due(state.n, every, self.batch) or state.n == self.end):
            return
        row = self.meter.flush() | {"lr": lr, **named_norms(norms), "weight_norm": state.engine.weight_norm()}
        row |= state.objective.row(state.n)
        row |= {"steps_skipped": state.guard.skipped} if state.guard.on else {}
        self.tracker.log(state.n, row)
        if sentence := state.objective.warning(state.n):
            self.tracker.alert("codebook", state.n, sentence)
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


def named_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """The names of norms in a row of metrics: grad_norm of the first part, grad_norm_PART of others."""
    return {f"grad_norm_{part}" if number else "grad_norm": norm for number, (part, norm) in enumerate(norms.items())}
