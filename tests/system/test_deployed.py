"""The commands of deploy/ as two machines of one run: stopped on one of them, killed, frozen and begun again, they end
as an undisturbed run does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest

from made.deployed import own_words, pod_command, pod_environment, task_script
from made.slurm_run import TRAIN, until
from pipeline.data.format.manifest import load_manifest
from pipeline.runs.directory import committed
from pipeline.runs.holder import holder_bytes
from pipeline.runs.lease import DEAD_SECONDS, newest
from pipeline.runs.names import lease_key
from pipeline.storage.urls import open_storage
from preprocess.shapes.shards import write_shards
from ranks.faulty_run import BATCH, make_cache, rows, state
from servers.warm_ranks import WarmRanks

FILE = "kubernetes/train.yaml"
PAUSE = 7 * BATCH
Begin = Callable[..., "list[subprocess.Popen[str]]"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = make_cache(tmp_path_factory.mktemp("data") / "cache")
    rest = [word for word in TRAIN if not word.startswith("tracking.wandb")]
    return [*rest, "tracking.wandb=off", f"data.train={cache}", "device=cpu", "launch.threads=1"]


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> object:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert warm_ranks.run("pipeline.cli", ["train", *words, f"run={run}"], 2).returncode == 0
    return state(str(run))


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def begin(words: list[str], tmp_path: Path, port: int) -> Iterator[Begin]:
    """Call it with the numbers of the pods to start, and what is to happen in them (see paused_run.py)."""
    started: list[subprocess.Popen[str]] = []

    def pods(
        *numbers: int, pauses: dict[int, tuple[int, str]] | None = None, stderr: int | TextIO = subprocess.PIPE
    ) -> list[subprocess.Popen[str]]:
        begun = []
        for number in numbers:
            environment = pod_environment(FILE, number, GPUS="1")
            disturbed = ("ranks.paused_run", "-P", "-m", "pipeline.cli", "train")
            command = own_words(pod_command(FILE, environment), [*words, f"run={tmp_path}/run"], disturbed)
            command = [f"--master-port={port}" if word.startswith("--master-port=") else word for word in command]
            more = {"PAUSES": json.dumps(pauses or {}), "PAUSED": str(tmp_path)}
            begun.append(subprocess.Popen(command, stderr=stderr, text=True, env=os.environ | environment | more))
        started.extend(begun)
        return begun

    yield pods
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def descendants(process: int) -> list[int]:
    """Processes below one, the youngest of each line last."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def statuses(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Exit statuses, in order; what the processes say is passed on."""
    said = [process.communicate(timeout=180)[1] for process in processes]
    print(*said, file=sys.stderr)
    return [process.returncode for process in processes]


@pytest.mark.long
def test_pods_end_with_75_when_one_is_told_to_stop_and_the_run_goes_on(
    begin: Begin, tmp_path: Path, undisturbed: object
) -> None:
    pods = begin(0, 1)
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and rows(f"{tmp_path}/run"), "the first step")
    pods[1].terminate()
    assert statuses(pods) == [75, 75]
    assert committed(open_storage(f"{tmp_path}/run"))
    assert statuses(begin(0, 1)) == [0, 0]
    assert state(f"{tmp_path}/run") == undisturbed


@pytest.mark.long
@pytest.mark.parametrize(("which", "ends"), [("kill", [70, 137]), ("kill first", [137, 70])])
def test_a_rank_that_is_killed_fails_its_pod_and_its_peers_without_failing_the_job(
    which: str, ends: list[int], begin: Begin, tmp_path: Path, undisturbed: object
) -> None:
    """Statuses other than 75, 1 and 2 are counted, and the pods come back. Rank 0 leaves a lease that still counts: its
    pod was another machine, and is back before the lease is dead."""
    assert statuses(begin(0, 1, pauses={0: (PAUSE, which)})) == ends
    run = open_storage(f"{tmp_path}/run")
    number, holder = newest(run)
    assert holder is not None
    if which == "kill first":
        assert holder.state == "held"
        beat = time.time() - DEAD_SECONDS + 20  # dead by the time that the ranks have met, or soon after
        run.put(lease_key(number), holder_bytes(replace(holder, machine="a pod that has gone", beat=beat)))
    assert statuses(begin(0, 1)) == [0, 0]
    assert state(f"{tmp_path}/run") == undisturbed


@pytest.mark.parametrize(("how", "status"), [pytest.param("75", 75, marks=pytest.mark.long), ("kill", 70)])
def test_the_script_for_skypilot_ends_as_its_ranks_do_but_never_with_137(
    how: str, status: int, tmp_path: Path, port: int
) -> None:
    """On two machines of one GPU each."""
    script = Path(task_script(tmp_path))
    text = script.read_text().replace("29500", str(port)).replace("pipeline.train", "ranks.ending_rank")
    script.write_text(re.sub(r"^ *experiment=.*$", f"    {how}", text, flags=re.MULTILINE))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BEGUN": str(tmp_path),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
    }
    nodes = [
        subprocess.Popen(
            ["bash", str(script)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"SKYPILOT_NODE_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert statuses(nodes) == [status, status]


@pytest.mark.long
def test_a_pod_that_is_back_while_the_other_still_waits_for_its_predecessor_comes_back_once_more(
    begin: Begin, tmp_path: Path, undisturbed: object
) -> None:
    """As where the network does not tell of a lost peer: rank 0 is frozen when rank 1 is killed."""
    pods = begin(0, 1, pauses={0: (PAUSE, "wait")})
    until(lambda: (tmp_path / "0-0").exists() and (tmp_path / "0-1").exists(), "the pause")
    _, holder = newest(open_storage(f"{tmp_path}/run"))
    assert holder is not None
    os.kill(holder.pid, signal.SIGSTOP)
    os.kill(descendants(pods[1].pid)[-1], signal.SIGKILL)
    assert statuses(pods[1:]) == [137]

    said = tmp_path / "said"
    with said.open("w") as file:
        (back,) = begin(1, stderr=file)
        until(lambda: "waiting for the ranks there to end" in said.read_text(), "the pod that is back")
    pods[0].terminate()  # it hears that once it runs again, and finds its peer gone
    os.kill(holder.pid, signal.SIGCONT)
    assert statuses(pods[:1]) == [70]
    assert statuses([back]) == [75]
    assert statuses(begin(0, 1)) == [0, 0]
    assert state(f"{tmp_path}/run") == undisturbed


@pytest.mark.long
def test_pods_of_encode_share_the_shards_and_make_the_cache_that_one_process_makes(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "shapes"), 24, 1, "val", shard_size=6)
    words = [f"source={tmp_path}/shapes/{{00000..00003}}.tar", "encoders.seed=1", "batch=6", "decode_in=threads"]
    words += ["launch.threads=1", "device=cpu"]
    name = "kubernetes/encode.yaml"
    pods = []
    for index in range(2):
        environment = pod_environment(name, index, WORLD_SIZE="2")
        command = pod_command(name, environment)
        command = [*command[: command.index("encoders=sd1")], *words, f"dest={tmp_path}/shared"]
        pods.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment))
    assert statuses(pods) == [0, 0]
    alone = [sys.executable, "-m", "pipeline.cli", "encode", *words, f"dest={tmp_path}/alone"]
    assert subprocess.run(alone, check=False).returncode == 0
    digests = [load_manifest(open_storage(f"{tmp_path}/{cache}")).digest for cache in ("shared", "alone")]
    assert digests[0] == digests[1]
