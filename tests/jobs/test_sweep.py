"""Sweeps: what their members are called, and the jobs that they become. On a real Slurm: test_slurm_train.py."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from made.cache import make_cache
from made.slurm_run import SMALL, TRAIN
from made.swept import jobs_of_sweeps
from pipeline import cli
from pipeline.errors import SubmitError
from pipeline.jobs import members, sweep, waiting
from pipeline.jobs.sweep_on_slurm import in_shell
from pipeline.runs import directory
from pipeline.runs.holder import State, holder_bytes
from pipeline.runs.lease import Lease, newest, this_process
from pipeline.scheduler import slurm
from pipeline.storage.urls import open_storage


def test_a_job_of_many_swept_keys_gets_a_folder_that_file_systems_take_and_another_than_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of_sweeps(monkeypatch)
    monkeypatch.setattr(members, "LONGEST", 60)
    words = [f"run={tmp_path}/s", "data.train=c", "optim.lr=1e-3,2e-3", "optim.warmup=choice(16)"]
    words += ["ema.half_life=choice(200)", "checkpoint.every=choice(64)", "checkpoint.keep=choice(5)"]
    assert sweep.sweep("train", words) == 0
    runs = {word.removeprefix(f"run={tmp_path}/s/") for job in jobs for word in job if word.startswith("run=")}
    assert len(jobs) == len(runs) == 2
    assert all(run.startswith("optim.lr=0.00") and len(run) <= 60 for run in runs)
    assert "checkpoint.keep=5" in capsys.readouterr().out  # the whole name is said
    assert list(tmp_path.iterdir()) == []  # and nothing is left beside the runs


def test_values_that_would_share_a_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "-m", f"run={tmp_path}/s", "data.train=c", "optim.lr=1e-3,0.001"]) == 1
    assert "the sweep has optim.lr=0.001 twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ended", "status"), [(130, 130), (75, 75), (128 + signal.SIGTERM, 75), (128 + signal.SIGUSR1, 75)]
)
def test_a_sweep_whose_member_is_told_to_stop_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: int, status: int
) -> None:
    begun: list[Sequence[str]] = []

    def run_command(command: Sequence[str], words: bytes) -> int:
        begun.append(command)
        return ended

    monkeypatch.setattr(sweep, "run_command", run_command)
    assert cli.main(["train", "-m", f"run={tmp_path}/s", "data.train=c", "optim.lr=1e-3,2e-3"]) == status
    assert len(begun) == 1


# --------------------------------------------------------------------------------------------------------------------
# On Slurm


class Stub:
    """Stands in for Slurm's commands. states: what Slurm says next of each job, at each question a step on. asked: what
    happens when the command looks whether jobs have ended. sending: when it has submitted one."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.queue: list[str] = []
        self.cancelled: list[str] = []
        self.states: dict[str, list[str | None]] = {}
        self.refuses_after = 1000
        self.asked: Callable[[], object] = lambda: None
        self.sending: Callable[[], object] = lambda: None

    def send(self, text: str, *options: str) -> str:
        assert not options
        if len(self.sent) == self.refuses_after:
            raise SubmitError("Slurm refused the job: QOSMaxSubmitJobPerUserLimit")
        self.sent.append(text)
        self.sending()
        return str(100 + len(self.sent))

    def answers(self, jobs: Sequence[str]) -> dict[str, str]:
        self.asked()
        return {job: state for job in jobs if (state := self.of(job)) is not None}

    def of(self, job: str) -> str | None:
        states = self.states.get(job, ["PENDING"])
        return states.pop(0) if len(states) > 1 else states[0]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    stub = Stub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(waiting, "SHORTEST", 0.0)
    for command, value in {
        "is_here": lambda: True,
        "check": lambda text, partition, time: "Job 1 to start now",
        "send": stub.send,
        "states": stub.answers,
        "job_state": stub.of,
        "in_queue": lambda names: [name for name in stub.queue if name in names],
        "cluster_name": lambda: "here",
        "cancel": lambda *jobs: stub.cancelled.extend(jobs),
    }.items():
        monkeypatch.setattr(slurm, command, value)
    return stub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "cache"
    make_cache(str(folder), [8, 8])
    return str(folder)


@pytest.fixture
def words(cache: str, tmp_path: Path) -> list[str]:
    return [*TRAIN, *SMALL, "nodes=2", f"data.train={cache}", f"run={tmp_path}/s", "optim.lr=1e-3,2e-3,4e-3"]


LRS = ["optim.lr=0.001", "optim.lr=0.002", "optim.lr=0.004"]


def scripts(printed: str) -> list[str]:
    return [f"#!/bin/bash\n{text}" for text in re.sub(r"(?m)^# == .*\n", "", printed).split("#!/bin/bash\n")[1:]]


def test_a_member_is_the_job_that_submit_makes_of_the_same_words_on_any_number_of_nodes(
    words: list[str],
    cache: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)  # without Slurm
    words += ["cluster.python=/opt/python", "init=${oc.env:NOWHERE,}"]
    words += ["cluster.partition=a100,h100", "cluster.options=--exclude=n1,n2", "cluster.setup=export A=1,2"]
    assert cli.main(["train", "-m", *words, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert re.findall(r"(?m)^# == (.*)$", printed.out) == LRS
    swept = scripts(printed.out)
    cluster = [word for word in words if word.startswith(("cluster.", "nodes="))]
    others = [word for word in words if word not in cluster and not word.startswith("run=")]
    for member, script in zip(members.members_of("train", "run", f"{tmp_path}/s", others), swept, strict=True):
        assert f"run={tmp_path}/s/{member.name}" in member.words
        assert cli.main(["submit", "train", *member.words, *cluster, "--dry-run"]) == 0
        assert script.rstrip("\n") == capsys.readouterr().out.rstrip("\n")
        assert "#SBATCH --nodes=2\n" in script and "srun --ntasks=2 --ntasks-per-node=1" in script
        assert "scontrol requeue" in script and "pipeline.jobs.nodes words 2 0 train" in script
        assert "/opt/python -P -m pipeline.cli train" in script and "${oc.env:NOWHERE,}" in script
        assert "#SBATCH --partition=a100,h100\n#" in script and "#SBATCH --exclude=n1,n2\n" in script
        assert "\nexport A=1,2\n" in script
    assert "optim.lr=0.001: 2 nodes x 1 = 2 ranks" in printed.err
    assert printed.err.count("2 nodes x 1 = 2 ranks") == 1  # what is the same of the next is not said again
    assert not (tmp_path / "s").exists()


def test_a_bound_on_jobs_at_a_time_is_as_many_names_of_which_slurm_runs_one_job_each(
    stub: Stub, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "-m", *words, "cluster.concurrent=2", "--no-wait"]) == 0
    names = [re.findall(r"--job-name=(\S+)", text)[0] for text in stub.sent]
    assert all("#SBATCH --dependency=singleton\n" in text for text in stub.sent)
    assert names[0] == names[2] != names[1]
    # What an earlier command has left in the queue counts, so that the others do not wait behind it.
    stub.queue, stub.sent = [names[0], names[0], "another"], []
    again = [word.replace("optim.lr=", "optim.lr=5e-3,").replace(",1e-3,2e-3,4e-3", ",6e-3") for word in words]
    assert cli.main(["train", "-m", *again, "cluster.concurrent=2", "--no-wait"]) == 0
    assert [re.findall(r"--job-name=(\S+)", text)[0] for text in stub.sent] == [names[1], names[1]]
    capsys.readouterr()
    option = "cluster.options=--dependency=afterok:3"
    assert cli.main(["train", "-m", *words, f"run={tmp_path}/t", "cluster.concurrent=2", option]) == 1
    assert "leave --dependency out of cluster.options" in capsys.readouterr().err


def test_a_member_that_is_refused_is_named_and_nothing_is_submitted(
    stub: Stub, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "-m", *words, "model.context_width=8,16"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "train: model.context_width=16,optim.lr=0.001: " in line and "(nothing of the sweep was submitted)" in line
    assert stub.sent == []


def test_what_is_finished_or_trained_already_is_passed_over_and_the_rest_goes_on(
    stub: Stub,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directory, "is_finished", lambda config, run: config.run.endswith(LRS[0]))
    with Lease.take(open_storage(f"{tmp_path}/s/{LRS[1]}")):
        assert cli.main(["train", "-m", *words, "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert f"# == {LRS[0]}: finished\n# == {LRS[1]}: {tmp_path}" in printed and len(scripts(printed)) == 1
        assert cli.main(["train", "-m", *words, "--no-wait"]) == 0
    printed = capsys.readouterr().out
    assert f"== {LRS[0]}: finished\n" in printed
    assert re.search(rf"== {LRS[1]}: .* is being trained by process \d+ on ", printed)
    assert f"== {LRS[2]}: job 101\n" in printed and len(stub.sent) == 1
    assert f"latentmill status {tmp_path}/s\n" in printed
    _, holder = newest(open_storage(f"{tmp_path}/s/{LRS[2]}"))
    assert holder is not None and (holder.state, holder.job) == ("queued", "101")  # its lease is reserved


def test_the_same_command_goes_on_where_slurm_refused_one(
    stub: Stub, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stub.refuses_after = 2
    assert cli.main(["train", "-m", *words]) == 1
    assert f"{LRS[2]}: Slurm refused the job: QOSMaxSubmit" in (said := capsys.readouterr().err)
    assert "2 jobs of the sweep are in the queue" in said
    stub.refuses_after = 1000
    assert cli.main(["submit", "train", "-m", *words]) == 0  # the same, but for the waiting
    printed = capsys.readouterr().out
    assert f"{LRS[0]} is waiting in the queue as Slurm job 101" in printed and f"== {LRS[2]}: job 103\n" in printed
    assert "scancel 101 102 103;" in printed


def ends(tmp_path: Path, number: int, state: State, message: str = "") -> None:
    """Have the process of a member end."""
    holder = replace(this_process(), job=f"{101 + number}", cluster="here", state=state, message=message)
    open_storage(f"{tmp_path}/s/{LRS[number]}").put("lease/000002.json", holder_bytes(holder))


def test_the_command_waits_for_all_and_says_how_each_has_ended(
    stub: Stub, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first goes back to the queue meanwhile."""
    stub.states = {"101": ["RUNNING", "PENDING", "RUNNING", "COMPLETED"], "102": ["FAILED"], "103": ["RUNNING", ""]}

    def asked() -> None:
        ends(tmp_path, 0, "finished")
        ends(tmp_path, 1, "failed", "a latent is NaN")
        ends(tmp_path, 2, "finished")

    stub.asked = asked
    assert cli.main(["train", "-m", *words]) == 1
    printed = capsys.readouterr()
    ended = re.findall(r"(?m)^== (.*) \(job \d+\)$", printed.out)
    assert ended == [f"{LRS[1]}: failed: a latent is NaN", f"{LRS[2]}: finished", f"{LRS[0]}: finished"]
    assert f"1 of the sweep's jobs failed: {LRS[1]}" in printed.err


@pytest.mark.parametrize(
    ("state", "slurms", "status", "said"),
    [
        ("stopped", "CANCELLED", 75, "stopped with everything committed; Slurm says CANCELLED"),
        ("queued", "CANCELLED", 75, "never begun; Slurm says CANCELLED"),
        ("queued", "", 75, "never begun; Slurm does not know its job any more"),
        ("held", "CANCELLED", 75, "cancelled with work left; Slurm says CANCELLED"),
        ("queued", "FAILED", 1, "failed without a word; Slurm says FAILED"),
        ("held", "OUT_OF_MEMORY", 1, "failed without a word; Slurm says OUT_OF_MEMORY"),
        ("held", "", 1, "failed without a word; Slurm does not know its job any more"),
    ],
)
def test_what_has_work_left_ends_the_command_with_75_and_what_has_failed_with_1(
    stub: Stub,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: State,
    slurms: str,
    status: int,
    said: str,
) -> None:
    one = [word.replace("1e-3,2e-3,4e-3", "choice(1e-3)") for word in words]
    stub.states = {"101": ["RUNNING", slurms]}
    stub.asked = partial(ends, tmp_path, 0, state)
    assert cli.main(["train", "-m", *one]) == status
    printed = capsys.readouterr().out
    assert f"== {LRS[0]}: {said}" in printed
    assert (f"({tmp_path}/slurm-logs/*-101.log says more)" in printed) == (status == 1)


def test_ctrl_c_leaves_the_jobs_and_the_same_command_waits_for_them_again(
    stub: Stub, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c() -> None:
        raise KeyboardInterrupt

    stub.asked = ctrl_c
    assert cli.main(["train", "-m", *words]) == 130
    assert f"the jobs stay with Slurm: latentmill status {tmp_path}/s shows their runs" in capsys.readouterr().err
    stub.states = {job: ["PENDING", "RUNNING", "COMPLETED"] for job in ("101", "102", "103")}

    def asked() -> None:
        for number in range(3):
            ends(tmp_path, number, "finished")

    stub.asked = asked
    assert cli.main(["train", "-m", *words]) == 0
    assert len(stub.sent) == 3
    assert capsys.readouterr().out.count(": finished (job ") == 3


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["train", "-m", "run=r", "--dry-run"], "--dry-run is for sweeps on Slurm (cluster=NAME): this one runs here"),
        (["synth", "-m", "dest=d", "cluster=a100"], "cluster= with -m is for train and autoencoder"),
        (["submit", "encode", "-m"], "-m: submit takes one configuration at a time, but for train and autoencoder"),
        (["train", "-m", "run=r", "nodes=1,2"], "nodes=1,2: the jobs of a sweep share one cluster"),
        (["train", "-m", "run=r", "cluster=a100,b"], "cluster=a100,b: the jobs of a sweep share one cluster"),
        (["train", "-m", "run=r", "cluster.requeue=true,false"], "cluster.requeue=true,false: the jobs of a sweep"),
    ],
)
def test_what_a_sweep_cannot_be_is_refused(
    stub: Stub, command: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "seed=1,2"]) == 1
    assert reason in capsys.readouterr().err


def test_a_member_that_another_process_takes_meanwhile_is_passed_over_and_its_job_is_cancelled(
    stub: Stub, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Lease] = []

    def sending() -> None:
        if len(stub.sent) == 2:
            taken.append(Lease.take(open_storage(f"{tmp_path}/s/{LRS[1]}")))

    stub.sending = sending
    assert cli.main(["train", "-m", *words, "--no-wait"]) == 0
    taken[0].release("stopped")
    printed = capsys.readouterr().out
    assert re.search(rf"== {LRS[1]}: .* is being trained by process \d+ on .* UTC\n", printed)
    assert "scancel 101 103;" in printed and stub.cancelled == ["102"]


def test_ctrl_c_while_jobs_are_submitted_leaves_none_without_its_lease(
    stub: Stub,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cluster_name() -> str:  # asked for the lease
        if len(stub.sent) == 2:
            raise KeyboardInterrupt
        return "here"

    monkeypatch.setattr(slurm, "cluster_name", cluster_name)
    assert cli.main(["train", "-m", *words]) == 130
    assert f"the jobs stay with Slurm: latentmill status {tmp_path}/s shows" in capsys.readouterr().err
    assert stub.cancelled == ["102"]
    holders = [newest(open_storage(f"{tmp_path}/s/{lr}"))[1] for lr in LRS]
    assert [holder.job if holder else "" for holder in holders] == ["101", "", ""]


def test_sigterm_while_the_command_waits_ends_it_with_75_and_leaves_the_jobs(
    stub: Stub, words: list[str], tmp_path: Path
) -> None:
    stub.asked = lambda: os.kill(os.getpid(), signal.SIGTERM)
    child = os.fork()
    if child == 0:
        try:
            cli.main(["train", "-m", *words])  # the signal ends the process
        finally:
            os._exit(len(stub.cancelled) + 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    _, holder = newest(open_storage(f"{tmp_path}/s/{LRS[2]}"))
    assert holder is not None and (holder.state, holder.job) == ("queued", "103")


def test_a_slurm_that_does_not_answer_is_said_once_each_time_and_waited_for(
    stub: Stub, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [word.replace("1e-3,2e-3,4e-3", "choice(1e-3)") for word in words]
    stub.states = {"101": ["RUNNING", None, None, "RUNNING", None, "COMPLETED"]}
    stub.asked = partial(ends, tmp_path, 0, "finished")
    assert cli.main(["train", "-m", *one]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("Slurm does not answer; the waiting goes on") == 2
    assert f"== {LRS[0]}: finished (job 101)\n" in printed.out


def test_what_to_follow_is_said_as_a_shell_takes_it(
    stub: Stub,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path / "of mine"))
    assert cli.main(["train", "-m", *words, "run=${oc.env:PLACE}/s", "cluster.logs=the logs", "--no-wait"]) == 0
    printed = capsys.readouterr().out
    assert 'latentmill status "${PLACE}/s"\n' in printed
    assert f"logs:      '{tmp_path}/the logs'/*-JOB.log\n" in printed
    assert in_shell("it's") == """'it'"'"'s'""" and in_shell('${oc.env:A}"`$x') == '"${A}\\"\\`\\$x"'
    assert in_shell("${oc.env:A,b}/c") == "FOLDER"
