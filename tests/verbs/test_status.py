"""`latentmill status`: what runs do, and how they were left. What Slurm says of jobs is in test_slurm_train.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from made.lease import elsewhere, in_job
from pipeline import cli, train
from pipeline.runs.holder import holder_bytes
from pipeline.runs.lease import DEAD_SECONDS, Holder, Lease, this_process
from pipeline.status import runs_at, state_of, status, table
from pipeline.storage.urls import open_storage
from pipeline.tracking.terminal import duration
from ranks.faulty_run import BATCH, config_of, losses, make_cache, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: one is finished, one of the same is trained on by this process, one waits to begin."""
    folder = tmp_path_factory.mktemp("runs")
    cache = make_cache(folder / "cache")
    for name in ("done", "sweep/lr=1"):
        assert train.main(config_of(f"{folder}/{name}", cache, samples=4 * BATCH, every=2 * BATCH)) == 0
    open_storage(str(folder / "sweep/lr=2")).put("lease/000001.json", holder_bytes(in_job("7", state="queued")))
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """The cells of what `latentmill status` prints, without the headings."""
    assert cli.main(["status", *words]) == 0
    headings, *lines = capsys.readouterr().out.splitlines()
    assert re.split(" {2,}", headings.strip()) == [
        "run",
        "state",
        "samples",
        "images/s",
        "last commit",
        "restarts",
        "loss",
    ]
    return [re.split(" {2,}", line.strip()) for line in lines]


def test_a_finished_run_in_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "done")
    ((name, state, samples, speed, commit, restarts, loss),) = told(capsys, run)
    assert (name, state, samples, restarts) == (run, "finished", "32 of 32 (100.0%)", "0")
    assert float(speed.replace(",", "")) == pytest.approx(rows(run)[4 * BATCH]["images_per_s"], rel=0.01)
    assert re.fullmatch(r"32, (\d+ s|\d+ min) ago", commit)
    assert float(loss) == pytest.approx(losses(run)[4 * BATCH], abs=1e-4)


def test_a_run_that_is_trained_says_how_far_it_is_whatever_is_committed(folder: Path) -> None:
    run = str(folder / "sweep/lr=1")
    taken = Lease.take(open_storage(run), first=4 * BATCH)
    taken.progress = lambda: 4 * BATCH + 3
    taken._put(taken.holder)
    state = status(run)
    taken.release("finished")
    assert (state.samples, state.committed, state.restarts) == (4 * BATCH + 3, 4 * BATCH, 1)


def test_a_folder_of_runs_is_as_good_as_its_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, f"{folder}/done", f"{folder}/sweep/")
    assert [line[0] for line in lines] == [f"{folder}/done", f"{folder}/sweep/lr=1", f"{folder}/sweep/lr=2"]
    waiting = "waiting (Slurm job 7, which cannot be asked for here)"
    assert lines[2][1:] == [waiting, "0", "-", "none", "0", "-"]
    assert runs_at(str(folder / "sweep")) == [line[0] for line in lines[1:]]


@pytest.mark.parametrize(
    ("holder", "words"),
    [
        (lambda: None, "not being trained"),
        (lambda: this_process({}), f"training ({this_process({}).host})"),
        (elsewhere, "training (n9)"),
        (lambda: elsewhere(beat=elsewhere().beat - 300), "training (n9; silent for 5 min)"),
        (lambda: elsewhere(beat=elsewhere().beat - DEAD_SECONDS - 1), "dead (n9)"),
        (lambda: replace(this_process({}), started="1"), f"dead ({this_process({}).host})"),
        (lambda: in_job("7"), "training (Slurm job 7, n9)"),
        (
            lambda: in_job("7", state="stopped"),
            "stopped, to be continued (Slurm job 7, which cannot be asked for here)",
        ),
        (lambda: elsewhere(state="stopped"), "stopped; the same command goes on"),
        (lambda: elsewhere(state="failed", message="a latent is NaN"), "failed: a latent is NaN"),
    ],
)
def test_a_state_in_words(holder: Callable[[], Holder | None], words: str) -> None:
    assert state_of(holder()) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h"), (1e6, "11.6 d")]
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_looking_at_runs_imports_nothing_heavy(folder: Path) -> None:
    code = f"import sys; from pipeline import cli; cli.main(['status', '{folder}/done']);"
    code += "print(sorted({'torch', 'boto3', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n"), done.stderr


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path)]) == 1
    assert "no run at" in capsys.readouterr().err
    assert cli.main(["status"]) == 1
    assert "usage: latentmill status RUN" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Runs that cannot be read


def one_whole_of_many(folder: Path, tmp_path: Path) -> Path:
    """A folder of runs: one is whole, the others are damaged, each in a way of its own."""
    many = tmp_path / "many"
    shutil.copytree(folder / "done", many / "whole")
    nested, lease = (
        b"[" * 200_000,
        b'{"token": "t", "state": "failed", "message": "\\u001b]0;pwned\\u0007\\u001b[31mOWNED"}',
    )
    for name, (key, data) in {
        "garbage": ("config.yaml", b"\xff\x00\x1b[31m"),
        "newer": ("config.yaml", (folder / "done/config.yaml").read_bytes() + b"later: 1\n"),
        "cut-lease": ("lease/000001.json", b'{"token": "t'),
        "new-lease": ("lease/000001.json", b'{"token": "t", "state": "finished", "evil": 1}'),
        "escapes": ("lease/000001.json", lease),
        "rows": ("metrics.jsonl", nested + b'\n{"kind": "train"}\n{"n": "x", "kind": "train", "time": 1}\n'),
        "digit": ("lease/\u00b2\u00b2\u00b2.json", b"{}"),
        "stray": ("checkpoints/backup/commit.json", b"{}"),
        "tag": ("config.yaml", b"!!python/object/apply:os.system [id]"),
        "facts": ("run.json", nested),
        "huge": ("checkpoints/99999999999999999999/commit.json", b"{}"),
    }.items():
        shutil.copytree(folder / "done", many / name)
        shutil.rmtree(many / name / "checkpoints")
        shutil.rmtree(many / name / "lease")
        open_storage(str(many / name)).put(key, data)
    return many


def test_a_run_that_cannot_be_read_gets_a_line_of_its_own_and_hides_no_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = one_whole_of_many(folder, tmp_path)
    lines = {Path(line[0]).name: line for line in told(capsys, str(many))}
    assert sorted(lines) == sorted(path.name for path in many.iterdir())
    assert lines["whole"][1:3] == ["finished", "32 of 32 (100.0%)"]
    assert "config.yaml: it is not UTF-8" in lines["garbage"][1]
    assert "config.yaml: line 1 holds the tag" in lines["tag"][1]
    assert lines["newer"][1] == "not being trained"
    assert "000001.json is no lease that can be read" in lines["cut-lease"][1]
    assert lines["new-lease"][1] == "finished"
    assert lines["escapes"][1].startswith(r"failed: \x1b]0;pwned\x07\x1b[31mOWNED")
    assert lines["rows"][1:3] == ["not being trained", "0 of 32 (0.0%)"]
    assert [lines[name][1] for name in ("digit", "stray", "huge", "facts")] == ["not being trained"] * 4


def test_status_ends_with_1_where_no_run_can_be_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = one_whole_of_many(folder, tmp_path)
    assert cli.main(["status", str(many / "garbage")]) == 1
    assert f"{many}/garbage/config.yaml: it is not UTF-8" in capsys.readouterr().out
    assert cli.main(["status", str(many / "nothing")]) == 1
    assert "no run at" in capsys.readouterr().err
    assert cli.main(["status", str(many / "nothing"), str(many / "whole")]) == 0
    nothing, whole = capsys.readouterr().out.splitlines()[1:]
    assert "no run at" in nothing
    assert "finished" in whole


def test_what_is_no_run_is_not_taken_for_one(folder: Path, tmp_path: Path) -> None:
    """A configuration of somebody else's beside the runs, copies in hidden folders, names that only look alike."""
    many = tmp_path / "many"
    shutil.copytree(folder / "done", many / "lr=1")
    for key in ("config.yaml", ".trash/run.json", "notes/run.json.bak", "x/lease/notes.json", "y/lease/1.json"):
        open_storage(str(many)).put(key, b"mine: 1")
    assert runs_at(str(many)) == [f"{many}/lr=1"]


def test_runs_are_found_in_folders_that_are_named_as_those_of_a_run_and_not_inside_of_runs(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("checkpoints", "tensorboard"):
        shutil.copytree(folder / "sweep", tmp_path / name)
        for inside in ("evals/copy", "tensorboard/copy"):
            open_storage(str(tmp_path / name / "lr=1")).put(f"{inside}/run.json", b"{}")
            open_storage(str(tmp_path / name / "lr=2")).put(f"{inside}/run.json", b"{}")
    assert runs_at(str(tmp_path)) == [
        f"{tmp_path}/{name}/lr={lr}" for name in ("checkpoints", "tensorboard") for lr in (1, 2)
    ]


def test_a_run_that_may_not_be_looked_into_hides_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As another user's in a folder that is shared."""
    with tempfile.TemporaryDirectory() as many:
        shutil.copytree(folder / "done", Path(many) / "a")
        shutil.copytree(folder / "done", Path(many) / "b")
        (Path(many) / "a").chmod(0)
        Path(many).chmod(0o755)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            lines = told(capsys, many)
        finally:
            os.seteuid(user)
            (Path(many) / "a").chmod(0o755)
    assert [Path(line[0]).name for line in lines] == ["a", "b"]
    assert "Permission denied" in lines[0][1]
    assert lines[1][1] == "finished"


def test_absurd_numbers_and_messages_leave_room_for_the_other_columns(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "absurd"
    shutil.copytree(folder / "sweep/lr=2", run)
    row = {"n": 10**15 - 1, "kind": "train", "time": 1.0, "loss": 1e308, "images_per_s": -1e308}
    open_storage(str(run)).put("metrics.jsonl", json.dumps(row).encode())
    open_storage(str(run)).put("lease/000001.json", holder_bytes(elsewhere(state="failed", message="x" * 100_000)))
    assert all(len(line) < 700 for line in table([status(str(run))]).splitlines())
