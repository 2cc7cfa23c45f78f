"""The state of a run at n samples: what a commit holds and a resume takes up."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.runs.checkpoint import Commit, Reader
from pipeline.runs.fragments import Fragment
from pipeline.training.ema import Ema
from pipeline.training.engines.base import Engine
from pipeline.training.objectives.base import Objective
from pipeline.training.watch.guard import Guard


class TrainingState:
    """n: samples seen. engine: weights and the optimizer's moments. objective: what it remembers of earlier steps. ema:
    averages of the weights. guard: what the guard against jumps of the loss has seen."""

    def __init__(self, config: RunConfig, engine: Engine, objective: Objective) -> None:
        self.batch = config.optim.batch
        self.n = 0
        self.engine, self.objective = engine, objective
        self.ema = Ema(config.ema, [fragment.view for fragment in engine.averaged()])
        self.guard = Guard(config.guard)

    @property
    def steps(self) -> int:
        """Optimizer steps taken: those of n samples, but for the ones that the guard has skipped."""
        return self.n // self.batch - self.guard.skipped

    def averages(self) -> dict[str, list[Fragment]]:
        """This rank's share of every average, by kind."""
        weights = self.engine.averaged()
        return {
            kind: [Fragment(f.name, f.offset, average) for f, average in zip(weights, averages, strict=True)]
            for kind, averages in self.ema.averages.items()
        }

    def fragments(self) -> dict[str, list[Fragment]]:
        """This rank's share of everything that is stored as tensors, by kind. The views are those that training
        changes in place."""
        return {"weights": self.engine.weights(), **self.engine.moments(), **self.averages()}

    def load(self, read: Reader, commit: Commit) -> None:
        """Take up a commit. Collective."""
        self.engine.load(read, commit.steps)
        self.guard.load(commit.guard or {"skipped": commit.n // self.batch - commit.steps})
        self.objective.load(commit.objective)
        for kind, fragments in self.averages().items():
            for fragment in fragments:
                fragment.view.copy_(read(kind, fragment.name, fragment.offset, fragment.offset + len(fragment.view)))
        self.n = commit.n
