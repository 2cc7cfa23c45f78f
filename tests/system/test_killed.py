"""A rank of two that is killed or frozen takes the other with it, the job's status says that a signal did it, and the
same command reaches the end of an undisturbed run (docs/explained/promises.md)."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from pipeline.distributed import ranks
from pipeline.distributed.ranks import run_local
from pipeline.runs.directory import committed
from pipeline.storage.urls import open_storage
from ranks.faulty_run import BATCH, END, EVERY, make_cache, state
from ranks.killed_run import WATCHDOG_SECONDS
from servers.warm_ranks import WarmRanks


@pytest.mark.timeout(600)
def test_a_frozen_rank_and_a_killed_one_end_their_peers_and_the_run_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], warm_ranks: WarmRanks
) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 3.0)  # a frozen rank does not take it
    make_cache(tmp_path / "cache")
    run = open_storage(str(tmp_path / "run"))

    began = time.monotonic()
    assert run_local("ranks.killed_run", [str(tmp_path), "freeze", str(7 * BATCH)], 2, 1) == 128 + signal.SIGALRM
    said = capfd.readouterr().err
    assert f"Timeout (0:00:{WATCHDOG_SECONDS:02.0f})!" in said
    assert "in _next_batch" in said
    assert "rank 0 was killed by SIGALRM, as it had made no progress (watchdog_s); its stacks are above" in said
    assert time.monotonic() - began < 120
    assert committed(run) == [EVERY]

    assert run_local("ranks.killed_run", [str(tmp_path), "kill", str(13 * BATCH)], 2, 1) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL; out of memory?" in capfd.readouterr().err
    assert committed(run) == [2 * EVERY, EVERY]

    finished = warm_ranks.run("ranks.killed_run", [str(tmp_path), "finish", "0"], 2)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert state(run.url)[0] == END
    assert state(run.url) == state(str(tmp_path / "undisturbed"))
