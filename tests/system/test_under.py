"""The real torchrun, accelerate and deepspeed under pipeline.distributed.under: how ranks end comes through, and a run
that is stopped and begun again ends as an undisturbed one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from made.slurm_run import END, TRAIN, until
from pipeline.runs.directory import committed
from pipeline.storage.urls import open_storage
from ranks.faulty_run import make_cache, rows, state
from servers.warm_ranks import WarmRanks

UNDER = [sys.executable, "-m", "pipeline.distributed.under"]
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [
    *("accelerate-launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]
"""`accelerate launch`, which imports torchvision as well. With --multi_gpu it starts the ranks as torchrun does, also
where there is no GPU; with --cpu it starts one alone."""
DEEPSPEED = ["deepspeed", "--num_gpus=2", "--master_port=PORT", "--module"]


def launched(words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words = [word.replace("PORT", str(free.getsockname()[1])) for word in words]
    return subprocess.Popen([*UNDER, *words], stderr=subprocess.PIPE, text=True, env=os.environ | environment)


@pytest.mark.parametrize(
    "launcher",
    [
        [*TORCHRUN, "-m"],
        pytest.param([*ACCELERATE, "-m"], marks=pytest.mark.long),  # it starts torchrun's agent
        pytest.param(DEEPSPEED, marks=pytest.mark.long),
    ],
    ids=lambda words: words[0],
)
def test_a_signal_that_launchers_do_not_know_ends_ranks_after_their_commit_and_with_75(
    launcher: list[str], tmp_path: Path
) -> None:
    with launched([*launcher, "ranks.ending_rank", "wait"], BEGUN=str(tmp_path), COMMITTING="1") as process:
        until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), "the ranks")
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.count("stopped by SIG") == 2  # the later one may be asked by its launcher as well
    assert "stopped by SIGUSR1" in said


@pytest.mark.long
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=lambda words: words[0])
def test_a_run_that_is_stopped_and_begun_again_ends_as_an_undisturbed_one(
    launcher: list[str], tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    words = [*TRAIN, f"data.train={make_cache(tmp_path / 'cache')}", "device=cpu", "launch.threads=1"]
    words[words.index("tracking.wandb=offline")] = "tracking.wandb=off"
    command = [*launcher, "-m", "ranks.slow_run", "-P", "-m", "pipeline.cli", "train", *words, f"run={tmp_path}/run"]
    with launched(command, SLOW="0.3") as process:
        until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and rows(f"{tmp_path}/run"), "the first step")
        process.terminate()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    stopped_at = committed(open_storage(f"{tmp_path}/run"))[0]
    assert 0 < stopped_at < END
    assert said.count(f"stopped by SIGTERM with {stopped_at} of {END} samples committed") == 1

    with launched(command, SLOW="0") as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert warm_ranks.run("pipeline.cli", ["train", *words, f"run={tmp_path}/other"], 2).returncode == 0
    assert state(f"{tmp_path}/run") == state(f"{tmp_path}/other")
