"""A job on the time line of a trace: steps, commits, what a fault takes back, and how long it takes to go on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.scale.trace import DAY, Event
from benchmarks.scale.world import World
from pipeline.training.schedule import due


@dataclass(frozen=True)
class Phases:
    """Seconds of what is not training. start: of a life, until its first step. copy: that training waits for each
    commit. write: from then until the commit is there. tidy: from then until the next may begin."""

    start: float
    copy: float
    write: float
    tidy: float


@dataclass
class Outcome:
    """samples: seen at the end. seconds: on the clock, by what they went into: steps (as they are where nothing
    disturbs), waiting (for the slowest of the nodes), slow (nodes), lost (steps that were taken back), start, copy,
    commits (training waited for the one before) and stopping. late: preemptions at whose end the commit was not there.
    lives: of the job."""

    samples: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    commits: int = 0
    lives: int = 1
    failures: int = 0
    preemptions: int = 0
    late: int = 0

    @property
    def clock(self) -> float:
        return float(sum(self.seconds.values()))

    @property
    def goodput(self) -> float:
        """Share of the clock that the steps would have taken on nodes that nothing disturbs."""
        return self.seconds["steps"] / self.clock if self.clock else 0.0


class Job:
    """n: samples seen. committed: the newest commit that is there. writing: one that was begun, and when it is there.
    free: when the next may begin."""

    def __init__(self, world: World, phases: Phases, waits: float) -> None:
        self.world, self.phases, self.waits = world, phases, waits
        self.outcome = Outcome()
        self.clock, self.free, self.n, self.committed = 0.0, 0.0, 0, 0
        self.writing: tuple[int, float] | None = None
        self.slow_until: list[float] = []

    def spend(self, what: str, seconds: float) -> None:
        """Seconds that go by."""
        self.outcome.seconds[what] += seconds
        self.clock += seconds

    def train(self, until: float) -> None:
        """Steps and commits up to a moment."""
        world, step_s = self.world, self.world.step_s
        while self.clock < until:
            self.slow_until = [moment for moment in self.slow_until if moment > self.clock]
            limit = min([until, *self.slow_until])
            factor = world.slow_factor if self.slow_until else 1.0
            due_n = (self.n // world.every + 1) * world.every
            assert due(due_n, world.every, world.batch), "commits are due where the trainer says so"
            steps = min((due_n - self.n) // world.batch, int((limit - self.clock) / (step_s * self.waits * factor)))
            if not steps:  # less than a step is left
                self.spend("stopping", limit - self.clock)
                continue
            self.n += steps * world.batch
            self.spend("steps", steps * step_s)
            self.spend("waiting", steps * step_s * (self.waits - 1))
            self.spend("slow", steps * step_s * self.waits * (factor - 1))
            if self.n == due_n:
                self.commit()

    def commit(self) -> None:
        """Begins a commit, once the one before is ended."""
        self.spend("commits", max(0.0, self.free - self.clock))
        self.settle()
        self.spend("copy", self.phases.copy)
        self.writing = self.n, self.clock + self.phases.write
        self.free = self.clock + self.phases.write + self.phases.tidy
        self.outcome.commits += 1

    def settle(self) -> None:
        """Whether a commit that was begun is there by now."""
        if self.writing is not None and self.writing[1] <= self.clock:
            self.committed, self.writing = self.writing[0], None

    def fail(self) -> None:
        """A node is gone, and the job with it."""
        self.outcome.failures += 1
        self.settle()
        self.again()

    def preempt(self) -> None:
        """Slurm asks the job to end: it commits, if that takes no longer than the grace."""
        self.outcome.preemptions += 1
        needed = max(0.0, self.free - self.clock) + self.phases.copy + self.phases.write
        in_time = needed <= self.world.grace_s
        self.spend("stopping", min(needed, self.world.grace_s))
        self.settle()
        if in_time:
            self.committed = self.n
        self.outcome.late += not in_time
        self.again()

    def again(self) -> None:
        """Another life, from the newest commit."""
        lost = (self.n - self.committed) // self.world.batch * self.world.step_s
        self.outcome.seconds["steps"] -= lost
        self.outcome.seconds["lost"] += lost
        self.n, self.writing, self.free = self.committed, None, 0.0
        self.outcome.lives += 1
        self.spend("start", self.world.requeue_s + self.phases.start)


def run(world: World, events: Sequence[Event], phases: Phases, waits: float) -> Outcome:
    """The job from its start for world.days. waits: how many times as long a step takes for the slowest node."""
    job, end = Job(world, phases, waits), world.days * DAY
    job.spend("start", phases.start)
    for event in events:
        if event.at >= end:
            break
        job.train(event.at)
        if event.kind == "slow":
            job.slow_until.append(event.at + event.seconds)
        elif event.kind == "failure":
            job.fail()
        else:
            job.preempt()
    job.train(end)
    job.outcome.samples = job.n
    return job.outcome
