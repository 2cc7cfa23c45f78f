"""`latentmill submit` on a machine without Slurm: what is refused, and the script that a dry run prints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.errors import ConfigError
from pipeline.sbatch import directive, inherited, limit_seconds

REPOSITORY = Path(__file__).resolve().parent.parent


def refusal(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """The one line that a `latentmill submit` ends with."""
    assert cli.main(["submit", *words]) == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.fixture
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ([], 2, "which verb is to be submitted? latentmill submit encode"),
        (["encoed", "source=a"], 2, "encoed: which verb"),
        (["verify", "dataset=a"], 1, "verify cannot be submitted: submit knows encode, train, eval"),
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
    said = capsys.readouterr()
    array, finalize = said.out.split("# Then, when every task of the job above has ended:\n")
    for line in ("--partition=a100", "--gres=gpu:a100:4", "--ntasks=4", "--qos=high", "--mem=9G", "--array=0-15%8"):
        assert f"#SBATCH {line}\n" in array
    assert "--mem=480G" not in array
    assert "    device=cuda || status=$?\n" in array
    assert "#SBATCH --partition=a100\n" in finalize
    assert "gpu" not in finalize
    assert "    finalize=true || status=$?\n" in finalize
    assert "not checked by Slurm" in said.err


def test_a_device_that_is_given_is_kept(without_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "encode", "source=a", "dest=b", "device=auto", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("device=") == 2  # the array's and the finalizing job's


def test_a_scripts_shell_is_sound(without_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "encode", "source='", "dest=$(", "cluster=a100", "--dry-run"]) == 0
    static = (REPOSITORY / "slurm" / "encode.sbatch").read_text()
    for text in (capsys.readouterr().out, static):
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


def test_submitting_imports_nothing_heavy() -> None:
    """A login node has little memory and no GPU."""
    code = "import sys; from pipeline import cli; cli.main(['submit', 'encode', 'source=a', 'dest=b', '--dry-run']);"
    code += "print(sorted({'torch', 'numpy', 'boto3', 'PIL', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n"), done.stderr
