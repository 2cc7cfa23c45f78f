"""Evaluations beside training (eval.where=job): the figures of those inside it, at their n, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made.event_files import accumulated, points, points_of
from made.run import MODEL, SAMPLER, make_cache
from made.wandb_files import history, offline_records
from pipeline import eval as eval_verb
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EvalConfig,
    EvalRunConfig,
    LaunchConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError
from pipeline.evaluation import beside as jobs
from pipeline.evaluation.beside import Jobs, Starter, pending
from pipeline.runs.directory import is_finished
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker, read_rows
from servers.slurm import Slurm

BATCH = 8
END = 32
SECONDS = 120.0


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    make_cache(folder)
    make_cache(folder / "held_out", seed=2)
    return folder


def config_of(caches: Path, run: Path, where: str = "job", **changes: Any) -> TrainConfig:
    return TrainConfig(
        run=str(run),
        data=DataConfig(train=str(caches / "cache"), val=str(caches / "held_out/cache")),
        model=MODEL,
        optim=OptimConfig(lr=1e-3, warmup=8, batch=BATCH),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=END),
        tracking=TrackingConfig(to=("wandb", "tensorboard"), wandb="offline", every=BATCH),
        eval=EvalConfig(where=where, every=16, images=6, grid=4, sampler=SAMPLER),  # type: ignore[arg-type]
        samples=END,
        device="cpu",
        launch=LaunchConfig(threads=1),
        **changes,
    )


def figures(run: Path) -> dict[int, dict[str, Any]]:
    found = sorted(run.glob("evals/*/metrics.json"))
    return {int(path.parent.name): {**json.loads(path.read_text()), "seconds": 0} for path in found}


def eval_rows(run: Path) -> dict[int, float]:
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "eval"]
    assert len({row["n"] for row in rows}) == len(rows), "figures were logged twice"
    return {row["n"]: row["clip_score"] for row in rows}


def wait_for(what: Any, seconds: float = SECONDS) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "it did not come about"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def inside(caches: Path) -> Path:
    """A run that evaluates inside training."""
    config = config_of(caches, caches / "inside", "train")
    assert train.main(config) == 0
    return Path(config.run)


def test_a_job_makes_the_figures_that_training_makes_and_training_waits_for_none(
    caches: Path, inside: Path, tmp_path: Path
) -> None:
    config = config_of(caches, tmp_path / "run")
    assert train.main(config) == 0
    run = open_storage(config.run)
    assert is_finished(config, run)
    wait_for(lambda: not pending(run))
    wait_for(lambda: sorted(eval_rows(tmp_path / "run")) == [0, 16, 32])
    assert figures(tmp_path / "run") == figures(inside)
    assert sorted(figures(inside)) == [0, 16, 32]
    assert eval_rows(tmp_path / "run") == eval_rows(inside)
    assert not list((tmp_path / "run").glob("evals/*/*.safetensors"))
    assert train.main(config) == 0  # finished, and nothing is made again
    assert "Traceback" not in (tmp_path / "run" / jobs.LOG).read_text()


def test_trackers_have_every_figure_of_a_run_and_the_captions_of_its_pictures(inside: Path) -> None:
    records = offline_records(inside)
    rows = [row for row in read_rows(inside / "metrics.jsonl") if row["kind"] in ("train", "eval")]
    logged = {row["samples"]: row for row in history(records) if "train/loss" in row}
    assert sorted(logged) == [8, 16, 24, 32]
    for row in (row for row in rows if row["kind"] == "train"):
        there = {key.removeprefix("train/"): value for key, value in logged[row["n"]].items()}
        names = ("loss", "lr", "grad_norm", "grad_norm_max", "weight_norm", "images_per_s", "step_s", "data_wait_s",
                 "memory_gb", "tflops")  # fmt: skip
        assert {name: there[name] for name in names} == {name: row[name] for name in names}
        assert row["loss_by_noise"] == {
            name.removeprefix("loss_by_noise."): value for name, value in there.items() if name.startswith("loss_by_")
        }
        assert row["tflops"] > 0 and row["weight_norm"] > row["lr"] and "mfu" not in row
    figures = {row["samples"]: row["eval/clip_score"] for row in history(records) if "eval/clip_score" in row}
    assert figures == eval_rows(inside)
    pictures = [row for row in history(records) if any(key.startswith("images/samples") for key in row)]
    captions = [value for row in pictures for key, value in row.items() if key.endswith("caption")]
    given = json.loads((inside / "evals" / f"{0:012d}" / "grid.json").read_text())["captions"]
    assert captions == [jobs.numbered(given)] * 3 and captions[0].startswith(f"1. {given[0]}\n2. {given[1]}")
    shown = accumulated(inside).Images("images/samples")
    grids = {n: (inside / "evals" / f"{n:012d}" / "grid.png").read_bytes() for n in (0, 16, 32)}
    assert {one.step: one.encoded_image_string for one in shown} == grids
    assert points(inside) == points_of(read_rows(inside / "metrics.jsonl"))
    checkpoints = [row["url"] for row in read_rows(inside / "metrics.jsonl") if row["kind"] == "checkpoint"]
    assert checkpoints[-1] == f"{inside}/checkpoints/{32:012d}/"


def test_a_killed_job_costs_training_nothing_and_its_figures_are_made_by_the_next(
    caches: Path, inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def kill(self: Starter, n: int) -> None:
        started(self, n)
        os.kill(self._pid, signal.SIGKILL)
        wait_for(lambda: not self._runs())
        assert self._status == -signal.SIGKILL
        killed.append(n)

    started = Starter.__call__
    monkeypatch.setattr(Starter, "__call__", kill)
    config = config_of(caches, tmp_path / "run")
    assert train.main(config) == 0
    assert killed == [0, 16, 32]
    run = open_storage(config.run)
    assert pending(run) == [0, 16, 32] and figures(tmp_path / "run") == {}
    losses = [
        [row["loss"] for row in read_rows(one / "metrics.jsonl") if "loss" in row] for one in (Path(config.run), inside)
    ]
    assert losses[0] == losses[1]
    request = EvalRunConfig(run=config.run, pending=True, device="cpu")
    assert eval_verb.main(replace(request, at=16)) == 0
    assert pending(run) == [0, 32]
    assert eval_verb.main(request) == 0 and eval_verb.main(request) == 0
    assert figures(tmp_path / "run") == figures(inside) and eval_rows(tmp_path / "run") == eval_rows(inside)


def test_figures_that_come_when_training_is_over_reach_the_same_trackers_at_their_n(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that are made where the package of one is not installed, when the run goes on where it is."""
    monkeypatch.setattr(Starter, "__call__", lambda self, n: None)
    config = config_of(caches, tmp_path / "run")
    assert train.main(config) == 0
    identity = (tmp_path / "run" / "wandb.id").read_text()
    assert eval_verb.main(EvalRunConfig(run=config.run, pending=True, at=16, device="cpu")) == 0
    records = offline_records(tmp_path / "run")
    assert [record.run.run_id for record in records if record.WhichOneof("record_type") == "run"] == [identity]
    rows = [row for row in history(records) if "eval/clip_score" in row]
    assert [(row["samples"], row["eval/clip_score"]) for row in rows] == list(eval_rows(tmp_path / "run").items())
    pictures = [row for row in history(records) if any(key.startswith("images/samples") for key in row)]
    assert len(pictures) == 1 and pictures[0]["samples"] == 16
    assert [one.step for one in accumulated(tmp_path / "run").Images("images/samples")] == [16]
    assert points(tmp_path / "run") == points_of(read_rows(tmp_path / "run/metrics.jsonl"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard", None)
        assert eval_verb.main(EvalRunConfig(run=config.run, pending=True, device="cpu")) == 0
    assert capsys.readouterr().err.count("whose package is not installed here") == 1
    lacking = points_of(read_rows(tmp_path / "run/metrics.jsonl")) - points(tmp_path / "run")
    assert sorted(n for name, n, _ in lacking if name == "eval/clip_score") == [0, 32]
    with Tracker(open_storage(config.run), replace(config.tracking, to=("tensorboard",))) as tracker:
        tracker.start(END)
    assert points(tmp_path / "run") == points_of(read_rows(tmp_path / "run/metrics.jsonl"))


def test_while_training_is_there_figures_reach_the_tracker_through_it_alone(tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    off = TrackingConfig(wandb="off")
    with Tracker(run, off) as tracker, Jobs(run, tracker, Starter("nothing", "", "cpu", None)):
        tracker.start(0)
        wait_for(lambda: run.exists(jobs.OPEN))
        run.put(jobs.figures(run, 64), b'{"n": 64, "fid": 2.5}')
        jobs.finish(run, 64, lambda: pytest.fail("the job logged it too"))
    assert [(row["n"], row["fid"]) for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "eval"] == [
        (64, 2.5)
    ]
    assert not run.exists(jobs.OPEN)
    run.put(jobs.figures(run, 128), b'{"n": 128, "fid": 2.0}')
    brought: list[int] = []
    for _ in range(2):
        jobs.finish(run, 128, lambda: brought.append(128))
    assert brought == [128]


def test_rows_that_a_resume_drops_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is killed after an evaluation beyond its last commit: a resume drops the row, not the figures."""
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)
    run = open_storage(str(tmp_path))
    run.put(jobs.figures(run, 64), b'{"n": 64, "fid": 2.5}')
    for resumed in (0, 32):
        with Tracker(run, TrackingConfig(wandb="off")) as tracker:
            tracker.start(resumed)
            assert tracker.evaluations == set()
            with Jobs(run, tracker, Starter("nothing", "", "cpu", None)):
                wait_for(lambda tracker=tracker: tracker.evaluations == {64})


def test_jobs_that_cannot_start_cost_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(jobs.os, "posix_spawn", refuse)
    run = open_storage(str(tmp_path))
    with Tracker(run, TrackingConfig(wandb="off")) as tracker:
        with Jobs(run, tracker, Starter("nothing", "", "cpu", None)) as beside:
            for n in (0, 8):
                beside.evaluate(n, {"w": torch.ones(3)})
        assert pending(run) == [0, 8]
    assert capsys.readouterr().err.count("no more processes") == 1
    assert jobs.read_snapshot(run, 8)["w"].tolist() == [1, 1, 1]


@pytest.mark.long
def test_on_a_cluster_jobs_of_slurms_make_the_figures_that_training_makes(
    caches: Path, inside: Path, slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real Slurm; `submit eval` sends a job for each snapshot, the second after training is over."""
    (tmp_path / "conf/cluster").mkdir(parents=True)
    (tmp_path / "conf/cluster/evals.yaml").write_text("gpus: 0\ncpus: 1\ntime: '10'\n")
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path / "conf"))
    monkeypatch.chdir(tmp_path)
    before, config = slurm.jobs(), config_of(caches, tmp_path / "run")
    config = replace(config, eval=replace(config.eval, every=END, cluster="evals"))
    assert train.main(config) == 0
    run = open_storage(config.run)
    wait_for(lambda: sorted(figures(tmp_path / "run")) == [0, END])
    wait_for(lambda: not pending(run))
    assert figures(tmp_path / "run") == {n: figures(inside)[n] for n in (0, END)}
    wait_for(lambda: eval_rows(tmp_path / "run") == {n: eval_rows(inside)[n] for n in (0, END)})
    sent = sorted(set(slurm.jobs()) - set(before), key=int)
    slurm.wait(*sent)
    assert [slurm.ends(job) for job in sent] == [[("COMPLETED", "0")]] * 2
    assert "--job-name=latentmill-eval" in (tmp_path / "run" / jobs.LOG).read_text()


def test_on_a_cluster_each_snapshot_is_a_job_of_slurms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    given: list[list[str]] = []

    def remember(path: str, command: list[str], environment: dict[str, str], **options: Any) -> int:
        assert path == command[0] and "RANK" not in environment
        started.append(command)
        descriptor = options["file_actions"][0][1]
        given.append(json.loads(os.pread(descriptor, 10_000, 0)))
        return 0

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(jobs.os, "posix_spawn", remember)
    start = Starter("s3://b/runs/a", "a100", "auto", tmp_path / "log")
    start(64)
    start(128)
    assert [command[1:] for command in started] == [["-P", "-m", "pipeline.cli", "submit", "--handed-over"]] * 2
    assert given == [["eval", "cluster=a100", f"at={n}", "run=s3://b/runs/a", "pending=true"] for n in (64, 128)]


def test_a_cluster_without_jobs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.cluster=a100 is for eval\.where=job"):
        load("train", ["run=r", "data.train=c", "eval.cluster=a100"])
