"""What long runs on many ranks need: a profile of some steps, garbage that is collected at the same steps, and a
shorter time for steps after the first. None of it changes what is trained."""

from __future__ import annotations

import gc
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from made import cache as small_cache
from made.model import MODEL
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    LaunchConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.config.values.steps import MOST, profiled_steps
from pipeline.distributed import world as distributed
from pipeline.distributed.world import World, limit_collectives
from pipeline.errors import ConfigError
from pipeline.runs.checkpoint import load_weights
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from pipeline.training.objectives.diffusion import DiffusionObjective
from pipeline.training.saver import Saver
from pipeline.training.watch import limit
from pipeline.training.watch.garbage import Garbage
from pipeline.training.watch.limit import CollectiveLimit, longest_collective, shorter_collective
from pipeline.training.watch.profile import StepProfile
from pipeline.training.watch.progress import ProgressWatch

BATCH, STEPS = 8, 6
LONG = 100.0


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    small_cache.make_cache(str(tmp_path / "cache"), [20, 17, 9])
    return TrainConfig(
        run=str(tmp_path / "run"),
        data=DataConfig(train=str(tmp_path / "cache")),
        model=MODEL,
        optim=OptimConfig(batch=BATCH),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=4 * BATCH),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=STEPS * BATCH,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )


def names_in(path: Path) -> set[str]:
    """Names of the operations in a trace."""
    return {event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def test_a_run_is_profiled_and_its_garbage_collected_at_steps_without_changing_what_it_trains(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic: list[bool] = []
    committing: list[bool] = []
    prepare, begin = DiffusionObjective.prepare, Saver.begin

    def preparing(self: DiffusionObjective, batch: Any) -> Any:
        automatic.append(gc.isenabled())
        return prepare(self, batch)

    def beginning(self: Saver, *args: Any) -> Any:
        committing.append(gc.isenabled())
        return begin(self, *args)

    train.main(config)
    expected = load_weights(open_storage(config.run), which="raw")[1]
    monkeypatch.setattr(DiffusionObjective, "prepare", preparing)
    monkeypatch.setattr(Saver, "begin", beginning)
    other = replace(
        config,
        run=f"{config.run}2",
        tracking=replace(config.tracking, profile="3..50"),
        gc_steps=2,
        step_limit_s=60.0,
    )
    train.main(other)
    assert automatic == [True, *[False] * (STEPS - 1)]
    assert committing == [True, True]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    found = load_weights(open_storage(other.run), which="raw")[1]
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    (trace,) = Path(other.run, "profiles").iterdir()
    assert trace.name == "000000003-000000006.json.gz"
    names = names_in(trace)
    assert {f"step {number}" for number in (3, 4, 5, 6)} <= names
    assert not {"step 2", "step 7"} & names
    assert "aten::convolution" in names


# --------------------------------------------------------------------------------------------------------------------
# The profile


def watch_of(**changes: Any) -> ProgressWatch:
    given: dict[str, Any] = {"collectives": CollectiveLimit(World(), LONG, 0.0), "garbage": Garbage(0)}
    return ProgressWatch(0.0, 0.0, lambda n, sentence: None, **given | changes)


def test_a_run_that_goes_on_amid_the_profiled_steps_profiles_those_that_are_left(tmp_path: Path) -> None:
    profile = StepProfile((2, 4), end=10, run=LocalStorage(tmp_path), world=World(), watch=watch_of())
    for step in range(3, 7):
        with profile.around(step):
            torch.zeros(4).add(step)
    (trace,) = (tmp_path / "profiles").iterdir()
    assert trace.name == "000000003-000000004.json.gz"
    assert {"step 3", "step 4", "aten::add"} <= names_in(trace)


def test_a_step_that_fails_ends_the_profile_and_leaves_no_trace(tmp_path: Path) -> None:
    profile = StepProfile((1, 4), end=10, run=LocalStorage(tmp_path), world=World(), watch=watch_of())
    with pytest.raises(ZeroDivisionError), profile.around(1):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    again = StepProfile((1, 1), end=10, run=LocalStorage(tmp_path), world=World(), watch=watch_of())
    with again.around(1):  # the profiler is free
        torch.zeros(4).add(1)
    assert names_in(tmp_path / "profiles/000000001-000000001.json.gz") >= {"step 1"}


@pytest.mark.parametrize("text", ["5", "5..", "0..4", "9..5", "1..1000", "a..b", "-1..4", f"1..{MOST + 1}"])
def test_a_profile_of_steps_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.profile="):
        profiled_steps(text)


def test_steps_to_profile_are_read() -> None:
    assert profiled_steps("") is None
    assert profiled_steps("100..104") == (100, 104)
    assert profiled_steps(f"1..{MOST}") == (1, MOST)


# --------------------------------------------------------------------------------------------------------------------
# Garbage


def test_garbage_is_collected_every_so_many_steps_and_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    step = 0
    monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
    garbage = Garbage(3)
    try:
        for step in range(1, 9):  # noqa: B007
            garbage.step()
            assert not gc.isenabled()
        assert collected == [1, 4, 7]
        assert gc.get_freeze_count() > 0
        garbage.release()
        assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
        step = 20
        garbage.step()
        assert collected == [1, 4, 7, 20]  # what an evaluation has left
    finally:
        garbage.release()


def test_what_became_garbage_while_it_was_held_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[int] = []

    class Ring:
        """Refers to itself, so that only a collection frees it."""

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            dead.append(1)

    garbage = Garbage(2)
    try:
        garbage.step()
        Ring()
        garbage.step()
        assert dead == []
        garbage.step()
        assert dead == [1]
    finally:
        garbage.release()


def test_python_collects_as_ever_without_the_key() -> None:
    garbage = Garbage(0)
    for _ in range(3):
        garbage.step()
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


# --------------------------------------------------------------------------------------------------------------------
# Time limits


def test_collectives_take_less_time_from_the_second_step_on_but_for_evaluations_and_commits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[float] = []
    monkeypatch.setattr(limit, "limit_collectives", lambda world, seconds: said.append(seconds))
    watch = watch_of(collectives=CollectiveLimit(World(), LONG, 7.0))
    with watch.watching():
        with watch.paused():
            pass  # the first evaluation
        watch.beat(0)
        assert said == []
        watch.beat(8)
        watch.beat(16)
        assert said == [7.0]
        with watch.paused():
            assert said == [7.0, LONG]
        assert said == [7.0, LONG]  # until all ranks begin a step
        watch.beat(24)
        assert said == [7.0, LONG, 7.0]
    assert said == [7.0, LONG, 7.0, LONG]


def test_no_rank_shortens_the_time_before_all_have_come_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    monkeypatch.setattr(limit, "limit_collectives", lambda world, seconds: order.append(("short", world.rank)))

    class Late(World):
        def barrier(self) -> None:
            order.append(("meets", self.rank))

    CollectiveLimit(Late(), LONG, 7.0).shorten()
    assert order == [("meets", 0), ("short", 0)]


def test_no_watchdog_runs_while_a_rank_waits_for_others_to_begin_a_step() -> None:
    """They may be at a first step or a commit, which takes longer than a later step may."""
    order: list[str] = []
    watch = watch_of(step_limit_s=30.0)
    watch.watchdog.stop = lambda: order.append("stop")  # type: ignore[method-assign]
    watch.watchdog.beat = lambda n: order.append("beat")  # type: ignore[method-assign]
    watch.collectives.shorten = lambda: order.append("waits")  # type: ignore[method-assign]
    watch.beat(0)
    watch.beat(8)
    assert order == ["beat", "stop", "waits", "beat"]


def test_the_watchdog_allows_the_later_steps_less() -> None:
    watch = watch_of(step_limit_s=30.0)
    watch.watchdog.seconds = 300.0
    beats: list[float] = []
    watch.watchdog.beat = lambda n: beats.append(watch.watchdog.seconds)  # type: ignore[method-assign]
    for n in range(3):
        watch.beat(n)
    assert beats == [300.0, 30.0, 30.0]


def test_the_time_of_collectives_is_above_that_of_the_watchdog() -> None:
    assert longest_collective(900.0) == 960
    assert longest_collective(60.0) == distributed.COLLECTIVE_SECONDS
    assert shorter_collective(60.0) == 120.0
    assert shorter_collective(0.0) == 0.0


def timeout_of(group: Any) -> timedelta:
    found = group._get_backend(torch.device("cpu")).options._timeout
    assert isinstance(found, timedelta)
    return found


def test_every_process_group_takes_the_time_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # what is set meanwhile goes afterwards
    world = distributed.start("cpu", 1, timeout=900)
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]  # DeepSpeed makes some, too
        limit_collectives(world, 77.0)
        assert [timeout_of(group) for group in groups] == [timedelta(seconds=77)] * 2
        assert world.sum([2.0]) == [2.0]
    finally:
        distributed.stop(world)


REFUSED: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "tracking.profile=7: two numbers of steps": lambda c: replace(c, tracking=replace(c.tracking, profile="7")),
    "tracking.profile=7..9: the run ends with step 6": lambda c: replace(
        c, tracking=replace(c.tracking, profile="7..9")
    ),
    "step_limit_s=1000 with watchdog_s=900": lambda c: replace(c, step_limit_s=1000.0),
}


@pytest.mark.parametrize("words", REFUSED)
def test_contradictions_are_refused(config: TrainConfig, words: str) -> None:
    from pipeline.config.check.runs import check_run

    check_run(replace(config, step_limit_s=1000.0, watchdog_s=0.0))
    with pytest.raises(ConfigError) as refusal:
        check_run(REFUSED[words](config))
    assert words in str(refusal.value)
