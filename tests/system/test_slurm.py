"""`latentmill submit`: what is typed is what runs on the cluster, and the cluster here is a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made.places import REPOSITORY
from made.refusal import refusal
from pipeline import cli
from servers.slurm import Slurm

SHARDS, IMAGES = 6, 60
SMALL = ["cluster.gpus=0", "cluster.cpus=2", "cluster.time=10"]
ENCODE = ["encoders.seed=1", "batch=4", "workers=1", "decode_in=threads", "launch.threads=1", "claim_seconds=3"]

WORKER = f"""#!{sys.executable}
import json, os, sys, time
from pathlib import Path
from pipeline.distributed.place import worker_place
place, restarts = worker_place(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
part = "finalize" if "finalize=true" in sys.argv else "array"
facts = dict(argv=sys.argv[1:], place=vars(place), environment=dict(os.environ), cwd=os.getcwd())
Path(os.environ["RECORDS"], f"{{part}}-{{place.rank}}-{{restarts}}.json").write_text(json.dumps(facts))
if part == "array" and "STOPPED" in os.environ and not restarts:
    sys.exit(75 if place.rank == int(os.environ["STOPPED"]) else time.sleep(3))
"""
"""Stands in for python: notes what it was called with, and where. STOPPED is the rank that is told to stop, once, while
the others work."""


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Call it for what each run of WORKER noted: {"array-RANK-RESTARTS": ..., "finalize-0-0": ...}."""
    folder = tmp_path / "records"
    folder.mkdir()
    (tmp_path / "worker").write_text(WORKER)
    (tmp_path / "worker").chmod(0o755)
    monkeypatch.setenv("RECORDS", str(folder))
    monkeypatch.chdir(tmp_path)
    return lambda: {path.stem: json.loads(path.read_text()) for path in sorted(folder.iterdir())}


def submit(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], str]:
    """(numbers of the jobs, what was printed) of a `latentmill submit encode` that succeeds."""
    assert cli.main(["submit", "encode", *words]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    found = re.search(r"^submitted: job (\d+)(?:, then job (\d+))?$", said, re.MULTILINE)
    assert found is not None, said
    return [job for job in found.groups() if job], said


# --------------------------------------------------------------------------------------------------------------------
# Real arrays of the real verb


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Input shards, in a folder whose name wants quoting."""
    from preprocess.shapes.shards import write_shards

    folder = tmp_path_factory.mktemp("source") / "it's a $HOME"
    write_shards(str(folder), SHARDS * IMAGES, 0, "train", shard_size=IMAGES)
    return f"source={folder}/{{00000..{SHARDS - 1:05d}}}.tar"


@pytest.fixture(scope="module")
def alone(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process alone makes of them."""
    dest = tmp_path_factory.mktemp("alone") / "cache"
    assert cli.main(["encode", shapes, f"dest={dest}", "device=cpu", *ENCODE]) == 0
    return files(dest)


def files(folder: Path) -> dict[str, bytes]:
    """Path and bytes of everything in a dataset, but for what a killed process was still writing."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".staging.")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_an_array_makes_byte_for_byte_the_dataset_of_one_process(
    slurm: Slurm, shapes: str, alone: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [shapes, f"dest={tmp_path / 'cache'}", *ENCODE, *SMALL, f"cluster.logs={tmp_path / 'logs, 100%'}"]
    (array, finalize), _ = submit(capsys, *words, "cluster.tasks=2")
    slurm.wait(array, finalize)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs, 100%").iterdir()}
    assert slurm.ends(array) == [("COMPLETED", "0")] * 2, logs
    assert slurm.ends(finalize) == [("COMPLETED", "0")], logs
    assert set(logs) == {
        *(f"latentmill-encode-{array}_{task}.log" for task in range(2)),
        f"latentmill-finalize-{finalize}.log",
    }
    assert files(tmp_path / "cache") == alone


@pytest.mark.long
def test_what_a_cancelled_array_has_left_is_done_by_the_next(
    slurm: Slurm,
    shapes: str,
    alone: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second array is slurm/encode.sbatch, submitted by hand."""
    monkeypatch.chdir(tmp_path)
    words = [shapes, f"dest={tmp_path / 'cache'}", *ENCODE]
    (array,), _ = submit(capsys, *words, *SMALL, "cluster.tasks=1", "cluster.finalize=false")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cache/units/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    slurm.ask("scancel", array)
    slurm.wait(array)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert [state for state, _ in slurm.ends(array)] == ["CANCELLED"]

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    script = str(REPOSITORY / "slurm" / "encode.sbatch")
    job = slurm.ask("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=2", script, *words, "device=cpu")
    slurm.wait(job)
    logs = {path.name: path.read_text() for path in (tmp_path / "slurm-logs").iterdir()}
    assert slurm.ends(job) == [("COMPLETED", "0")] * 2, logs
    assert files(tmp_path / "cache") == alone


# --------------------------------------------------------------------------------------------------------------------
# What Slurm makes of a script


def test_every_argument_reaches_every_process_as_it_was_typed(
    slurm: Slurm,
    records: Callable[[], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("RANK", "9")  # submitted from inside some other job
    monkeypatch.setenv("WORLD_SIZE", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    hostile = 'it\'s $HOME `id` "x" \\ # {0..3}* ;\n&& || $(touch pwned)'
    words = [f"source={hostile}", "dest=out", "max_rejects=0.5"]
    settings = ["cluster.tasks=2", "cluster.processes=2", "cluster.cpus=1", "cluster.python=./worker"]
    (array, finalize), said = submit(capsys, *words, *settings, "cluster.setup=export SETUP='set up'")
    slurm.wait(array, finalize)
    noted = records()

    assert sorted(noted) == ["array-0-0", "array-1-0", "array-2-0", "array-3-0", "finalize-0-0"]
    for name, facts in noted.items():
        last = "finalize=true" if name == "finalize-0-0" else "device=cuda"
        assert facts["argv"] == ["-P", "-m", "pipeline.cli", "encode", *words, last]
        assert facts["cwd"] == str(tmp_path)
        assert facts["environment"]["AWS_SECRET_ACCESS_KEY"] == "s3cr3t"  # inherited, and written nowhere
        assert facts["environment"]["SETUP"] == "set up"
    for rank in range(4):
        facts = noted[f"array-{rank}-0"]
        assert facts["place"] == {"rank": rank, "world": 4, "local_rank": rank % 2, "local_world": 2}
        assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"  # so that local_rank is a device
    assert noted["finalize-0-0"]["place"] == {"rank": 0, "world": 1, "local_rank": 0, "local_world": 1}
    assert "CUDA_VISIBLE_DEVICES" not in noted["finalize-0-0"]["environment"]
    script = slurm.ask("scontrol", "write", "batch_script", array, "-")
    assert script in said
    assert "s3cr3t" not in said
    assert not (tmp_path / "pwned").exists()


def test_the_batch_script_itself_is_one_process_however_many_srun_starts(slurm: Slurm, tmp_path: Path) -> None:
    code = "from pipeline.distributed.place import worker_place; place = worker_place(); print(place.rank, place.world)"
    command = f"{sys.executable} -c '{code}'"
    script = f"#!/bin/bash\n{command} > batch\nsrun --ntasks=3 {command} > step\n"
    (tmp_path / "job").write_text(script)
    options = ["--ntasks=3", f"--chdir={tmp_path}", "--output=log"]
    slurm.wait(slurm.ask("sbatch", "--parsable", *options, str(tmp_path / "job")))
    assert (tmp_path / "batch").read_text() == "0 1\n"
    assert sorted((tmp_path / "step").read_text().splitlines()) == ["0 3", "1 3", "2 3"]


def test_a_task_that_was_told_to_stop_goes_back_to_the_queue_alone_and_the_last_job_waits_for_it(
    slurm: Slurm,
    records: Callable[[], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STOPPED", "1")
    words = ["source=a", "dest=b", *SMALL, "cluster.tasks=2", "cluster.python=./worker"]
    (array, finalize), said = submit(capsys, *words)
    assert "#SBATCH --signal=TERM@120" in said
    slurm.wait(array, finalize)
    assert sorted(records()) == ["array-0-0", "array-1-0", "array-1-1", "finalize-0-0"]
    assert max((tmp_path / "records").iterdir(), key=lambda path: path.stat().st_mtime_ns).stem == "finalize-0-0"
    assert slurm.ends(array) == [("COMPLETED", "0")] * 2


def test_a_failing_set_up_line_ends_the_task_before_the_verb(
    slurm: Slurm, records: Callable[[], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["source=a", "dest=b", *SMALL, "cluster.tasks=1", "cluster.python=./worker", "cluster.finalize=false"]
    (array,), _ = submit(capsys, *words, "cluster.setup=source /nonexistent/activate", "cluster.setup=true")
    slurm.wait(array)
    assert slurm.ends(array) == [("FAILED", "1")]
    assert records() == {}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["cluster.partition=gpu"], "cluster.partition=gpu: Slurm has no such partition here; there are main"),
        (["cluster.time=2-00:00:00"], "cluster.time=2-00:00:00 is more than the partition's limit (1-00:00:00 in"),
        (
            ["cluster.gpus=9"],
            "Slurm refuses the job: allocation failure: Requested node configuration is not available",
        ),
        (
            ["cluster.options=--constraint=h100"],
            "Slurm refuses the job: allocation failure: Invalid feature specification",
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_slurm_would_refuse_or_never_start_is_said_and_not_submitted(
    slurm: Slurm, capsys: pytest.CaptureFixture[str], words: list[str], reason: str, dry: list[str]
) -> None:
    before = slurm.jobs()
    assert reason in refusal(capsys, 1, "encode", "source=a", "dest=b", *words, *dry)
    assert slurm.jobs() == before


def test_a_dry_run_prints_the_script_checks_it_and_submits_nothing(
    slurm: Slurm, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = slurm.jobs()
    assert (
        cli.main(["submit", "encode", "--dry-run", "source=a", "dest=b", "cluster.tasks=5", "cluster.concurrent=2"])
        == 0
    )
    said = capsys.readouterr()
    assert "#SBATCH --array=0-4%2\n" in said.out
    assert "checked, not submitted. Job " in said.err
    assert slurm.jobs() == before
    assert list(tmp_path.iterdir()) == []


def test_slurm_and_its_jobs_end_with_the_tests_even_when_those_are_killed(slurm_cluster: Slurm, tmp_path: Path) -> None:
    """tests/servers/slurm.py leaves no process on a newcomer's machine."""
    code = (
        "import sys, time; from pathlib import Path; from servers.slurm import Slurm\n"
        "with Slurm(Path(sys.argv[1]), nodes=1) as cluster:\n"
        "    cluster.ask('sbatch', '--output=/dev/null', '--wrap', f'sleep 987; : {sys.argv[1]}')\n"
        "    while 'R' not in cluster.ask('squeue', '--noheader', '--format=%t'): time.sleep(0.05)\n"
        "    print('up', flush=True); time.sleep(120)\n"
    )
    environment = dict(os.environ)
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert len(running(str(tmp_path))) >= 6  # the holder, three daemons, a job's step and its shell
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while left := running(str(tmp_path)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def running(marker: str) -> list[str]:
    """Command lines of processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        lines += [line] if marker in line and int(path.parent.name) != os.getpid() else []
    return lines
