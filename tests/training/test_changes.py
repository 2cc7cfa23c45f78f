"""A run that goes on with another end of its decay says what that does to the learning rate, and run.json keeps it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from made import cache as small_cache
from pipeline.config import DataConfig, OptimConfig, TrainConfig
from pipeline.config.check.verbs import check
from pipeline.config.loading.merge import to_yaml
from pipeline.data.format.contract import plain
from pipeline.data.format.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.log import log
from pipeline.runs.directory import require_resumable
from pipeline.runs.stored import Change, read_facts
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training.changes import change_of_rate, changes
from pipeline.training.life import describe_run
from pipeline.training.schedule import learning_rate

COSINE = OptimConfig(lr=1e-3, warmup=32, batch=32, decay="cosine")


def config_of(samples: int, optim: OptimConfig = COSINE, run: str = "r") -> TrainConfig:
    return TrainConfig(run=run, samples=samples, optim=optim, data=DataConfig(train="cache"))


def test_a_later_end_of_a_cosine_is_told_with_both_rates_and_where() -> None:
    change = change_of_rate(config_of(256), config_of(512), 256)
    assert change is not None
    assert change == Change(n=256, key="samples", old=256, new=512, at=256, lr_old=0.0, lr_new=change.lr_new)
    assert change.lr_new == pytest.approx(learning_rate(256, 512, COSINE))


def test_an_end_that_is_changed_half_way_or_in_the_warm_up_is_told_too() -> None:
    half_way = change_of_rate(config_of(512), config_of(1024), 256)
    assert half_way is not None
    assert (half_way.n, half_way.at) == (256, 256)
    assert half_way.lr_old < half_way.lr_new
    earlier = change_of_rate(config_of(512), config_of(320), 256)
    assert earlier is not None
    assert earlier.lr_new < earlier.lr_old
    slow = replace(COSINE, warmup=128)
    warming = change_of_rate(config_of(512, slow), config_of(1024, slow), 64)
    assert warming is not None
    assert (warming.n, warming.lr_old < warming.lr_new) == (64, True)
    assert warming.at > 128


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (config_of(256, OptimConfig(decay="constant")), config_of(512, OptimConfig(decay="constant"))),
        (config_of(256), config_of(250)),
        (config_of(256), config_of(512, replace(COSINE, decay_samples=256))),
        (config_of(256, replace(COSINE, decay_samples=512)), config_of(512, replace(COSINE, decay_samples=512))),
        (config_of(256, replace(COSINE, decay_samples=512)), config_of(512)),
    ],
)
def test_nothing_is_told_where_the_rate_stays_as_it_was(old: TrainConfig, new: TrainConfig) -> None:
    """Without a decay; within one global batch; and where optim.decay_samples holds the end of the decay."""
    assert change_of_rate(old, new, 128) is None


def test_decay_samples_fixes_the_end_of_the_decay_whatever_samples_is() -> None:
    fixed = replace(COSINE, decay_samples=11_000)
    rates = [learning_rate(n, 11_000, COSINE) for n in range(0, 20_000, 500)]
    for samples in (100, 5_000, 11_000, 10**6):
        assert [learning_rate(n, samples, fixed) for n in range(0, 20_000, 500)] == rates


def test_an_end_of_a_decay_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.decay_samples=256 with optim\.decay=constant: .*decay=cosine"):
        check(config_of(256, OptimConfig(decay_samples=256)))
    check(config_of(256, replace(COSINE, decay_samples=256)))


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Storage, Manifest]:
    """A run of 256 samples that has ended, and the manifest of its dataset."""
    manifest = small_cache.make_cache(str(tmp_path / "cache"), [4])
    run = open_storage(str(tmp_path / "run"))
    describe_run(config_of(256, run=run.url), run, manifest, {"train": manifest.digest})
    run.put("checkpoints/000000000256/commit.json", b"{}")
    return run, manifest


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text: said.append(str(text)))
    assert log.level <= logging.WARNING
    return said


def test_a_change_is_said_once_and_kept_through_all_later_starts(
    begun: tuple[Storage, Manifest], warnings: list[str]
) -> None:
    run, manifest = begun
    for samples in (256, 512, 512, 2048):
        config = config_of(samples, run=run.url)
        require_resumable(config, run)
        describe_run(config, run, manifest, {"train": manifest.digest})
    assert len(warnings) == 2
    assert "goes on at 256 samples with samples=512, where it was 256" in warnings[0]
    assert "the learning rate was to be 0 and is" in warnings[0]
    kept = read_facts(run)["changes"]
    assert [(change["n"], change["old"], change["new"]) for change in kept] == [(256, 256, 512), (256, 512, 2048)]


def test_the_advice_to_keep_the_decay_as_it_was_ends_well(begun: tuple[Storage, Manifest], warnings: list[str]) -> None:
    run, manifest = begun
    config = config_of(512, run=run.url)
    changes(config, run)
    (line,) = warnings
    assert "optim.decay_samples=256 keeps it as it was" in line
    kept = replace(config, optim=replace(COSINE, decay_samples=256))
    require_resumable(kept, run)
    describe_run(kept, run, manifest, {"train": manifest.digest})
    assert len(warnings) == 1
    assert "changes" not in read_facts(run)


def test_a_run_of_before_that_goes_on_as_it_was_has_no_changes(begun: tuple[Storage, Manifest]) -> None:
    run, manifest = begun
    before = run.get("run.json")
    describe_run(config_of(256, run=run.url), run, manifest, {"train": manifest.digest})
    assert run.get("run.json") == before
    old = "".join(line for line in to_yaml(config_of(256)).splitlines(True) if "decay_samples" not in line)
    run.put("config.yaml", old.encode())
    assert changes(config_of(256, run=run.url), run) == []
    assert json.loads(before)["contract"] == plain(manifest.contract)
