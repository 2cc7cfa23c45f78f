"""What a plan says that a run stores and evaluates, against what runs store and when they evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made.cache import contract
from pipeline.config import RunConfig, TrainConfig
from pipeline.config.loading.load import load
from pipeline.planning.fit import cost_of
from pipeline.planning.plan.evaluations import looks, passes
from pipeline.planning.plan.job import Job, Machines
from pipeline.planning.plan.kept import (
    commit_bytes,
    commits,
    events,
    kept_commits,
    snapshots_of,
    storage_section,
)
from pipeline.runs.retention import Retention, kept_checkpoints
from pipeline.storage.urls import open_storage
from pipeline.training.schedule import due

CACHE = contract(latent_shape=(4, 8, 8))


def run(*words: str) -> TrainConfig:
    config: TrainConfig = load("train", ["run=r", "data.train=c", *words])
    return config


def n_of_commits(config: RunConfig) -> list[int]:
    """As the training loop commits (training/loop): after a step that a multiple of checkpoint.every lies in, before an
    evaluation, and at the end."""
    batch = config.optim.batch
    end = -(-config.samples // batch) * batch
    steps = range(batch, end + 1, batch)
    looked = config.data.val != "" and config.eval.where == "train"
    return [
        n
        for n in steps
        if due(n, config.checkpoint.every, batch) or n == end or (looked and due(n, config.eval.every, batch))
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("samples=1000", "optim.batch=32", "checkpoint.every=100"),
        ("samples=1000", "optim.batch=64", "checkpoint.every=64", "data.val=v", "eval.every=150"),
        ("samples=999", "optim.batch=10", "checkpoint.every=7"),
        ("samples=1000", "optim.batch=1000", "checkpoint.every=5000"),
        ("samples=1000", "optim.batch=32", "checkpoint.every=200", "data.val=v", "eval.every=90", "eval.where=job"),
        ("samples=1000", "optim.batch=32", "checkpoint.every=1000", "data.val=v", "eval.every=3"),
    ],
    ids=["odd", "evaluated", "often", "once", "beside", "every step"],
)
def test_commits_are_those_that_the_loop_makes(words: tuple[str, ...]) -> None:
    assert commits(run(*words)) == n_of_commits(run(*words))


def test_of_a_long_run_with_an_event_every_sample_there_is_one_for_each_step() -> None:
    words = ("samples=485376000", "optim.batch=2048", "data.val=v")
    config = run(*words, "checkpoint.every=1", "eval.every=1", "eval.loss_every=1")
    assert len(commits(config)) == 237_000
    assert (len(looks(config).evaluations), looks(config).losses) == (237_001, 237_000)
    assert events(485_376_000, 0, 2048) == 1


@pytest.mark.parametrize("every", [1, 50, 150, 250, 1000, 5000])
def test_snapshots_come_with_commits_alone(every: int) -> None:
    made = commits(run("samples=1000", "optim.batch=100", "checkpoint.every=300"))
    assert made == [300, 600, 900, 1000]
    newest, kept = 0, 0
    for n in made:  # as training/commits.py takes them
        kept += n // every != newest // every
        newest = n
    assert snapshots_of(made, every) == kept == {1: 4, 50: 4, 150: 3, 250: 4, 1000: 1, 5000: 0}[every]
    assert snapshots_of(made, 0) == 0


@pytest.mark.parametrize(
    "words", [(), ("checkpoint.keep=5",), ("checkpoint.keep_every=300",), ("checkpoint.keep_every=64",)], ids=str
)
def test_as_many_checkpoints_stay_as_the_rules_of_a_run_keep(tmp_path: Path, words: tuple[str, ...]) -> None:
    config = run("samples=1000", "optim.batch=32", "checkpoint.every=100", *words)
    made = commits(config)
    kept = kept_checkpoints(open_storage(str(tmp_path)), made[::-1], Retention.of(config))
    assert kept_commits(config, made) == len(kept)


def test_the_best_checkpoint_is_one_more(tmp_path: Path) -> None:
    words = ("samples=1000", "optim.batch=100", "checkpoint.every=100", "data.val=v", "eval.every=100")
    config = run(*words, "checkpoint.best=clip_score")
    made = commits(config)
    for n in made:
        folder = tmp_path / "evals" / f"{n:012d}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"clip_score": 30.0 if n == 300 else 20.0}))
    kept = kept_checkpoints(open_storage(str(tmp_path)), made[::-1], Retention.of(config))
    assert kept == {300, 900, 1000}
    assert kept_commits(config, made) == 3


@pytest.mark.parametrize("averages", [(), ("ema.half_lives=[10,20]",)], ids=["one", "three"])
def test_a_checkpoint_has_weights_two_moments_and_every_average(averages: tuple[str, ...]) -> None:
    config = run(*averages)
    cost = cost_of(config, CACHE, 1)
    count = 3 if averages else 1
    assert commit_bytes(config, cost, cost.parameters) == (12 + 4 * count) * cost.parameters


def test_muon_has_one_moment_of_its_matrices() -> None:
    adamw, muon = run(), run("optim=muon")
    cost = cost_of(adamw, CACHE, 1)
    saved = commit_bytes(adamw, cost, cost.parameters) - commit_bytes(muon, cost, cost.parameters)
    assert 0.9 * 4 * cost.parameters < saved < 4 * cost.parameters


def test_the_bucket_holds_what_is_kept_and_what_is_being_written() -> None:
    config = run("samples=1000", "optim.batch=100", "checkpoint.every=100", "ema.widths=[0.1]", "ema.snapshots=250")
    cost = cost_of(config, CACHE, 1)
    section = storage_section(Job(config=config, cache=CACHE, machines=Machines(ranks=2)), cost, 10**9)
    value = {figure.name: figure.value for figure in section.figures}
    one = (12 + 2 * 4) * cost.parameters
    assert value["bytes of a checkpoint"] == one
    assert (value["checkpoints written"], value["checkpoints kept"]) == (10, 2)
    assert value["objects written for them"] == 10 * 5
    assert value["bytes of snapshots"] == 4 * 4 * cost.parameters
    assert value["bytes of the run at most"] == 3 * one + 16 * cost.parameters
    assert value["bytes of cache and run"] == 10**9 + value["bytes of the run at most"]


@pytest.mark.parametrize(
    "words",
    [
        ("samples=1000", "optim.batch=32", "eval.every=0"),
        ("samples=1000", "optim.batch=32", "eval.every=300"),
        ("samples=1000", "optim.batch=32", "eval.every=1000"),
        ("samples=960", "optim.batch=32", "eval.every=320", "eval.final_images=999"),
        ("samples=1000", "optim.batch=32", "eval.every=5000"),
        ("samples=1000", "optim.batch=32", "eval.every=20", "eval.loss_every=1000"),
        ("samples=1000", "optim.batch=64", "eval.every=333", "eval.loss_every=3"),
    ],
    ids=["ends", "between", "at the end", "at multiples", "never due", "with the end", "every step"],
)
def test_evaluations_are_those_that_training_makes(words: tuple[str, ...]) -> None:
    config = run(
        "data.val=v", "eval.images=7", *(() if "eval.loss_every" in words[-1] else ("eval.loss_every=128",)), *words
    )
    batch = config.optim.batch
    end = -(-config.samples // batch) * batch
    steps = [0, *range(batch, end + 1, batch)]
    made = [n for n in steps if n in (0, end) or due(n, config.eval.every, batch)]
    found = looks(config)
    final = config.eval.final_images or 7
    assert list(found.evaluations) == [final if n == end else 7 for n in made]
    assert found.losses == sum(due(n, config.eval.loss_every, batch) or n == end for n in steps[1:])


def test_without_held_out_records_nothing_is_evaluated() -> None:
    assert looks(run("eval.every=100")).images == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("eval.sampler.steps=10", "eval.sampler.guidance=1"), 10),
        (("eval.sampler.steps=10", "eval.sampler.guidance=3"), 20),
        (("eval.sampler.sampler=heun", "eval.sampler.steps=10", "eval.sampler.guidance=1"), 19),
    ],
)
def test_guidance_and_heun_take_two_predictions_a_step(words: tuple[str, ...], expected: float) -> None:
    config: Any = run(*words)
    assert passes(config) == expected
