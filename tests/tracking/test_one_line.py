"""On a terminal the progress of several ranks is one line, whoever logs meanwhile."""

from __future__ import annotations

import os
import re
import sys

import pytest

from made.places import REPOSITORY
from made.terminal import Screen, in_terminal

TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "-m")
BAR = re.compile(r"train: +\d+%\|.*\| .*/40\.0 \[.*\]")


def shown(*words: str) -> tuple[int, bytes, list[str]]:
    """The exit status of `python -m` WORDS on a terminal, what it wrote there, and what then stands on it."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "TERM": "xterm"}
    status, said = in_terminal([sys.executable, "-m", *words], 100, environment=environment)
    screen = Screen(100).feed(said)
    assert screen.unknown == []
    return status, said, screen.lines()


@pytest.mark.parametrize(
    "launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.long)], ids=["launch.processes", "torchrun"]
)
def test_the_bar_of_several_ranks_stays_one_line_below_what_they_log(launcher: tuple[str, ...]) -> None:
    status, said, lines = shown(*launcher, "ranks.progress_ranks", "launch")
    assert status == 0, lines
    assert said.count(b"\rtrain: ") >= 2
    lines = [line for line in lines if "OMP_NUM_THREADS" not in line and not set(line) <= {"*"}]
    *logged, bar = lines
    assert BAR.fullmatch(bar)
    assert "100%" in bar
    assert sorted(line[20:] for line in logged if line[0] == "2") == [
        f"[rank {rank}] warning: half of the steps of rank {rank}" for rank in (0, 1)
    ]
    assert [line for line in logged if line[0] != "2"] == ["a result"]


def test_how_a_job_ends_is_told_on_a_line_of_its_own() -> None:
    """Also where the rank that had the bar was killed."""
    status, _, lines = shown("ranks.progress_ranks", "killed")
    assert status == 1
    assert lines[-1] == "latentmill train: the job has ended with 137"
    assert not any(BAR.match(line) and not BAR.fullmatch(line) for line in lines)
