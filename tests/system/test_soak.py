"""A run on a real Slurm that for half an hour is killed, frozen, told to stop, preempted, resized and robbed of its
nodes, at random by seed: its ledger, noise and weights are those of a run that nothing befell
(docs/explained/promises.md).

    .venv/bin/python -m pytest -m long tests/system/test_soak.py -s        SOAK_SECONDS=1800 SOAK_SEED=0 by default
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from made.places import TESTS
from made.slurm_run import SMALL, TRAIN, until
from pipeline import cli
from pipeline.distributed.ranks import run_command
from pipeline.ledger import examine
from pipeline.runs.directory import committed, load_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import parse_rows
from ranks.faulty_run import BATCH, losses, make_cache, state
from servers.slurm import Slurm

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
SLOW = 0.1
"""Seconds that are added to each step."""
WATCHDOG = 10.0
MOST_SECONDS = 60.0
"""Between one event and the next: a life takes about fifteen to begin, so some events come while it does."""
SETTINGS = [word for word in TRAIN if word.partition("=")[0] not in ("samples", "checkpoint.keep", "tracking.wandb")]
SETTINGS += ["checkpoint.keep=2", "tracking.wandb=off", f"watchdog_s={WATCHDOG:g}"]
FOREVER = 10**8
"""Samples: more than the time allows."""


@dataclass
class Soak:
    """A run, the job that trains it now, and what befell it."""

    slurm: Slurm
    run: str
    cache: str
    capsys: pytest.CaptureFixture[str]
    dice: random.Random
    job: str = ""
    nodes: int = 2
    events: list[str] = field(default_factory=list)

    def submit(self, samples: int = FOREVER) -> None:
        """A new job, of as many nodes as there are to be."""
        words = [f"data.train={self.cache}", f"run={self.run}", f"nodes={self.nodes}", "cluster.python=./python"]
        done = cli.main(["submit", "train", *SETTINGS, *SMALL, *words, f"samples={samples}"])
        assert done == 0, self.capsys.readouterr().err
        self.job = self.capsys.readouterr().out.split("submitted: job ")[1].split()[0]

    def state(self) -> str:
        """Slurm's word for the job's state; "" when it has ended."""
        return self.slurm.ask("squeue", "--noheader", "--format=%T", f"--jobs={self.job}").strip()

    def ranks(self) -> list[int]:
        """Processes of the job's ranks on all nodes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"slow_run.py") for word in words) and f"run={self.run}".encode() in words:
                    found.append(int(folder.name))
        return sorted(found)

    # ----------------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def kill_all(self) -> None:
        for pid in self.ranks():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if ranks := self.ranks():
            with suppress(ProcessLookupError):
                os.kill(self.dice.choice(ranks), number)

    def tell(self) -> None:
        """As ahead of a time limit."""
        self.slurm.ask("scancel", "--signal=USR1", self.job)

    def preempt(self) -> None:
        nodes = f"--nodes={self.nodes}"
        job = self.slurm.ask("sbatch", "--parsable", "--partition=urgent", nodes, "--exclusive", "--wrap", "sleep 1")
        self.slurm.wait(job, seconds=240)

    def lose_a_node(self) -> None:
        node = self.dice.choice(["n1", "n2"])
        self.slurm.crash(node)
        until(lambda: self.slurm.states()[node].startswith("down"), f"the end of {node}")
        self.slurm.boot(node)

    def resize(self) -> None:
        """The same run on another number of nodes."""
        self.slurm.ask("scancel", self.job)
        until(lambda: not self.state(), "the end of a cancelled job")
        self.nodes = 3 - self.nodes
        self.submit()


EVENTS: dict[str, tuple[int, Callable[[Soak], None]]] = {
    "a rank killed": (3, Soak.kill),
    "all ranks killed": (2, Soak.kill_all),
    "a rank frozen": (2, Soak.freeze),
    "told to stop": (3, Soak.tell),
    "preempted": (2, Soak.preempt),
    "resized": (3, Soak.resize),
    "a node lost": (1, Soak.lose_a_node),
}
"""What may befall a run, and how often relative to the rest."""


@pytest.mark.long
@pytest.mark.timeout(4 * SECONDS + 1800)
def test_a_run_that_everything_befalls_is_the_run_that_nothing_befell(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS}/ranks/slow_run.py" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLOW", str(SLOW))
    cache = make_cache(tmp_path / "cache")
    soak = Soak(slurm, str(tmp_path / "run"), cache, capsys, random.Random(SEED))
    soak.submit()

    resubmitted, ends = 0, time.monotonic() + SECONDS
    names, weights = list(EVENTS), [weight for weight, _ in EVENTS.values()]
    while time.monotonic() < ends:
        time.sleep(soak.dice.uniform(0, MOST_SECONDS))
        if not soak.state():  # it has died five times for nothing, or slurm gave it up: somebody submits it again
            soak.submit()
            resubmitted += 1
            continue
        (name,) = soak.dice.choices(names, weights)
        EVENTS[name][1](soak)
        soak.events.append(name)
        at = next(iter(committed(open_storage(soak.run))), 0)
        with capsys.disabled():
            print(f"{time.monotonic() - ends + SECONDS:6.0f} s  {name:<18} committed: {at}", flush=True)

    soak.slurm.ask("scancel", soak.job)
    until(lambda: not soak.state(), "the end of a cancelled job")
    soak.nodes = 2
    end = committed(open_storage(soak.run))[0] + 20 * BATCH
    soak.submit(samples=end)
    soak.slurm.wait(soak.job, seconds=300)
    assert slurm.ends(soak.job) == [("COMPLETED", "0")]

    # Proved by the ledger, equal to the same schedule of worlds, and of the same samples and noise as on one rank.
    lines, proof = examine(load_run(soak.run), soak.run)
    assert proof.problems == []
    schedule = schedule_of(soak.run)
    replayed = replay(tmp_path / "replayed", cache, schedule)
    alone = replay(tmp_path / "alone", cache, [(end, 1)])
    assert state(soak.run) == state(replayed)
    assert losses(soak.run) == losses(replayed)
    assert totals(lines) == totals(read_ledger(open_storage(alone)))
    mine, other = losses(soak.run), losses(alone)
    assert mine.keys() == other.keys()
    differences = [abs(mine[n] - other[n]) for n in sorted(mine)]
    assert max(differences[:50]) < 1e-5

    starts = [row for row in parse_rows(open_storage(soak.run).get("metrics.jsonl")) if row["kind"] == "start"]
    report = {
        "seconds": SECONDS,
        "seed": SEED,
        "events": dict(Counter(soak.events)),
        "submitted again": resubmitted,
        "lives that came to a commit": len({row["n"] for row in starts}),
        "changes of world": len(schedule) - 1,
        "steps": end // BATCH,
        "largest difference of a loss from one undisturbed rank's": max(differences),
    }
    with capsys.disabled():
        print(json.dumps(report, indent=1), flush=True)


def schedule_of(run: str) -> list[tuple[int, int]]:
    """(last sample, ranks) of each stretch of a run that one number of ranks trained."""
    spans = sorted({(line.first, line.last, line.world) for line in read_ledger(open_storage(run))})
    stretches = []
    for world, group in itertools.groupby(spans, key=lambda span: span[2]):
        stretches.append((list(group)[-1][1], world))
    return stretches


def replay(run: Path, cache: str, schedule: list[tuple[int, int]]) -> str:
    """The same run without Slurm and undisturbed, with these worlds."""
    for last, world in schedule:
        words = [f"data.train={cache}", f"run={run}", f"samples={last}", "device=cpu", "launch.threads=1"]
        command = [sys.executable, "-m", "pipeline.cli", "train", *SETTINGS, *words, f"launch.processes={world}"]
        assert run_command(command) == 0
    return str(run)
