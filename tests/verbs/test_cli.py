"""The command line: its statuses, its messages, its speed."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from made.swept import jobs_of_sweeps
from pipeline import cli
from pipeline.config import CONFIGS, SynthConfig
from pipeline.errors import Interrupted, ShardCorrupt
from pipeline.jobs import sweep
from pipeline.verbs import TAKES_PATHS, VERBS


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for preprocess.synthetic whose main a test sets."""
    module = types.ModuleType("preprocess.synthetic")
    monkeypatch.setitem(sys.modules, "preprocess.synthetic", module)
    return module


def test_every_verb_of_the_table_has_a_configuration_or_takes_paths() -> None:
    assert set(VERBS) == set(CONFIGS) | set(TAKES_PATHS)


def test_a_verb_gets_its_configuration_and_ends_with_0(verb: types.ModuleType) -> None:
    got: list[SynthConfig] = []
    verb.main = got.append  # type: ignore[attr-defined]
    assert cli.main(["synth", "dest=out", "images=7"]) == 0
    assert got == [SynthConfig(dest="out", images=7)]


@pytest.mark.parametrize(("error", "status"), [(ShardCorrupt("a.tar is cut\nat 3"), 1), (Interrupted("at 9"), 75)])
def test_an_error_is_one_line_and_its_status(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def fail(_: SynthConfig) -> None:
        raise error

    verb.main = fail  # type: ignore[attr-defined]
    assert cli.main(["synth", "dest=out"]) == status
    printed = capsys.readouterr()
    assert printed.err == f"latentmill synth: {' '.join(str(error).split())}\n"
    assert printed.out == ""


def test_debug_shows_the_traceback(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: SynthConfig) -> None:
        raise ShardCorrupt("a.tar is cut")

    verb.main = fail  # type: ignore[attr-defined]
    monkeypatch.setenv("LATENTMILL_DEBUG", "1")
    assert cli.main(["synth", "dest=out"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_programmers_mistake_keeps_its_traceback(verb: types.ModuleType) -> None:
    def fail(_: SynthConfig) -> None:
        raise AssertionError

    verb.main = fail  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        cli.main(["synth", "dest=out"])


def test_ctrl_c_is_one_line_and_130(verb: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: SynthConfig) -> None:
        raise KeyboardInterrupt

    verb.main = stop  # type: ignore[attr-defined]
    assert cli.main(["synth", "dest=out"]) == 130
    assert capsys.readouterr().err == "latentmill synth: stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["trian"], 2, "trian: no such verb; did you mean train?"),
        (["xyzzy"], 2, "there are synth, convert, encode"),
        (["synth", "nonsense"], 2, "'nonsense' is not KEY=VALUE"),
        (["synth", "dest=out", "imags=3"], 1, "did you mean images?"),
        (["synth", "dest=out", "images=many"], 1, "images=many: a whole number is wanted"),
        (["synth"], 1, "dest is missing"),
        (["train", "-m", "data.train=c", "optim.lr=1,2"], 1, "run is missing"),
        (["train", "-m", "data.train=c", "run=r"], 1, "none is given"),
        (["verify", "-m", "dataset=c", "samples=1,2"], 1, "-m sweeps train"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    assert cli.main(arguments) == status
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {verb} " in printed for verb in VERBS)


def test_no_verb_at_all_shows_the_help_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: latentmill VERB" in capsys.readouterr().out


@pytest.mark.parametrize("verb_name", sorted(VERBS))
def test_a_verbs_help_names_its_keys_with_defaults(verb_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb_name, "--help"]) == 0
    printed = capsys.readouterr().out
    if verb_name == "train":
        assert "\n  optim.lr=0.0001  (> 0)\n      Peak learning rate.\n" in printed
        assert "\n  resume=auto  {auto,must,never}\n" in printed
        assert "\n  model={ldm4_class," in printed and "sd1,sd2,sdxl,small,tiny}\n" in printed
        assert "\n  init=\n      Weights that the UNet begins with: a run" in printed
        assert "\n  run=...  (must be given)\n" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_ranks_name_themselves_in_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.main(["synth"]) == 1
    assert capsys.readouterr().err.startswith("latentmill synth [rank 3]: dest is missing")


def test_the_command_line_imports_nothing_heavy() -> None:
    rooms = "cli, config.loading.load, storage.local, distributed.ranks, tracking.progress"
    code = f"import sys, {', '.join(f'pipeline.{room}' for room in rooms.split(', '))};"
    code += "print(sorted({'torch', 'numpy', 'boto3', 'hydra', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_into_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_a_sweep_runs_each_job_in_its_own_folder(tmp_path: Path) -> None:
    root = tmp_path / "it's a sweep"
    command = ["synth", "-m", f"dest={root}", "images=3,4", "split=val", "shard_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in root.glob("*/*.tar")} == {"images=3", "images=4"}
    assert len(list((root / "images=3").glob("*.tar"))) == 2


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of the jobs that sweeps would run here."""
    return jobs_of_sweeps(monkeypatch)


def test_training_runs_of_a_sweep_are_one_group_of_wandbs(
    jobs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    for extra, group in (([], ["lrs"]), (["tracking.group=mine"], ["mine"])):
        words = [f"run={tmp_path}/lrs", "data.train=c", "optim.lr=1e-3,2e-3", *extra]
        assert sweep.sweep("train", words) == 0
        assert len(jobs) == 2
        for job in jobs:
            assert [word.partition("=")[2] for word in job if word.startswith("tracking.group=")] == group
        jobs.clear()


def test_a_sweep_with_a_failing_job_runs_the_others_and_names_it(tmp_path: Path) -> None:
    command = ["synth", "-m", f"dest={tmp_path / 'sweep'}", "images=0,3", "shard_size=3"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "1 of the sweep's jobs failed: images=0" in done.stderr
    assert (tmp_path / "sweep" / "images=3" / "00000.tar").exists()


def test_encode_waits_passively_for_its_threads_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its decoding workers need the cores on which OpenMP's threads would spin."""
    for setting, expected in (("", "passive"), ("active", "active")):
        monkeypatch.setenv("OMP_WAIT_POLICY", "before")
        monkeypatch.delenv("OMP_WAIT_POLICY")
        if setting:
            monkeypatch.setenv("OMP_WAIT_POLICY", setting)
        assert cli.main(["encode", "--help"]) == 0
        assert os.environ["OMP_WAIT_POLICY"] == expected


def test_pictures_of_a_sweep_have_names_of_pictures(jobs: list[list[str]], tmp_path: Path) -> None:
    assert sweep.sweep("sample", [f"dest={tmp_path}/pictures", "run=r", "prompt=a", "sampler.steps=1,2"]) == 0
    assert [job[-1] for job in jobs] == [f"dest={tmp_path}/pictures/sampler.steps={steps}.png" for steps in (1, 2)]
