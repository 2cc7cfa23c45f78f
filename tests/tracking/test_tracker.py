"""Metrics reach metrics.jsonl whatever happens to wandb, and no secret reaches either."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from made.wandb_files import history, offline_records
from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, LatentmillError, ShardCorrupt, StorageError
from pipeline.parsing.text import REDACTED, redact_values
from pipeline.storage.base import ObjectInfo, Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking import wandb_run
from pipeline.tracking.tracker import Tracker, parse_rows, read_rows
from servers.fault_proxy import Fault, FaultProxy

OFF = TrackingConfig(wandb="off")


def tracker(folder: Path, config: TrackingConfig = OFF, **arguments: object) -> Tracker:
    return Tracker(open_storage(str(folder)), config, **arguments)  # type: ignore[arg-type]


class Elsewhere(Storage):
    """Objects that are on no disk of this machine."""

    def __init__(self, root: Path) -> None:
        self.inner = open_storage(str(root))
        self.url = "s3://bucket/run"

    def get(self, key: str) -> bytes:
        return self.inner.get(key)

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        self.inner.read_into(key, offset, view)

    def put(self, key: str, data: bytes) -> None:
        self.inner.put(key, data)

    def put_file(self, key: str, path: Path) -> None:
        self.inner.put_file(key, path)

    def staging_path(self) -> Path:
        return self.inner.staging_path()

    def sweep(self, seconds: float) -> None:
        self.inner.sweep(seconds)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self.inner.put_if_absent(key, data)

    def stat(self, key: str) -> ObjectInfo:
        return self.inner.stat(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def local_path(self, key: str) -> None:
        return None

    def child(self, prefix: str) -> Storage:
        raise NotImplementedError


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_rows_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    log = tracker(tmp_path)
    log.log(64, {"loss": torch.tensor(0.5), "lr": np.float32(0.25), "steps_s": [0.1, 0.2], "bad": math.nan})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row.pop("time") == pytest.approx(time.time(), abs=60)
    assert row == {"n": 64, "kind": "train", "loss": 0.5, "lr": 0.25, "steps_s": [0.1, 0.2], "bad": None}
    log.close()


def test_start_drops_rows_beyond_n_and_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    with tracker(tmp_path) as log:
        log.start(0, world=2)
        for n in (64, 128, 192):
            log.log(n, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"n": 256, "lo')
    with tracker(tmp_path) as log:
        log.start(128, world=1)
        log.log(192, {"loss": 2.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["n"], row["kind"]) for row in rows] == [
        (0, "start"), (64, "train"), (128, "train"), (128, "start"), (192, "train")
    ]  # fmt: skip
    assert rows[-1]["loss"] == 2.0 and rows[-2]["world"] == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with tracker(tmp_path / "run", enabled=False) as log:
        log.start(0)
        log.log(1, {"loss": 1.0})
        log.image(1, "grid", b"")
        log.commit()
    assert not (tmp_path / "run").exists()


def test_run_that_is_not_local_gets_its_rows_at_commits(tmp_path: Path) -> None:
    run = Elsewhere(tmp_path / "remote")
    log = Tracker(run, OFF, folder=tmp_path / "local")
    log.log(64, {"loss": 1.0})
    assert not run.exists("metrics.jsonl")
    log.commit()
    assert [row["n"] for row in parse_rows(run.get("metrics.jsonl"))] == [64]
    log.log(128, {"loss": 1.0})
    log.close()
    again = Tracker(run, OFF, folder=tmp_path / "elsewhere")
    again.start(64)
    again.close()
    assert [(row["n"], row["kind"]) for row in parse_rows(run.get("metrics.jsonl"))] == [(64, "train"), (64, "start")]


@pytest.mark.parametrize(("error", "asked"), [(StorageError("gone"), False), (ShardCorrupt("damaged"), True)])
def test_a_store_that_is_gone_hides_no_error_before_it_and_is_not_asked_anew_when_that_was_its_own(
    s3: str,
    faults: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: LatentmillError,
    asked: bool,
) -> None:
    monkeypatch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 0.3)
    log = Tracker(open_storage(s3), OFF, folder=tmp_path)
    log.log(64, {"loss": 1.0})
    rule = faults.add(Fault(kind="reset"))
    with pytest.raises(type(error), match=str(error)), log:
        raise error
    assert (rule.injected > 0) == asked
    assert log._file is None


def test_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto, online, offline, off"):
        tracker(tmp_path, TrackingConfig(wandb="sometimes"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"api_key": "abc"}, {"api_key": REDACTED}),
        ({"a": {"wandbToken": "abc", "n": 3}}, {"a": {"wandbToken": REDACTED, "n": 3}}),
        ({"db": {"PASSWORD": 1}}, {"db": {"PASSWORD": REDACTED}}),
        ({"all": [{"aws_secret": "x"}]}, {"all": [{"aws_secret": REDACTED}]}),
        ({"url": "https://me:pass@host/x"}, {"url": f"https://{REDACTED}@host/x"}),
        ({"url": "https://h/x?a=1&X-Amz-Signature=ff&b=2"}, {"url": f"https://h/x?a=1&X-Amz-Signature={REDACTED}&b=2"}),
        ({"monkey": "see", "tokens": 77, "lr": 0.1}, {"monkey": "see", "tokens": 77, "lr": 0.1}),
    ],
)
def test_secrets_are_redacted_and_nothing_else_is(value: dict, expected: dict) -> None:
    assert redact_values(value) == expected


def test_wandb_offline_run_has_the_rows_the_pictures_and_no_secret(
    tmp_path: Path, logged_out: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret-environment")
    from pipeline.report.grid import png, tile

    picture = png(tile(np.zeros((1, 8, 8, 3), np.uint8), 1))
    settings = {"optim": {"lr": 0.5}, "s3_secret": "topsecret-config"}
    with tracker(tmp_path, TrackingConfig(), settings=settings, name="demo") as log:
        log.start(0)
        log.log(64, {"loss": 0.5, "nested": {"1": 0.25}})
        log.image(64, "samples", picture, "a circle")
        log.log(128, {"fid": 3.0}, kind="eval")
    records = offline_records(tmp_path)
    rows = history(records)
    assert any(
        row.get("train/loss") == 0.5 and row.get("train/nested.1") == 0.25 and row["samples"] == 64 for row in rows
    )
    assert any(row.get("eval/fid") == 3.0 and row["samples"] == 128 for row in rows)
    assert any("images/samples" in key for row in rows for key in row)
    assert any(record.metric.step_metric == "samples" for record in records)
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"topsecret" not in everything and REDACTED.encode() in everything


def test_alerts_and_checkpoints_are_rows_a_line_on_stderr_and_wandbs_own(
    tmp_path: Path, logged_out: None, capsys: pytest.CaptureFixture
) -> None:
    with tracker(tmp_path, TrackingConfig(wandb="offline")) as log:
        log.start(0)
        log.alert("spike", 64, "loss is 9, 9.0 times its median of late")
        log.checkpoint(128, "s3://me:secret@bucket/runs/a/checkpoints/000000000128/")
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] != "start"]
    assert [(row["n"], row["kind"]) for row in rows] == [(64, "alert"), (128, "checkpoint")]
    assert rows[0]["alert"] == "spike" and rows[0]["text"].startswith("loss is 9")
    url = f"s3://{REDACTED}@bucket/runs/a/checkpoints/000000000128/"
    assert rows[1]["url"] == url
    assert "warning: spike at 64 samples: loss is 9" in capsys.readouterr().err
    records = offline_records(tmp_path)
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text) for alert in alerts] == [
        ("spike", "at 64 samples: loss is 9, 9.0 times its median of late")
    ]
    summaries = [record.summary for record in records if record.WhichOneof("record_type") == "summary"]
    values = {item.key: json.loads(item.value_json) for summary in summaries for item in summary.update}
    assert values["checkpoint"] == url and values["checkpoint_samples"] == 128


def test_resumed_run_keeps_its_wandb_id(tmp_path: Path, logged_out: None) -> None:
    ids = []
    for n in (0, 64):
        with tracker(tmp_path, TrackingConfig(wandb="offline")) as log:
            log.start(n)
        runs = [record.run for record in offline_records(tmp_path) if record.WhichOneof("record_type") == "run"]
        ids.append(runs[0].run_id)
    assert ids[0] == ids[1] == (tmp_path / "wandb.id").read_text()


@pytest.mark.alone
def test_unreachable_wandb_costs_one_warning(
    tmp_path: Path, logged_out: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    began = time.monotonic()
    log = tracker(tmp_path, TrackingConfig())
    for n in range(100):
        log.log(n, {"loss": 1.0})
    assert time.monotonic() - began < 1
    log.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if " warning: " in line]
    assert len(warnings) == 1 and "cannot be reached" in warnings[0]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 100
    assert any("train/loss" in row for row in history(offline_records(tmp_path)))


def test_wandb_that_raises_never_ends_a_run(
    tmp_path: Path, logged_out: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("no room left")

    monkeypatch.setattr(wandb_run.WandbRun, "_open", broken)
    with tracker(tmp_path, TrackingConfig()) as log:
        for n in range(10):
            log.log(n, {"loss": 1.0})
            time.sleep(0.001)
    assert capsys.readouterr().err.count("no room left") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 10


@pytest.mark.alone
def test_wandb_that_hangs_is_left_behind(
    tmp_path: Path, logged_out: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(wandb_run.WandbRun, "_open", lambda self: time.sleep(20))
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(wandb_run, "QUEUED_ROWS", 3)
    began = time.monotonic()
    with tracker(tmp_path, TrackingConfig()) as log:
        for n in range(10):
            log.log(n, {"loss": 1.0})
    assert time.monotonic() - began < 10
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 10
    assert capsys.readouterr().err.count("warning") == 1
