"""What goes wrong with the data while a run trains: it is retried and changes no bit, or it ends the run in one line
before a step is taken on it (docs/explained/promises.md). One rank; test_data_faults_of_ranks.py has two.

The S3 server is real, behind a proxy of faults; the run is `latentmill train` without DeepSpeed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import train
from pipeline.config import TrainConfig
from pipeline.distributed.exits import guarded
from pipeline.runs.directory import committed
from pipeline.storage import s3 as module
from pipeline.storage.urls import open_storage
from ranks.faulty_run import BATCH, END, EVERY, UNEVEN, config_of, late_shard, losses, make_cache, rows, state, upload
from servers.fault_proxy import Fault, FaultProxy

SILENCE = 0.4
"""Seconds after which these tests' client calls S3 silent; in earnest it is READ_SECONDS, 30."""
OUTAGE = 3.0
"""Seconds for which S3 is away; test_data_faults_of_ranks.py has a minute."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("faulty") / "cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: str) -> tuple[Any, dict[int, float]]:
    """State and losses of a run that read its data from a disk."""
    config = config_of(str(tmp_path_factory.mktemp("undisturbed")), cache)
    assert train.main(config) == 0
    return state(config.run), losses(config.run)


@pytest.fixture
def config(cache: str, s3: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run on S3 of a cache on S3."""
    monkeypatch.setattr("pipeline.storage.patience.PAUSES", (0.02, 0.5))
    upload(cache, f"{s3}/cache")
    faults.clear()
    return config_of(f"{s3}/run", f"{s3}/cache", cache)


@pytest.fixture(scope="module")
def hasty_client(new_fault_client: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_SECONDS", SILENCE)
        return new_fault_client()


def fails(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a run ends."""
    capsys.readouterr()
    assert guarded("train", lambda: train.main(config)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# --------------------------------------------------------------------------------------------------------------------
# What passes


PASSING = {
    "refused, lost and cut": [
        Fault(kind="cut", method="GET", key=".tar", every=3, at=20_000),
        Fault(kind="reset", method="GET", key=".tar", every=3, at=20_000),
        Fault(kind="lose", method="PUT", every=4),
        Fault(kind="slow_down", every=7),
        Fault(kind="reset", every=7),
    ],
    "silent": [
        Fault(kind="stall", method="GET", key=".tar", every=6, seconds=10),
        Fault(kind="stall", method="GET", key=".tar", every=6, seconds=10, at=20_000),
    ],
    "damaged once": [
        Fault(kind="flip", method="GET", key="000005.tar", times=1, at=20_000),
        Fault(kind="flip", method="GET", key="000005.index.json", times=1, at=300),
        Fault(kind="cut", method="GET", key="000003.tar", times=1, at=0),
    ],
}


@pytest.mark.parametrize("passing", PASSING)
def test_answers_that_are_refused_lost_cut_late_or_damaged_once_change_no_bit_of_training(
    config: TrainConfig, faults: FaultProxy, undisturbed: Any, hasty_client: Any, passing: str
) -> None:
    module._clients[os.getpid(), "s3"] = hasty_client
    rules = [faults.add(replace(fault)) for fault in PASSING[passing]]
    assert train.main(config) == 0
    assert all(rule.injected >= (rule.times or 2) for rule in rules)
    faults.clear()
    assert (state(config.run), losses(config.run)) == undisturbed


def test_the_wait_that_an_outage_causes_is_in_the_metrics_and_changes_no_bit_of_training(
    config: TrainConfig, faults: FaultProxy, undisturbed: Any, cache: str, tmp_path: Path
) -> None:
    """The run lies on the disk, so that what waits for S3 is data."""
    config = replace(config, run=str(tmp_path / "run"))
    rule = faults.add(Fault(kind="reset", after=f"/cache/{late_shard(cache, 1)[0]}", lasts=OUTAGE))
    assert train.main(config) == 0
    assert rule.injected > 5
    assert (state(config.run), losses(config.run)) == undisturbed
    found = rows(config.run)
    slow = max(found.values(), key=lambda row: row["data_wait_s"])
    assert EVERY < slow["n"] < END
    assert OUTAGE - 1 < slow["data_wait_s"] < slow["step_s"]
    assert slow["images_per_s"] == pytest.approx(BATCH / slow["step_s"])
    assert sum(row["data_wait_s"] for row in found.values()) > OUTAGE - 0.5


# --------------------------------------------------------------------------------------------------------------------
# What does not


def test_an_outage_without_end_ends_the_run_in_one_line_and_the_same_command_ends_as_if_nothing_had_happened(
    config: TrainConfig,
    faults: FaultProxy,
    undisturbed: Any,
    cache: str,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the data alone; where the run lies on the store that is gone: test_data_faults_of_ranks.py."""
    rule = faults.add(Fault(kind="reset", key="/cache/", after=f"/cache/{late_shard(cache, 1)[0]}"))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 1.0)
        line = fails(config, capsys)
    assert rule.injected > 1
    assert line.startswith(f"latentmill train: {s3}/cache/")
    assert " times in " in line
    faults.clear()
    assert EVERY <= state(config.run)[0] < END
    assert train.main(config) == 0
    assert (state(config.run), losses(config.run)) == undisturbed


def test_a_shard_that_is_deleted_is_refused_by_name_before_any_step_at_the_start_and_at_a_resume(
    config: TrainConfig, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, cache = "000004.tar", open_storage(f"{s3}/cache")
    data = cache.get(name)
    cache.delete(name)
    assert f"{s3}/cache lacks {name} of its manifest: restore" in fails(config, capsys)
    assert not committed(open_storage(config.run))
    assert not rows(config.run)
    cache.put(name, data)
    assert train.main(replace(config, samples=2 * EVERY)) == 0
    cache.delete(name)
    before = state(config.run), losses(config.run)
    assert f"{s3}/cache lacks {name} of its manifest: restore" in fails(config, capsys)
    assert (state(config.run), losses(config.run)) == before


def test_a_manifest_that_changed_before_a_resume_is_refused_with_what_to_do(
    config: TrainConfig, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(replace(config, samples=2 * EVERY)) == 0
    before = state(config.run), losses(config.run)
    good = open_storage(f"{s3}/cache").get("manifest.json")
    cache = upload(make_cache(tmp_path / "other", UNEVEN), f"{s3}/cache")
    line = fails(config, capsys)
    old, new = (hashlib.sha256(data).hexdigest()[:12] for data in (good, cache.get("manifest.json")))
    assert f"was trained on a dataset whose manifest is {old}, but that of data.train={s3}/cache is {new}" in line
    assert line.endswith("; restore that dataset, or choose another run=\n")
    assert (state(config.run), losses(config.run)) == before
