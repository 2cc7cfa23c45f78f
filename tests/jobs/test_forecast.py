"""jobs/forecast.py: the plan's line of `latentmill submit`, and evaluations that cannot fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from made import cache as small_cache
from made.rates import calibration
from made.refusal import refusal
from pipeline import cli
from pipeline.config import ClusterConfig, EncodersConfig, EvalRunConfig
from pipeline.config.loading.load import load
from pipeline.data.format.contract_json import contract_to_json
from pipeline.errors import ConfigError, StorageError
from pipeline.jobs.eval import memory_notes
from pipeline.planning.rates.calibration import VARIABLE, add


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run on a small cache, on a machine without Slurm that nobody calibrated."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    small_cache.make_cache(str(tmp_path / "cache"), [16])
    small_cache.make_cache(str(tmp_path / "val"), [8])
    fitting = ["model=tiny", f"model.context_width={small_cache.WIDTH}", "optim.batch=8", "samples=80000"]
    return ["train", f"data.train={tmp_path}/cache", f"run={tmp_path}/r", *fitting, "--dry-run"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["submit", *words]) == 0
    return capsys.readouterr().err


def test_a_training_jobs_hours_and_price_are_told_before_it_is_submitted(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = said(capsys, *words, "cluster.gpu_type=h100", "cluster.processes=2", "cluster.price=2.5")
    line = next(line for line in told.splitlines() if "plan: " in line)
    assert " hours, " in line and "device-hours" in line and "at the given price" in line
    assert "arithmetic" in line
    assert "at the given price" not in said(capsys, *words, "cluster.gpu_type=h100")


def test_a_calibration_of_this_machine_is_what_the_line_is_based_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "rates.json"))
    add(tmp_path / "rates.json", calibration())
    assert "calibrated" in said(capsys, *words, "cluster.gpus=0", "cluster.processes=1")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["cluster.gpu_type=mi300"], "cluster.gpu_type=mi300 is none of b200"),
        ([], "no cluster.gpu_type"),
    ],
)
def test_a_gpu_that_nothing_is_known_of_gives_no_hours(
    words: list[str], more: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"plan: hours not known ({why}" in said(capsys, *words, *more)


def test_a_run_that_would_end_out_of_memory_at_its_first_evaluation_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps fit, and its evaluations do not."""
    many = [f"data.val={tmp_path}/val", "eval.sampler.batch=200000", "cluster.gpu_type=h100"]
    fits = said(capsys, *words, *many, "cluster.gpu_memory_gb=4000")
    assert "memory: an evaluation takes" in fits
    refused = refusal(capsys, 1, *words, *many, "cluster.gpu_memory_gb=2")
    assert "an evaluation takes" in refused and "lower eval.sampler.batch" in refused
    without = [word for word in many if not word.startswith("data.val")]
    assert "memory: that is" in said(capsys, *words, *without, "cluster.gpu_memory_gb=2")


def test_an_evaluation_that_a_gpu_cannot_hold_is_refused() -> None:
    """Its batch is a key of `latentmill eval` itself; on a GPU it draws in bf16; tiles are not looked at."""
    run = load("train", ["run=r", "data.train=c", "model=tiny", "encoders=demo"])
    described = contract_to_json(small_cache.contract(), 3)
    info: Any = SimpleNamespace(config=run, contract=described)
    gpu = ClusterConfig(gpus=1, gpu_memory_gb=2)
    config = EvalRunConfig(run="r", batch=200_000)
    with pytest.raises(ConfigError, match=r"an evaluation takes .* lower batch, or take a larger GPU"):
        memory_notes(config, info, gpu)
    fits = replace(config, batch=4)
    bf16, fp32 = (memory_notes(replace(fits, precision=name), info, gpu) for name in ("auto", "fp32"))  # type: ignore[arg-type]
    assert bf16[0].startswith("memory: an evaluation takes") and bf16 != fp32
    assert memory_notes(fits, info, replace(gpu, gpus=0)) == fp32
    large = replace(fits, encoders=EncodersConfig(name="sd1", vae="stabilityai/sd-vae-ft-mse"))
    assert memory_notes(large, info, gpu) != bf16
    assert memory_notes(replace(config, tile="auto"), info, gpu) == [
        "memory of the evaluation: not looked at (tile=auto)"
    ]


def test_what_is_only_not_known_does_not_end_submit(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*of: object) -> None:
        raise StorageError("a store that does not answer")

    monkeypatch.setattr("pipeline.jobs.forecast.encoders_of", unreadable)
    told = said(capsys, *words, f"data.val={tmp_path}/val", "cluster.gpu_type=h100")
    assert "plan: hours not known (a store that" in told and "not looked at (a store that" in told
