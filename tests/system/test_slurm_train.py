"""`latentmill submit train` on a real Slurm of two nodes: what is told to stop comes back and reaches the end that an
undisturbed run reaches, and nobody else trains the run meanwhile (docs/explained/promises.md)."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made.places import TESTS
from made.refusal import refusal
from made.slurm_run import END, SMALL, TRAIN, until
from pipeline import cli
from pipeline.runs import lease
from pipeline.runs.directory import committed
from pipeline.scheduler import slurm as commands
from pipeline.status import runs_at, status
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import parse_rows
from ranks.faulty_run import BATCH, make_cache, state
from servers.slurm import Slurm
from servers.warm_ranks import WarmRanks


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture(scope="module")
def undisturbed(cache: str, tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> Callable[[], Any]:
    """Call it for the end of the same run on two ranks, without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    words = [*TRAIN, f"data.train={cache}", f"run={run}", "device=cpu", "launch.threads=1"]
    words[words.index("tracking.wandb=offline")] = "tracking.wandb=off"

    @functools.cache
    def end() -> Any:
        ended = warm_ranks.run("pipeline.cli", ["train", *words], 2)
        assert ended.returncode == 0, ended.stderr[-4000:]
        return state(str(run))

    return end


@pytest.fixture
def paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, tuple[Any, ...]]], Path]:
    """Call it with what is to happen (see paused_run.py) for the folder in which ranks say that it has."""

    def plan(pauses: dict[int, tuple[Any, ...]]) -> Path:
        (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS}/ranks/paused_run.py" "$@"\n')
        (tmp_path / "python").chmod(0o755)
        (tmp_path / "paused").mkdir()
        monkeypatch.setenv("PAUSES", json.dumps(pauses))
        monkeypatch.setenv("PAUSED", str(tmp_path / "paused"))
        monkeypatch.chdir(tmp_path)
        return tmp_path / "paused"

    return plan


def submit(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The number of the job of a `latentmill submit train` that succeeds."""
    assert cli.main(["submit", "train", *TRAIN, *SMALL, *words]) == 0, capsys.readouterr().err
    found = re.search(r"^submitted: job (\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert found is not None
    return found[1]


def log(folder: Path, job: str) -> str:
    return (folder / "slurm-logs" / f"latentmill-train-{job}.log").read_text(errors="replace")


def words_of(run: str, cache: str) -> list[str]:
    """A rank on each of the two nodes."""
    return [f"data.train={cache}", f"run={run}", "nodes=2", "cluster.python=./python"]


def lives(run: str) -> tuple[list[int], str, int]:
    """n at which each life of a run began, how the last ended, and how often its job was back in the queue."""
    starts = [row["n"] for row in parse_rows(open_storage(run).get("metrics.jsonl")) if row["kind"] == "start"]
    _, holder = lease.newest(open_storage(run))
    assert holder is not None
    assert holder.life == len(starts)
    return starts, holder.state, holder.restart


def test_a_preempted_run_comes_back_to_the_end_of_an_undisturbed_one_and_is_trained_by_nobody_else(
    slurm: Slurm,
    cache: str,
    undisturbed: Callable[[], Any],
    paused: Callable[[dict[int, tuple[Any, ...]]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job of a higher partition takes the nodes, between two commits."""
    where, run = paused({0: (3 * BATCH, "wait")}), str(tmp_path / "run")
    words = words_of(run, cache)
    job = submit(capsys, *words)
    until(lambda: len(list(where.glob("0-*"))) == 2, "the pause")
    identity = (Path(run) / "wandb.id").read_text()
    with monkeypatch.context() as user:
        user.setenv("SQUEUE_PARTITION", "urgent")
        assert commands.states([job]) == {job: "RUNNING"}
        assert "latentmill-train" in commands.in_queue(["latentmill-train"])

    before = slurm.jobs()
    said = refusal(capsys, 1, "train", *TRAIN, *SMALL, *words)
    assert f"{run} is being trained by Slurm job {job} (restart 0), process " in said
    assert "Slurm says RUNNING; one run is trained once at a time, or choose another run=" in said
    assert slurm.jobs() == before
    assert re.fullmatch(rf"training \(Slurm job {job}, n[12]\)", status(run).state)

    slurm.wait(slurm.ask("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true"))
    assert committed(open_storage(run)) == [3 * BATCH]
    said = refusal(capsys, 1, "train", *TRAIN, *SMALL, *words)
    assert f"{run} is to be gone on with by Slurm job {job} (restart 0)" in said
    assert status(run).state == f"stopped, to be continued (Slurm job {job}: PENDING)"

    slurm.wait(job)
    assert slurm.ends(job) == [("COMPLETED", "0")], log(tmp_path, job)
    assert commands.states([job, "999999"]) == {job: "COMPLETED", "999999": ""}
    assert commands.states(["999999"]) == {"999999": ""}
    assert state(run) == undisturbed()
    assert committed(open_storage(run)) == [END, 10 * BATCH, 5 * BATCH, 3 * BATCH]
    assert f"stopped by SIGTERM with {3 * BATCH} of {END} samples committed" in log(tmp_path, job)
    assert lives(run) == ([0, 3 * BATCH], "finished", 1)
    assert (Path(run) / "wandb.id").read_text() == identity
    found = status(run)
    assert (found.state, found.samples, found.end, found.committed, found.restarts) == ("finished", END, END, END, 1)


@pytest.mark.long
@pytest.mark.parametrize("what", ["time limit", "rank killed", "node crashed"])
def test_a_run_outlives_its_time_limit_a_killed_rank_and_a_lost_node(
    slurm: Slurm,
    cache: str,
    undisturbed: Callable[[], Any],
    paused: Callable[[dict[int, tuple[Any, ...]]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    """Slurm itself sends SIGUSR1 ahead of a limit of two minutes; SIGKILL to one of the ranks; a whole machine."""
    where, run = paused({0: (7 * BATCH, "kill" if what == "rank killed" else "wait")}), str(tmp_path / "run")
    limit = ["cluster.time=2", "cluster.signal=60"] if what == "time limit" else []
    job = submit(capsys, *words_of(run, cache), *limit)
    until(lambda: len(list(where.glob("0-*"))) == 2, "the pause")
    if what == "node crashed":
        slurm.crash("n2")
        until(lambda: slurm.states()["n2"].startswith("down"), "the end of n2")
        slurm.boot("n2")
    slurm.wait(job, seconds=240)
    assert slurm.ends(job) == [("COMPLETED", "0")], log(tmp_path, job)
    assert state(run) == undisturbed()
    stopped = f"stopped by SIGUSR1 with {7 * BATCH} of {END} samples committed"
    assert (stopped in log(tmp_path, job)) == (what == "time limit")
    assert lives(run) == ([0, 7 * BATCH if what == "time limit" else 5 * BATCH], "finished", 1)


def sweep(root: Path, cache: str, samples: int, *words: str) -> subprocess.Popen[str]:
    """`latentmill train -m` over two learning rates, in one process each."""
    train = [word for word in TRAIN if word.partition("=")[0] not in ("deepspeed", "samples", "tracking.wandb")]
    train += [
        "deepspeed=off",
        "tracking.wandb=off",
        f"data.train={cache}",
        f"run={root}",
        f"samples={samples}",
        "optim.lr=1e-3,2e-3",
    ]
    command = [sys.executable, "-m", "pipeline.cli", "train", "-m", *train, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root.parent)


@pytest.mark.long
def test_a_sweep_that_is_told_to_stop_goes_on_with_each_of_its_jobs(cache: str, tmp_path: Path) -> None:
    root, samples = tmp_path / "sweep", 150 * BATCH
    with sweep(root, cache, samples, "device=cpu", "launch.threads=1") as first:
        until(lambda: committed(open_storage(str(root / "optim.lr=0.001"))), "a commit")
        first.send_signal(signal.SIGTERM)
        told, _ = first.communicate()
    assert first.returncode == 75, told
    assert "latentmill train: optim.lr=0.001 was stopped with everything committed; the same command goes on" in told
    assert "== optim.lr=0.002" not in told
    with sweep(root, cache, samples, "device=cpu", "launch.threads=1") as second:
        told, _ = second.communicate()
    assert second.returncode == 0, told
    assert [status(run).state for run in runs_at(str(root))] == ["finished"] * 2


@pytest.mark.long
def test_members_of_a_sweep_on_several_nodes_take_turns_and_one_that_is_told_to_stop_keeps_its_own(
    slurm: Slurm,
    cache: str,
    undisturbed: Callable[[], Any],
    paused: Callable[[dict[int, tuple[Any, ...]]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each takes both nodes. The first is back in the queue while the second waits for its turn."""
    where, root = paused({0: (3 * BATCH, "wait", "optim.lr=0.0001")}), tmp_path / "sweep"
    train = [word for word in TRAIN if not word.startswith("tracking.wandb=")]
    command = ["train", "-m", *train, *SMALL, *words_of(str(root), cache), "cluster.concurrent=1"]
    command += ["tracking.wandb=off", "optim.lr=1e-4,2e-3"]
    assert cli.main([*command, "--no-wait"]) == 0, capsys.readouterr().err
    first, second = re.findall(r"^== optim.lr=\S+: job (\d+)$", said(capsys), re.MULTILINE)
    until(lambda: len(list(where.glob("0-*"))) == 2, "the pause")
    assert slurm.ask("squeue", "--noheader", f"--jobs={second}", "--format=%T %r") == "PENDING Dependency"
    slurm.ask("scancel", "--signal=USR1", first)
    assert cli.main(command) == 0, capsys.readouterr().err  # the same command waits for both
    printed = said(capsys)
    assert f"== optim.lr=0.0001: finished (job {first})\n" in printed and f"(job {second})\n" in printed
    runs = [str(root / f"optim.lr={lr}") for lr in ("0.0001", "0.002")]
    assert [lives(run) for run in runs] == [([0, 3 * BATCH], "finished", 1), ([0], "finished", 0)]
    times = [[row["time"] for row in parse_rows(open_storage(run).get("metrics.jsonl"))] for run in runs]
    assert times[1][0] > times[0][-1]
    assert state(runs[0]) == undisturbed()
    assert cli.main(command) == 0
    assert said(capsys) == "== optim.lr=0.0001: finished\n== optim.lr=0.002: finished\nnothing is left to submit\n"


# --------------------------------------------------------------------------------------------------------------------
# What Slurm makes of chains and of the static script

NOTE = f"""#!{sys.executable}
import json, os, signal, sys, time
if "pipeline.jobs.nodes" in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
verb = next(word for word in sys.argv if word in ("encode", "train", "eval"))
part = verb if "finalize=true" not in sys.argv else "finalize"
rank, restart = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([part, rank, restart, sys.argv[1:]]) + "\\n")
if os.environ.get("KILLED") == f"{{part}}-{{rank}}-{{restart}}":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(part == os.environ.get("FAILS")) or int("KILLED" in os.environ and restart == "0"))
"""
"""Stands in for python or for latentmill: notes its part, rank and restart. KILLED names what a signal ends, while the
other ranks fail with 1; FAILS a part that fails."""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[Any]]]:
    """Call it for what each run of NOTE noted, in their order: [part, rank, restart, arguments]."""
    (tmp_path / "latentmill").write_text(NOTE)
    (tmp_path / "latentmill").chmod(0o755)
    (tmp_path / "notes").touch()
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.chdir(tmp_path)
    return lambda: [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


@pytest.mark.parametrize("fails", ["", "finalize"])
def test_each_verb_of_a_chain_waits_for_the_success_of_the_one_before(
    slurm: Slurm,
    notes: Callable[[], list[list[Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
) -> None:
    monkeypatch.setenv("FAILS", fails)
    run = f"run={tmp_path / 'run'}"
    encode = ["encode", "source=a", "dest=b", *SMALL, "cluster.tasks=2", "cluster.python=./latentmill"]
    encode.append("cluster.check_nodes=false")  # nobody makes b
    chain = ["then", "train", *TRAIN, "data.train=b", run, "nodes=2", "then", "eval", run, "images=10"]
    assert cli.main(["submit", *encode, *chain]) == 0
    found = re.search(r"^submitted: job (\d+), then job (\d+), then job (\d+), then job (\d+)$", said(capsys), re.M)
    assert found is not None
    slurm.wait(*found.groups())
    parts = [part for part, *_ in notes()]
    assert sorted(parts[:2]) == ["encode", "encode"]
    assert parts[2:] == (["finalize"] if fails else ["finalize", "train", "train", "eval"])
    ended = [slurm.ends(job)[0][0] for job in found.groups()]
    assert ended == ["COMPLETED", *(["FAILED", "CANCELLED", "CANCELLED"] if fails else ["COMPLETED"] * 3)]
    lost = "never begun (Slurm job {}: CANCELLED)" if fails else "never begun (Slurm job {}: COMPLETED)"
    assert status(str(tmp_path / "run")).state == lost.format(found[3])
    lease.require_free(open_storage(str(tmp_path / "run")))  # the job that it was given to is dead


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_the_script_to_submit_by_hand_comes_back_when_a_signal_has_ended_a_rank(
    slurm: Slurm, cache: str, notes: Callable[[], list[list[Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILLED", "train-1-0")
    (tmp_path / "python").symlink_to("latentmill")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "slurm-logs").mkdir()
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gres=none"]
    words = ["run=it's", f"data.train={cache}", "samples=1"]
    job = slurm.ask("sbatch", "--parsable", *options, str(TESTS.parent / "slurm/train.sbatch"), *words)
    slurm.wait(job)
    assert slurm.ends(job) == [("COMPLETED", "0")], log(tmp_path, job)
    arguments = ["train", "launch.threads=2", *words]
    assert sorted(notes()) == [["train", rank, restart, arguments] for rank in "01" for restart in "01"]


@pytest.mark.parametrize("how", ["submit", pytest.param("by hand", marks=pytest.mark.long)])
def test_a_node_that_cannot_train_is_kept_out_and_the_job_runs_elsewhere(
    slurm: Slurm,
    cache: str,
    notes: Callable[[], list[list[Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """The first node sees a full disk where the run is to lie."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "slurm-logs").mkdir()
    (tmp_path / "python").symlink_to("latentmill")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    slurm.on("n1", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "disk"))
    try:
        words = [f"data.train={cache}", f"run={tmp_path}/disk/run"]
        if how == "submit":
            job = submit(capsys, *words, "cluster.python=./latentmill", "deepspeed=off")
        else:
            options = ["--ntasks-per-node=1", "--cpus-per-task=2", "--gres=none"]
            job = slurm.ask("sbatch", "--parsable", *options, str(TESTS.parent / "slurm/train.sbatch"), *words)
        slurm.wait(job)
    finally:
        slurm.on("n1", "umount", str(tmp_path / "disk"))
    assert slurm.ends(job) == [("COMPLETED", "0")], log(tmp_path, job)
    assert f"node n1 is bad: {tmp_path}/disk has 0.0 GB free" in log(tmp_path, job)
    assert "back to the queue, without n1" in log(tmp_path, job)
    assert [(part, restart) for part, _, restart, _ in notes()] == [("train", "1")]
    assert "ExcNodeList=n1 " in slurm.ask("scontrol", "--oneliner", "show", "job", job)


def test_a_job_whose_bad_node_no_other_can_replace_fails_and_says_so(
    slurm: Slurm,
    cache: str,
    notes: Callable[[], list[list[Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It wants both of the nodes that there are. Kept off one of them, it would wait for ever."""
    (tmp_path / "disk").mkdir()
    slurm.on("n2", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "disk"))
    try:
        job = submit(
            capsys, f"data.train={cache}", f"run={tmp_path}/disk/run", "nodes=2", "cluster.python=./latentmill"
        )
        slurm.wait(job)
    finally:
        slurm.on("n2", "umount", str(tmp_path / "disk"))
    assert slurm.ends(job) == [("FAILED", "1")], log(tmp_path, job)
    assert f"node n2 is bad: {tmp_path}/disk has 0.0 GB free" in log(tmp_path, job)
    assert f"partition main has no nodes for job {job}, which wants 2, but n2: mend them" in log(tmp_path, job)
    assert notes() == []
