"""A profile holds steps and nothing else, and costs no run."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from made.thread_world import on_ranks
from pipeline.distributed.world import World
from pipeline.storage.local import LocalStorage
from pipeline.training.watch.garbage import Garbage
from pipeline.training.watch.limit import CollectiveLimit
from pipeline.training.watch.profile import StepProfile
from pipeline.training.watch.progress import ProgressWatch


def watch_of() -> ProgressWatch:
    limit = CollectiveLimit(World(), 100.0, 0.0)
    return ProgressWatch(0.0, 0.0, lambda n, sentence: None, collectives=limit, garbage=Garbage(0))


def names_in(path: Path) -> set[str]:
    """Names of the operations in a trace."""
    return {event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def test_what_happens_while_the_watch_is_paused_is_not_recorded(tmp_path: Path) -> None:
    """Evaluations and commits; the steps after them are recorded again."""
    watch = watch_of()
    profile = StepProfile((1, 2), end=10, run=LocalStorage(tmp_path), world=World(), watch=watch)
    for step in (1, 2):
        with profile.around(step):
            torch.zeros(4).add(1) if step == 1 else torch.zeros(4).sin()
        with watch.paused(), torch.profiler.record_function("an evaluation"):
            torch.zeros(4).cos()
    names = names_in(tmp_path / "profiles/000000001-000000002.json.gz")
    assert {"step 1", "aten::add", "step 2", "aten::sin"} <= names
    assert not {"an evaluation", "aten::cos"} & names


@pytest.mark.parametrize("fails", ["export_chrome_trace", "start", "put_file"])
def test_a_profile_that_fails_on_rank_0_is_a_warning_and_all_ranks_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalStorage if fails == "put_file" else torch.profiler.profile, fails, full)

    def act(world: World) -> int:
        profile = StepProfile((1, 2), end=2, run=LocalStorage(tmp_path), world=world, watch=watch_of())
        for step in (1, 2):
            with profile.around(step):
                assert (profile._profiler is not None) == (world.rank == 0 and fails != "start")
        return step

    assert on_ranks(2, act) == [2, 2]
    said = capsys.readouterr().err
    assert said.count("are not profiled") == 1
    assert ("No space left" if fails == "start" else "the disk is full") in said
    assert not list(tmp_path.iterdir())
