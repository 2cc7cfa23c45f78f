"""Whatever starts its ranks, a run ends with the same weights to the bit (docs/how_to/choose_a_launcher.md)."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from made.slurm_run import TRAIN
from ranks.faulty_run import make_cache, state
from servers.swift import free_ports
from servers.warm_ranks import WarmRanks

PYTHON = sys.executable
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no"]
"""What the script `accelerate launch` runs; the script imports timm first, and with it torchvision."""


@dataclass(frozen=True)
class Launcher:
    """command: what stands before the words of `latentmill train`; PORT is replaced by a free one. world: ranks."""

    command: list[str]
    world: int = 2


LAUNCHERS = {
    "accelerate": Launcher([*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=PORT"]),
    "accelerate, one process": Launcher([*ACCELERATE, "--cpu", "--num_processes=1"], world=1),
    "deepspeed": Launcher([PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=PORT"]),
    "launch.processes": Launcher([PYTHON]),
    "none": Launcher([PYTHON], world=1),
    "srun": Launcher(["srun", "--nodes=2", "--ntasks=2", PYTHON]),
    "torchrun": Launcher([PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=PORT"]),
}
IN_EVERY_RUN = ("accelerate",)
"""The others are run by `make test-long`; of torchrun, test_under.py and test_deployed.py start ranks in every run."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = make_cache(tmp_path_factory.mktemp("launchers") / "cache")
    off = [word if word != "tracking.wandb=offline" else "tracking.wandb=off" for word in TRAIN]
    return [*off, f"data.train={cache}", "device=cpu", "launch.threads=1"]


@pytest.fixture(scope="module")
def expected(
    words: list[str], tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks
) -> Callable[[int], tuple[Any, ...]]:
    """Call it for the end of the run on so many ranks that are forked."""

    @functools.cache
    def end(world: int) -> tuple[Any, ...]:
        run = tmp_path_factory.mktemp("expected") / "run"
        ended = warm_ranks.run("pipeline.cli", ["train", *words, f"run={run}"], world)
        assert ended.returncode == 0, ended.stderr[-4000:]
        return state(str(run))

    return end


@pytest.mark.parametrize(
    "name", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.long) for name in LAUNCHERS]
)
def test_a_run_ends_with_the_same_weights_under_every_launcher(
    name: str, words: list[str], expected: Callable[[int], Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "srun":
        request.getfixturevalue("slurm")
    launcher, (port,) = LAUNCHERS[name], free_ports(1)
    command = [word.replace("PORT", str(port)) for word in launcher.command]
    if name == "launch.processes":
        words = [*words, "launch.processes=2"]
    module = ["--module"] if name == "deepspeed" else ["-m"]
    command = [*command, *module, "pipeline.train", *words, f"run={tmp_path}/run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(state(f"{tmp_path}/run")[1]) == len(expected(launcher.world)[1]), "another number of ranks"
    assert state(f"{tmp_path}/run") == expected(launcher.world)
