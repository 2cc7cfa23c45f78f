"""`latentmill submit` on a machine without Slurm: what is refused, and the script that a dry run prints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from made.cache import WIDTH, make_cache
from made.places import REPOSITORY
from made.refusal import refusal
from pipeline import cli
from pipeline.config.values.times import limit_seconds
from pipeline.distributed.meeting import Meeting, first_host, meeting_of
from pipeline.distributed.place import adopt_step
from pipeline.errors import ConfigError
from pipeline.runs.lease import Lease
from pipeline.scheduler.script import directive
from pipeline.scheduler.slurm import inherited
from pipeline.storage.urls import open_storage


@pytest.fixture
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ([], 2, "which verb is to be submitted? latentmill submit encode"),
        (["encoed", "source=a"], 2, "encoed: which verb"),
        (["verify", "dataset=a"], 1, "cannot be submitted: submit knows encode, train, autoencoder, eval, reconstruct"),
        (["train", "run=r"], 1, "data.train is missing"),
        (["encode"], 1, "source is missing"),
        (["encode", "source=a", "dest=b", "imags=3"], 1, "imags: no such key"),
        (["encode", "source=a", "dest=b", "--force"], 2, "'--force' is not KEY=VALUE"),
        (["encode", "source=a", "dest=b", "batch=1,2"], 2, "several values are a sweep"),
        (["encode", "-m", "source=a", "dest=b", "batch=1,2"], 1, "one configuration at a time"),
        (["encode", "source=a", "dest=b", "cluster=h100"], 1, "no such cluster; there are a100, default"),
        (["encode", "source=a", "dest=b", "cluster.tims=3"], 1, "did you mean cluster.time?"),
        (["encode", "source=a", "dest=b", "cluster.time=4h"], 1, "cluster.time=4h: a limit such as"),
        (["encode", "source=a", "dest=b", "cluster.time=2"], 1, "cluster.signal=120: that many seconds before"),
        (["encode", "source=a", "dest=b", "cluster.mem=64GB"], 1, "cluster.mem=64GB: a number with K, M, G or T"),
        (["encode", "source=a", "dest=b", "cluster.tasks=0"], 1, "cluster.tasks=0: 1 or more"),
        (["encode", "source=a", "dest=b", "cluster.logs=s3://b/logs"], 1, "to a folder, not to a URL"),
        (["encode", "source=a", "dest=b", "cluster.options=-q high"], 1, "a long option of sbatch is wanted"),
        (["encode", "source=a", "dest=b", "cluster.account=a\n#SBATCH --uid=0"], 1, "control character"),
        (["encode", "source=a", "dest=b", "finalize=true"], 1, "finalize=true needs no array"),
        (["encode", "source=a", "dest=b", "dry_run=true"], 1, "dry_run=true needs no array"),
        (
            ["encode", "source=a", "dest=b", "launch.processes=2", "cluster.processes=2"],
            1,
            "leave launch.processes out",
        ),
        (["encode", "source=a", "dest=b"], 1, "sbatch is not on this machine's PATH: submit from the cluster's login"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_anything_is_submitted(
    without_slurm: None, capsys: pytest.CaptureFixture[str], words: list[str], status: int, reason: str
) -> None:
    assert reason in refusal(capsys, status, *words)


def test_a_dry_run_needs_no_slurm(without_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["source=a", "dest=b", "cluster=a100", "cluster.options=--qos=high", "cluster.options=--mem=9G"]
    assert cli.main(["submit", "encode", *words, "--dry-run"]) == 0
    printed = capsys.readouterr()
    array, finalize = printed.out.split("# Then, when every task of the job above has ended:\n")
    for line in ("--partition=a100", "--gres=gpu:a100:4", "--ntasks=4", "--qos=high", "--mem=9G", "--array=0-15%8"):
        assert f"#SBATCH {line}\n" in array
    assert "--mem=480G" not in array
    assert "    device=cuda || status=$?\n" in array
    assert "#SBATCH --partition=a100\n" in finalize
    assert "gpu" not in finalize
    assert "    finalize=true || status=$?\n" in finalize
    assert "not checked by Slurm" in printed.err


def test_a_device_that_is_given_is_kept(without_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "encode", "source=a", "dest=b", "device=auto", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("device=") == 2  # the array's and the finalizing job's


def test_a_scripts_shell_is_sound(without_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["then", "train", "data.train=$(", "run='", "then", "eval", "run='"]
    assert cli.main(["submit", "encode", "source='", "dest=$(", "cluster=a100", *train, "--dry-run"]) == 0
    for text in (capsys.readouterr().out, *(path.read_text() for path in (REPOSITORY / "slurm").iterdir())):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("04:00:00", 14400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-00:00:01", 86401),
        ("0", float("inf")),
        ("infinite", float("inf")),
        ("4h", None),
        ("", None),
        ("1:2:3:4", None),
        ("-5", None),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text: str, seconds: float | None) -> None:
    assert limit_seconds(text) == seconds


def test_an_option_cannot_hold_a_second_line() -> None:
    assert directive("--account", "it's") == "#SBATCH --account='it'\"'\"'s'"
    with pytest.raises(ConfigError, match="control character"):
        directive("--account", "a\n#SBATCH --uid=0")


def test_jobs_do_not_inherit_the_place_of_who_submits_them() -> None:
    environment = {"RANK": "1", "SLURM_PROCID": "3", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "a", "HOME": "/h"}
    assert inherited(environment) == {"SLURM_CONF": "/c", "SBATCH_ACCOUNT": "a", "HOME": "/h"}


def test_submitting_imports_nothing_heavy(cache: str, tmp_path: Path) -> None:
    """A login node has little memory and no GPU."""
    for words, heavy in (
        (["encode", "source=a", "dest=b"], {"torch", "numpy", "boto3", "PIL", "deepspeed"}),
        (["train", *TRAIN, f"data.train={cache}", f"run={tmp_path}/run"], {"torch", "boto3", "PIL", "deepspeed"}),
        (["reconstruct", f"dataset={cache}", f"dest={tmp_path}/figures"], {"torch", "boto3", "PIL", "deepspeed"}),
    ):
        code = f"import sys; from pipeline import cli; cli.main(['submit', *{words}, '--dry-run']);"
        code += f"print(sorted({heavy} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.endswith("[]\n"), done.stderr


# --------------------------------------------------------------------------------------------------------------------
# Training


TRAIN = [
    "model.channels=8",
    "model.multipliers=[1]",
    "model.blocks=1",
    "model.attention=[1]",
    "model.heads=2",
    "model.norm_groups=4",
    f"model.context_width={WIDTH}",
    "optim.batch=48",
    "deepspeed=zero2",
    "samples=960",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "cache"
    make_cache(str(folder), [8, 8])
    return str(folder)


@pytest.fixture
def train(cache: str, tmp_path: Path) -> list[str]:
    return ["train", *TRAIN, f"data.train={cache}", f"run={tmp_path}/run"]


def test_training_is_one_task_a_rank_and_the_script_says_how_the_batch_is_shared(
    without_slurm: None, capsys: pytest.CaptureFixture[str], train: list[str], tmp_path: Path
) -> None:
    words = [*train, "cluster=a100", "nodes=3", "cluster.time=1-00", "optim.micro_batch=2", "--dry-run"]
    assert cli.main(["submit", *words]) == 0
    printed = capsys.readouterr()
    for line in (
        "--nodes=3",
        "--ntasks-per-node=4",
        "--cpus-per-task=16",
        "--mem=480G",
        "--gres=gpu:a100:4",
        "--time=1-00",
        "--signal=USR1@120",
        "--requeue",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}\n" in printed.out
    assert "srun --ntasks=12 --ntasks-per-node=4 --cpus-per-task=16 --kill-on-bad-exit=0 --wait=120 \\\n" in printed.out
    assert "    device=cuda \\\n    launch.threads=16 || status=$?\n" in printed.out
    assert 'if [ "$status" -eq 75 ] || [ "$status" -ge 128 ]; then scontrol requeue' in printed.out
    for note in ("3 nodes x 4 = 12 ranks; global batch 48 = 12 x 2 x 2 samples", "memory: 0 million parameters"):
        assert f"# {note}" in printed.out
        assert f"submit: {note}" in printed.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nodes=5"], "optim.batch=48 does not divide among 5 ranks; the nearest that does is 50"),
        (["nodes=2", "optim.micro_batch=16"], "optim.micro_batch=16 does not divide the 24 samples of a rank"),
        (["nodes=0"], "cluster.nodes=0: 1 or more"),
        (["nodes=2", "deepspeed=off"], "deepspeed.engine=torch trains in one process, and 2 are asked for"),
        (["launch.processes=2"], "launch.processes starts ranks on one machine: here cluster.nodes and"),
        (["cluster.gpus=2"], "cluster.gpus=2: a rank of training uses one GPU"),
        (["cluster.gpus=0", "device=cuda"], "device=cuda and cluster.gpus=0 contradict each other"),
        (["data.train=nowhere"], "nowhere"),
        (["model.context_width=16"], "holds text states of width 8, but model.context_width=16"),
        (["cluster.gpu_memory_gb=0.0001"], "GB of a GPU, and cluster.gpu_memory_gb=0.0001: lower optim.micro_batch"),
        (["resume=must"], "has no checkpoint to resume from"),
        (["cluster.gpu_memory_gb=-1"], "cluster.gpu_memory_gb=-1: 0 (not known) or more"),
        (["cluster.gpus=0"], "sbatch is not on this machine's PATH"),
    ],
)
def test_a_run_that_would_fail_at_its_start_is_refused_before_it_is_submitted(
    without_slurm: None, capsys: pytest.CaptureFixture[str], train: list[str], words: list[str], reason: str
) -> None:
    assert cli.main(["submit", *train, *words]) == 1
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_a_step_is_held_against_the_gpu(
    without_slurm: None, capsys: pytest.CaptureFixture[str], train: list[str]
) -> None:
    assert cli.main(["submit", *train, "cluster.gpu_memory_gb=80", "--dry-run"]) == 0
    assert "memory: that is 0% of the GPU's 80 GB\n" in capsys.readouterr().err
    assert cli.main(["submit", *train, "--dry-run"]) == 0
    assert "memory: not held against the GPU's, which cluster.gpu_memory_gb would say" in capsys.readouterr().err


def test_a_run_that_is_trained_here_is_not_submitted(
    without_slurm: None, capsys: pytest.CaptureFixture[str], train: list[str], tmp_path: Path
) -> None:
    with Lease.take(open_storage(f"{tmp_path}/run")):
        assert "one run is trained once at a time" in refusal(capsys, 1, *train, "--dry-run")
    assert cli.main(["submit", *train, "--dry-run"]) == 0


def test_a_chain_checks_each_verb_and_what_is_still_to_be_made_may_be_missing(
    without_slurm: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Keys of the cluster hold for the verbs that follow, too, until they are given anew."""
    encode = ["encode", "source=a", "dest=b", "cluster=a100", "cluster.tasks=3", "cluster.time=02:00:00"]
    chain = ["then", "train", "data.train=b", f"run={tmp_path}/r", "nodes=2", "cluster.time=3-00"]
    chain += ["then", "eval", f"run={tmp_path}/r", "images=10"]
    assert cli.main(["submit", *encode, *chain, "--dry-run"]) == 0
    printed = capsys.readouterr()
    scripts = printed.out.split("#!/bin/bash\n")[1:]
    assert [script.count("\n# Then, when the job above has ended well:\n") for script in scripts] == [0, 1, 1, 0]
    array, _, train, evaluation = scripts
    for script, time, nodes, gres in (
        (array, "02:00:00", 1, "gpu:a100:4"),
        (train, "3-00", 2, "gpu:a100:4"),
        (evaluation, "3-00", 1, "gpu:a100:4"),
    ):
        assert f"#SBATCH --time={time}\n" in script
        assert f"#SBATCH --nodes={nodes}\n" in script
        assert f"#SBATCH --gres={gres}\n" in script
    assert "requeue" not in evaluation.split("#SBATCH --requeue")[1]
    assert "#SBATCH --ntasks=4\n" in evaluation and "launch.threads=16" in evaluation
    assert "--kill-on-bad-exit=1" in evaluation
    assert "memory: not looked at, because the dataset is not there yet" in printed.err
    assert "so it is not a dataset" in refusal(capsys, 1, "train", "data.train=b", f"run={tmp_path}/r", "--dry-run")
    assert "is not a run directory" in refusal(capsys, 1, "eval", f"run={tmp_path}/r", "--dry-run")
    words = ["eval", f"run={tmp_path}/r", "launch.processes=2", "--dry-run"]
    assert "here cluster.processes does" in refusal(capsys, 1, *words)
    assert "which verb is to be submitted?" in refusal(capsys, 2, *encode, "then")


def test_an_autoencoder_is_measured_in_a_job_of_one_process(
    without_slurm: None, capsys: pytest.CaptureFixture[str], cache: str, tmp_path: Path
) -> None:
    words = [f"dataset={cache}", "encoders=sd1", f"dest={tmp_path}/figures", "cluster=a100", "nodes=4"]
    assert cli.main(["submit", "reconstruct", *words, "--dry-run"]) == 0
    script = capsys.readouterr().out
    for line in ("--job-name=latentmill-reconstruct", "--nodes=1", "--ntasks=1", "--gres=gpu:a100:1"):
        assert f"#SBATCH {line}\n" in script
    assert " reconstruct \\\n" in script and "    encoders=sd1 \\\n" in script
    assert "    device=cuda || status=$?\n" in script and "nodes=4" not in script
    assert "scontrol requeue" not in script and "--signal" not in script
    assert not (tmp_path / "figures").exists()


def test_a_reconstruction_that_would_fail_at_its_start_is_refused_unless_its_cache_is_still_to_come(
    without_slurm: None, capsys: pytest.CaptureFixture[str], cache: str, tmp_path: Path
) -> None:
    words = ["reconstruct", "dataset=b", f"dest={tmp_path}/figures"]
    assert "so it is not a dataset" in refusal(capsys, 1, *words, "--dry-run")
    assert "dest is missing" in refusal(capsys, 1, "reconstruct", f"dataset={cache}", "--dry-run")
    bad = ["reconstruct", f"dataset={cache}", f"dest={tmp_path}/figures", "images=1", "--dry-run"]
    assert "images=1: 2 or more is wanted" in refusal(capsys, 1, *bad)
    chain = ["encode", "source=a", "dest=b", "stored=pixels", "then", *words, "device=cpu"]
    assert cli.main(["submit", *chain, "--dry-run"]) == 0
    reconstruct = capsys.readouterr().out.split("#!/bin/bash\n")[-1]
    assert "    device=cpu || status=$?\n" in reconstruct and reconstruct.count("device=") == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-07,9]-a,login", "gpu03-a"),
        ("a,b[1-2]", "a"),
        ("r[1-2]c[07,09]", "r1c07"),
    ],
)
def test_the_first_node_of_a_list_as_slurm_writes_it(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ranks_that_srun_starts_know_their_place_and_where_to_meet() -> None:
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "6",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        "SLURM_STEP_NODELIST": "n[4-6]",
        "SLURM_JOB_ID": "17",
    }
    environ = dict(step)
    adopt_step(environ)
    place = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert environ == {**step, **place}
    first = meeting_of(environ)
    assert (first.host, first.ports[:2], first.name) == ("n4", (20017, 21516), "17.0.0")
    same, later = {**step, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}, {**step, "SLURM_RESTART_COUNT": "1"}
    for task in (same, later):
        adopt_step(task)
    assert meeting_of(same) == first  # all alike, and elsewhere at each restart
    assert (meeting_of(later).ports[0], meeting_of(later).name) == (21026, "17.0.1")
    assert meeting_of({**environ, "MASTER_ADDR": "n9", "MASTER_PORT": "7"}) == Meeting("n9", (7,), "17.0.0")
    alone_in_step = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    alone_in_step |= {"SLURM_STEP_TASKS_PER_NODE": "1"}
    for alone in ({**step, **alone_in_step}, {"SLURM_PROCID": "0"}, {**step, "RANK": "1", "WORLD_SIZE": "12"}):
        unchanged = dict(alone)
        adopt_step(alone)
        assert alone == unchanged
