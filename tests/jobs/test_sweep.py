"""Sweeps of many keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pipeline.jobs import folders, sweep
folders.LONGEST = 60
sweep.run_command = lambda _, words: print(words.decode()) or 0
sys.exit(sweep.sweep("train", sys.argv[1:]))
"""


def test_a_job_of_many_swept_keys_gets_a_folder_that_file_systems_take_and_another_than_its_neighbour(
    tmp_path: Path,
) -> None:
    """In a process of its own: Hydra can be started once in each."""
    words = [f"run={tmp_path}/s", "data.train=c", "optim.lr=1e-3,2e-3", "optim.warmup=choice(16)"]
    words += ["ema.half_life=choice(200)", "checkpoint.every=choice(64)", "checkpoint.keep=choice(5)"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True)
    jobs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    runs = {word.removeprefix(f"run={tmp_path}/s/") for job in jobs for word in job if word.startswith("run=")}
    assert len(jobs) == len(runs) == 2
    assert all(run.startswith("optim.lr=0.00") and len(run) <= 60 for run in runs)
    assert "checkpoint.keep=5" in done.stdout  # the whole name is said
