"""Ranks of one machine start together, receive the same signals and end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.distributed import ranks
from pipeline.distributed.place import Place, cores, threads_per_rank, worker_place


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `ranked` that ranks run; a test writes it."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    return tmp_path / "ranked.py"


def test_ranks_know_their_place_and_share_the_cores(rank_module: Path, tmp_path: Path) -> None:
    rank_module.write_text(
        "import json, os, sys\n"
        "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}.json', 'w').write(json.dumps(dict(os.environ)))\n"
    )
    assert ranks.run_local("ranked", [str(tmp_path)], processes=2, threads=0) == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [first[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["0", "0", "2", "2"]
    assert [second[key] for key in ("RANK", "LOCAL_RANK")] == ["1", "1"]
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert int(first["OMP_NUM_THREADS"]) == max(1, cores() // 2)


def test_more_threads_than_cores_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "cores", lambda: 2)
    assert ranks.rank_environment(0, 2, 1, threads=2)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in ranks.rank_environment(0, 2, 1, threads=1)
    assert threads_per_rank(0, 8) == 1
    assert threads_per_rank(3, 8) == 3


@pytest.mark.parametrize(("statuses", "job"), [([0, 0], 0), ([0, 3], 3), ([75, 75], 75), ([75, 0], 75), ([75, 2], 2)])
def test_the_jobs_status_is_the_worst_of_its_ranks(rank_module: Path, statuses: list[int], job: int) -> None:
    rank_module.write_text(f"import os, sys\nsys.exit({statuses}[int(os.environ['RANK'])])\n")
    assert ranks.run_local("ranked", [], processes=2) == job


def test_a_failing_rank_ends_the_others(rank_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_module.write_text(
        "import os, sys, time, signal\n"
        "if os.environ['RANK'] == '1':\n    sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # it has to be killed
        "time.sleep(120)\n"
    )
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    began = time.monotonic()
    assert ranks.run_local("ranked", [], processes=2) == 5
    assert time.monotonic() - began < 60


def test_a_killed_rank_is_named(rank_module: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rank_module.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(120)\n"
    )
    assert ranks.run_local("ranked", [], processes=2) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL; out of memory?" in capfd.readouterr().err


def test_a_killed_rank_is_the_reason_although_others_fail_of_it_first(rank_module: Path, tmp_path: Path) -> None:
    """A job goes back to the queue after a signal, and not after an error."""
    rank_module.write_text(
        "import os, pathlib, signal, sys, time\n"
        "ready = pathlib.Path(sys.argv[1], 'ready')\n"
        "if os.environ['RANK'] == '0':\n"
        "    while not ready.exists():\n        time.sleep(0.01)\n"
        "    sys.exit(1)\n"  # it has lost its connection
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "ready.touch()\n"
        "time.sleep(0.3)\n"
        "os.kill(os.getpid(), signal.SIGALRM)\n"
        "time.sleep(120)\n"
    )
    assert ranks.run_local("ranked", [str(tmp_path)], processes=2) == 128 + signal.SIGALRM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank(rank_module: Path, tmp_path: Path, number: signal.Signals) -> None:
    rank_module.write_text(
        "import os, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    open(f'{sys.argv[1]}/heard{os.environ[\"RANK\"]}', 'w').write(str(number))\n"
        "    sys.exit(75)\n"
        f"signal.signal({int(number)}, stop)\n"
        "open(f'{sys.argv[1]}/ready{os.environ[\"RANK\"]}', 'w').close()\n"
        "time.sleep(120)\n"
    )
    launcher = start_launcher(tmp_path)
    wait_for(tmp_path, "ready0", "ready1")
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == 75
    assert [(tmp_path / f"heard{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_ranks_without_a_handler_end_with_the_signals_status(rank_module: Path, tmp_path: Path) -> None:
    rank_module.write_text(
        "import os, sys, time\nopen(f'{sys.argv[1]}/ready{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(120)\n"
    )
    launcher = start_launcher(tmp_path)
    wait_for(tmp_path, "ready0", "ready1")
    launcher.terminate()
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    """Even SIGKILL of the launcher leaves no rank behind."""
    code = (
        "import os, sys, time\n"
        "from pipeline.distributed import rank\n"
        "rank.die_with_parent()\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, {str(tmp_path / 'pid')!r}])"
    launcher = subprocess.Popen([sys.executable, "-c", child])
    wait_for(tmp_path, "pid")
    time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_gives_a_command_the_time_to_end_as_it_wants(tmp_path: Path) -> None:
    """A terminal sends SIGINT to parent and child at once; the parent must not kill a child that is committing."""
    child = (
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n    time.sleep(1)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        f"pathlib.Path({str(tmp_path / 'ready0')!r}).touch()\n"
        "time.sleep(120)\n"
    )
    code = f"sys.exit(run_command([sys.executable, '-c', {child!r}]))"
    code = f"import sys; from pipeline.distributed.ranks import run_command; {code}"
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_for(tmp_path, "ready0")
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=60) == 75


def test_a_commands_death_by_signal_is_128_and_the_signal() -> None:
    assert ranks.run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


def test_a_rank_runs_the_verb_with_the_launchers_configuration(tmp_path: Path) -> None:
    from pipeline.config.loading.load import load

    config = load("synth", [f"dest={tmp_path / 'it, is'}", "images=3", "shard_size=2"])
    assert ranks.run_ranks("synth", config, processes=1, threads=1) == 0
    assert {path.name for path in (tmp_path / "it, is").glob("*.tar")} == {"00000.tar", "00001.tar"}


def test_an_error_in_a_rank_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from pipeline.config import SynthConfig

    (tmp_path / "file").write_text("")
    assert ranks.run_ranks("synth", SynthConfig(dest=str(tmp_path / "file" / "x"), images=3), 1, 1) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_the_ranks_port_is_theirs_from_before_they_start() -> None:
    """Nothing else may be given it while they import PyTorch; torch.distributed's own store gets in."""
    from torch.distributed import TCPStore

    with ranks.reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, 1, True)
        store.set("key", "value")
        assert store.get("key") == b"value"


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "6", "SLURM_NODEID": "0"}
"""What Slurm 22.05 says in a batch script of six tasks (and tests/system/test_slurm.py sees for itself)."""
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)"}
"""Task 3 of a step of six, on its second node."""


def array(number: int, first: int = 0, count: int = 4, step: int = 1) -> dict[str, str]:
    """What Slurm says in one task of an array."""
    values = {"ID": number, "MIN": first, "COUNT": count, "STEP": step, "MAX": first + (count - 1) * step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, 1)),
        (TORCHRUN, Place(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, 1, 2)),  # a launcher of one machine that says no more
        (BATCH, Place(0, 1, 0, 1)),  # srun has started nothing: this is the only process
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, Place(0, 1, 0, 1)),  # the batch step's number
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, Place(0, 1, 0, 1)),  # an interactive step's
        (STEP, Place(3, 6, 1, 2)),
        (STEP | {"SLURM_NODEID": "3", "SLURM_LOCALID": "0"}, Place(3, 6, 0, 1)),
        (STEP | TORCHRUN, Place(5, 8, 1, 4)),  # srun started torchrun, once per node
        (BATCH | array(3), Place(3, 4, 0, 1)),
        (STEP | array(3), Place(3 * 6 + 3, 4 * 6, 1, 2)),
        (STEP | array(14, first=10, count=5, step=2), Place(2 * 6 + 3, 5 * 6, 1, 2)),
        (TORCHRUN | BATCH | array(2), Place(2 * 8 + 5, 4 * 8, 1, 4)),
    ],
)
def test_a_worker_knows_its_place_under_every_launcher(environment: dict[str, str], place: Place) -> None:
    assert worker_place(environment) == place


def test_the_processes_of_an_array_have_a_rank_each() -> None:
    places = [
        worker_place(STEP | array(number, first=1, count=3, step=4) | {"SLURM_PROCID": str(task)})
        for number in (1, 5, 9)
        for task in range(6)
    ]
    assert [place.rank for place in places] == list(range(18))
    assert {place.world for place in places} == {18}


@pytest.mark.parametrize("numbers", [(1, 5, 9), (0, 1, 7)])
def test_a_rank_is_below_the_world_whatever_the_arrays_numbers(numbers: tuple[int, ...]) -> None:
    """--array=1,5,9: Slurm says step 1."""
    assert all(worker_place(array(number, numbers[0], count=3)).rank < 3 for number in numbers)


def start_launcher(folder: Path) -> subprocess.Popen[bytes]:
    """Two ranks of the module `ranked`, under a launcher in a process of its own."""
    code = f"sys.exit(run_local('ranked', [{str(folder)!r}], 2))"
    code = f"import sys; from pipeline.distributed.ranks import run_local; {code}"
    return subprocess.Popen([sys.executable, "-c", code])


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() and (name != "pid" or (folder / name).read_text()) for name in names):
        assert time.monotonic() < deadline, names
        time.sleep(0.02)


def running(pid: int) -> bool:
    """Whether a process is alive (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
