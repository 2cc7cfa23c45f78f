"""What Slurm's commands are asked for. Stand-ins for them answer here; the real ones do in tests/system."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.scheduler import slurm

SCONTROL = """
case "$5" in
    8) echo JobId=8 JobState=PENDING;;
    9) echo slurm_load_jobs error: Invalid job id specified >&2; exit 1;;
    *) echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1;;
esac
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Call it with the name of a command and lines of a shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def install(name: str, lines: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)

    return install


def test_a_job_that_is_not_listed_is_asked_for_by_its_number(stand_in: Callable[[str, str], None]) -> None:
    """A job that Slurm does not show is none that it has forgotten."""
    stand_in("squeue", "echo 7 RUNNING")
    stand_in("scontrol", SCONTROL)
    assert slurm.states(["7", "8", "9", "10"]) == {"7": "RUNNING", "8": "PENDING", "9": ""}
    stand_in("squeue", "exit 1")
    assert slurm.states(["7", "8"]) == {}


def test_no_variable_of_the_user_hides_jobs_or_names_them(
    stand_in: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SQUEUE_PARTITION", "SQUEUE_STATES", "SINFO_PARTITION", "SBATCH_JOB_NAME", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "x")
    stand_in("squeue", 'echo "$2"; env | grep -E "^(SQUEUE|SINFO|SBATCH)_" | cut -d= -f1')
    assert slurm.in_queue(["a"]) == ["--all", "SBATCH_ACCOUNT"]
