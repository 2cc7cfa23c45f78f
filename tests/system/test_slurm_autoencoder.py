"""`latentmill submit autoencoder` on a real Slurm of two nodes: a run that is preempted once its discriminator trains
comes back to the end that an undisturbed run reaches, and its ledger is proved."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from made.autoencoder_run import BATCH, make_pixels
from made.places import TESTS
from made.refusal import refusal
from made.slurm_run import SMALL, until
from pipeline import cli
from pipeline.runs.directory import committed
from pipeline.status import status
from pipeline.storage.urls import open_storage
from ranks.faulty_run import state
from servers.slurm import Slurm

END, PAUSE = 12 * BATCH, 7 * BATCH
RUN = [
    "autoencoder.channels=8",
    "autoencoder.multipliers=[1,2]",
    "autoencoder.norm_groups=4",
    "gan.weight=0.5",
    "gan.channels=8",
    "gan.layers=1",
    f"gan.after={5 * BATCH}",
    f"gan.warmup={2 * BATCH}",
    f"optim.batch={BATCH}",
    "optim.warmup=0",
    f"checkpoint.every={5 * BATCH}",
    "checkpoint.keep=20",
    f"tracking.every={BATCH}",
    "tracking.wandb=off",
    f"samples={END}",
]


@pytest.mark.long
def test_a_preempted_autoencoder_comes_back_to_the_end_of_an_undisturbed_one(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank on each node; between two commits, while the autoencoder feels its discriminator."""
    make_pixels(str(tmp_path / "pixels"), [8] * 8)
    words = [*RUN, f"data.train={tmp_path}/pixels"]
    alone = [*words, f"run={tmp_path}/alone", "device=cpu", "launch.processes=2", "launch.threads=1"]
    with subprocess.Popen([sys.executable, "-m", "pipeline.cli", "autoencoder", *alone]) as undisturbed:
        assert undisturbed.wait() == 0

    where, run = tmp_path / "paused", str(tmp_path / "run")
    where.mkdir()
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS}/ranks/paused_run.py" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PAUSES", json.dumps({0: (PAUSE, "wait")}))
    monkeypatch.setenv("PAUSED", str(where))
    monkeypatch.chdir(tmp_path)
    submitted = ["autoencoder", *words, *SMALL, f"run={run}", "nodes=2", "cluster.python=./python"]
    assert cli.main(["submit", *submitted]) == 0, capsys.readouterr().err
    found = re.search(r"^submitted: job (\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert found is not None
    job, log = found[1], tmp_path / "slurm-logs" / f"latentmill-autoencoder-{found[1]}.log"
    until(lambda: len(list(where.glob("0-*"))) == 2, "the pause")
    assert f"{run} is being trained by Slurm job {job} (restart 0)" in refusal(capsys, 1, *submitted)
    slurm.wait(slurm.ask("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true"))
    assert status(run).state == f"stopped, to be continued (Slurm job {job}: PENDING)"

    slurm.wait(job)
    assert slurm.ends(job) == [("COMPLETED", "0")], log.read_text(errors="replace")
    assert f"stopped by SIGTERM with {PAUSE} of {END} samples committed" in log.read_text()
    assert committed(open_storage(run)) == [END, 10 * BATCH, PAUSE, 5 * BATCH]
    assert state(run) == state(str(tmp_path / "alone"))
    assert (status(run).state, status(run).restarts) == ("finished", 1)
    assert cli.main(["ledger", run]) == 0


@pytest.mark.long
def test_torchrun_trains_what_the_verb_trains_by_itself(tmp_path: Path) -> None:
    make_pixels(str(tmp_path / "pixels"), [8] * 8)
    words = [*RUN, f"data.train={tmp_path}/pixels", "device=cpu", "launch.threads=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipeline.autoencoder"]
    verb = [sys.executable, "-m", "pipeline.cli", "autoencoder", "launch.processes=2"]
    for command, run in ((torchrun, "one"), (verb, "other")):
        done = subprocess.run([*command, *words, f"run={tmp_path}/{run}"], check=False, cwd=tmp_path)
        assert done.returncode == 0
    assert state(str(tmp_path / "one")) == state(str(tmp_path / "other"))
