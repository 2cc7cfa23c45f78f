import json
from dataclasses import replace

import pytest

from made import cache as small_cache
from pipeline.config import DataConfig, DeepSpeedConfig, EncodersConfig, OptimConfig, TrainConfig
from pipeline.config.loading.merge import to_yaml
from pipeline.data.format.contract import plain
from pipeline.data.order.shuffle import ORDER
from pipeline.errors import RunError
from pipeline.runs.directory import (
    fixed_keys,
    is_finished,
    last_sample,
    load_run,
    require_resumable,
    require_same_datasets,
)
from pipeline.storage.urls import open_storage

CONTRACT = plain(small_cache.contract())
CONFIG = TrainConfig(run="r", samples=1000, data=DataConfig(train="cache"), optim=OptimConfig(batch=64))


@pytest.fixture
def run(tmp_path):
    """A run directory with a commit at 640 samples."""
    run = open_storage(str(tmp_path / "run"))
    run.put("config.yaml", to_yaml(CONFIG).encode())
    facts = {"order": ORDER, "manifests": {"train": "a" * 64}, "contract": CONTRACT}
    run.put("run.json", json.dumps(facts).encode())
    run.put("checkpoints/000000000640/commit.json", b"{}")
    return run


@pytest.fixture
def empty(tmp_path):
    return open_storage(str(tmp_path / "empty"))


def test_resume_must_without_a_checkpoint_is_an_error_and_never_a_fresh_start(empty):
    with pytest.raises(RunError, match="no checkpoint"):
        require_resumable(replace(CONFIG, resume="must"), empty)
    require_resumable(CONFIG, empty)
    require_resumable(replace(CONFIG, resume="never"), empty)


def test_resume_never_refuses_a_run_that_has_a_checkpoint(run):
    with pytest.raises(RunError, match="checkpoint at 640 samples"):
        require_resumable(replace(CONFIG, resume="never"), run)
    require_resumable(replace(CONFIG, resume="must"), run)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optim": OptimConfig(batch=64, lr=5e-4)}, r"optim\.lr was 0\.0001 and is 0\.0005"),
        ({"optim": OptimConfig(batch=128)}, r"optim\.batch was 64 and is 128"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"data": DataConfig(train="cache", tail="wrap")}, r"data\.tail was drop and is wrap"),
    ],
)
def test_a_configuration_of_another_run_is_refused_by_the_names_of_its_keys(run, change, named):
    changed = replace(CONFIG, **change)
    with pytest.raises(RunError, match=named):
        require_resumable(changed, run)
    assert fixed_keys(changed) != fixed_keys(CONFIG)


def test_keys_that_do_not_change_the_result_may_change_at_a_resume(run):
    changed = replace(
        CONFIG,
        samples=2000,
        data=DataConfig(train="elsewhere", workers=3),
        deepspeed=DeepSpeedConfig(stage=3),
        optim=OptimConfig(batch=64, micro_batch=8),
        precision="bf16",
        encoders=EncodersConfig(vae="/elsewhere/vae"),
    )
    require_resumable(changed, run)
    assert fixed_keys(changed) == fixed_keys(CONFIG)


def test_a_run_that_has_seen_more_than_is_asked_for_is_refused(run):
    with pytest.raises(RunError, match="seen 640 samples"):
        require_resumable(replace(CONFIG, samples=500), run)


def test_another_dataset_is_refused(run, empty):
    require_same_datasets(CONFIG, run, ["a" * 64], ())
    with pytest.raises(RunError, match="bbbbbbbbbbbb"):
        require_same_datasets(CONFIG, run, ["b" * 64], ())
    require_same_datasets(CONFIG, empty, ["b" * 64], ())


def test_a_run_that_took_its_samples_in_another_order_is_refused(run):
    run.put("run.json", json.dumps({"manifests": {"train": "a" * 64}, "contract": CONTRACT}).encode())
    with pytest.raises(RunError, match="version 1"):
        require_same_datasets(CONFIG, run, ["a" * 64], ())


def test_a_run_is_finished_when_its_last_sample_is_committed_and_evaluated(run):
    assert last_sample(CONFIG) == 1024
    assert not is_finished(CONFIG, run)
    run.put("checkpoints/000000001024/commit.json", b"{}")
    assert is_finished(CONFIG, run)
    evaluates = replace(CONFIG, data=DataConfig(train="cache", val="val"))
    assert not is_finished(evaluates, run)
    run.put("evals/000000001024/metrics.json", b"{}")
    assert is_finished(evaluates, run)
    assert not is_finished(replace(CONFIG, samples=2000), run)


def test_a_run_can_be_read_from_its_folder_alone(run):
    info = load_run(run.url)
    assert info.config == CONFIG
    assert info.manifests == {"train": "a" * 64}
    assert info.contract == CONTRACT


def test_a_folder_without_a_run_is_said_to_be_none(empty):
    with pytest.raises(RunError, match="not a run directory"):
        load_run(empty.url)
