"""`latentmill status`: what runs do, and how they were left. What Slurm says of jobs is in test_slurm_train.py."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from made.lease import elsewhere, in_job
from pipeline import cli, train
from pipeline.runs.holder import holder_bytes
from pipeline.runs.lease import DEAD_SECONDS, Holder, Lease, this_process
from pipeline.status import runs_at, state_of, status
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
