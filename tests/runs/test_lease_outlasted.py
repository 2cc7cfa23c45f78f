"""Ranks whose machine is back before the lease of their predecessor is dead
(docs/how_to/run_on_kubernetes_or_skypilot.md)."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from made.lease import elsewhere
from pipeline.config import TrainConfig
from pipeline.distributed.world import World
from pipeline.errors import RunError
from pipeline.runs import lease as module
from pipeline.runs.holder import holder_bytes
from pipeline.runs.lease import DEAD_SECONDS, newest
from pipeline.runs.names import lease_key
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training import life
from ranks.faulty_run import config_of, make_cache


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return config_of(str(tmp_path / "run"), make_cache(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the only rank of a launcher."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)


@pytest.mark.usefixtures("ranked")
def test_ranks_wait_for_the_end_of_a_lease_whose_holder_has_died_on_another_machine(
    run: Storage, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run.put(lease_key(1), holder_bytes(elsewhere(beat=time.time() - DEAD_SECONDS + 0.5)))
    with life.leased(config, World()) as lease:
        assert lease is not None
        assert lease.holder.life == 1
        assert newest(run)[0] == 2
    said = capsys.readouterr().err
    assert "is being trained by process 12 on n9" in said
    assert "waiting until it is dead, or says that it lives" in said


@pytest.mark.usefixtures("ranked")
def test_ranks_are_refused_as_soon_as_the_other_machine_says_that_it_lives(
    run: Storage, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEAD_SECONDS", 5.0)
    other = elsewhere(beat=time.time())
    run.put(lease_key(1), holder_bytes(other))
    renewal = threading.Timer(0.3, lambda: run.put(lease_key(1), holder_bytes(replace(other, beat=time.time()))))
    began = time.monotonic()
    renewal.start()
    with pytest.raises(RunError, match="being trained by process 12 on n9"), life.leased(config, World()):
        pass
    assert 0.3 <= time.monotonic() - began < 4
    renewal.join()


def test_who_is_no_rank_is_refused_at_once(
    run: Storage, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run.put(lease_key(1), holder_bytes(elsewhere()))
    with pytest.raises(RunError, match="being trained by process 12 on n9"), life.leased(config, World()):
        pass
    assert "waiting" not in capsys.readouterr().err
