"""TensorBoard gets what wandb gets, no row twice and none less after a kill, and never ends a run."""

from __future__ import annotations

import json
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from made.event_files import accumulated, points, points_of, served
from made.wandb_files import history, offline_records
from pipeline import cli
from pipeline.config import TrackingConfig
from pipeline.errors import StorageError
from pipeline.parsing.redaction import REDACTED
from pipeline.report.grid import png, tile
from pipeline.runs.directory import committed
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.tracking import event_files
from pipeline.tracking.event_files import EventFiles
from pipeline.tracking.tracker import Tracker, parse_rows, read_rows
from ranks.faulty_run import EVERY, losses, make_cache
from servers.warm_ranks import WarmRanks

TENSORBOARD = TrackingConfig(to=("tensorboard",))


def tracker(folder: Path, config: TrackingConfig = TENSORBOARD, **arguments: object) -> Tracker:
    return Tracker(open_storage(str(folder)), config, **arguments)  # type: ignore[arg-type]


def files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").iterdir())


def test_tensorboard_has_the_names_the_steps_and_the_pictures_of_wandb_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret-environment")
    picture = png(tile(np.zeros((1, 8, 16, 3), np.uint8), 1))
    settings = {"optim": {"lr": 0.5}, "s3_secret": "topsecret-config"}
    both = TrackingConfig(to=("wandb", "tensorboard"), wandb="offline")
    with tracker(tmp_path, both, settings=settings) as log:
        log.start(0, world=2, engine="torch")
        log.log(64, {"loss": 0.5, "nested": {"1": 0.25}, "bad": float("nan"), "fine": True, "steps_s": [1.0]})
        log.image(64, "samples", picture, "1. a circle")
        log.log(128, {"fid": 3.0, "weights": "ema"}, kind="eval")
        log.alert("spike", 128, "loss is 9 \x1b]0;owned\x07 https://me:topsecret@host/")
        log.checkpoint(128, "s3://me:topsecret@bucket/a", write_s=0.5, bytes=9)
    sent = [row for row in history(offline_records(tmp_path)) if "samples" in row]
    names = {(name, row["samples"]) for row in sent for name in row if "/" in name and "images/" not in name}
    assert {(name, n) for name, n, _ in points(tmp_path)} == names
    assert points(tmp_path) == points_of(read_rows(tmp_path / "metrics.jsonl"))
    assert ("train/nested.1", 64, 0.25) in points(tmp_path)
    found = accumulated(tmp_path)
    assert [(one.step, one.encoded_image_string) for one in found.Images("images/samples")] == [(64, picture)]
    texts = {tag: found.Tensors(tag)[0] for tag in found.Tags()["tensors"]}
    assert {tag.removesuffix("/text_summary"): one.step for tag, one in texts.items()} == {
        "alert/spike": 128, "config": 0, "images/samples": 64
    }  # fmt: skip
    assert b"1. a circle" in texts["images/samples/text_summary"].tensor_proto.string_val[0]
    assert b"loss is 9" in texts["alert/spike/text_summary"].tensor_proto.string_val[0]
    assert b'"lr": 0.5' in texts["config/text_summary"].tensor_proto.string_val[0]
    everything = b"".join(path.read_bytes() for path in files(tmp_path))
    assert b"topsecret" not in everything and b"\x1b]" not in everything and REDACTED.encode() in everything


@pytest.mark.parametrize(("n", "lost"), [(128, 0), (256, 120)])
def test_a_run_that_goes_on_has_no_row_twice_and_none_less(tmp_path: Path, n: int, lost: int) -> None:
    """Of a process that was killed: what lies beyond the commit is gone, and what the file lost is there again."""
    killed = tracker(tmp_path)
    killed.start(0)
    for seen in (64, 128, 192, 256):
        killed.log(seen, {"loss": seen / 64})
        killed.log(seen, {"loss": seen / 32}, kind="val")
    killed._close()
    (first,) = files(tmp_path)
    first.write_bytes(first.read_bytes()[: first.stat().st_size - lost])
    with tracker(tmp_path) as log:
        log.start(n)
        assert points(tmp_path) == points_of(read_rows(tmp_path / "metrics.jsonl"))
        for kind in ("train", "val"):
            log.log(n + 48, {"loss": 9.0}, kind=kind)
    assert [path.name for path in files(tmp_path)] == [f"events.out.tfevents.00000{number}" for number in (1, 2)]
    rows = points_of(read_rows(tmp_path / "metrics.jsonl"))
    assert points(tmp_path) == rows
    losses = [(seen, seen / 64) for seen in (64, 128, 192, 256) if seen <= n] + [(n + 48, 9.0)]
    assert sorted(point[1:] for point in points(tmp_path) if point[0] == "train/loss") == losses
    assert served(tmp_path, lambda shown: ("val/loss", n + 48, 9.0) in shown) == rows


def test_rows_and_pictures_of_lives_that_differ_are_shown_as_metrics_jsonl_has_them(tmp_path: Path) -> None:
    """The second life was not tracked by TensorBoard, and trained what the first one had trained beyond the commit,
    with fewer rows."""
    picture = png(tile(np.zeros((1, 8, 8, 3), np.uint8), 1))
    with tracker(tmp_path) as log:
        log.start(0)
        for seen in (64, 128, 192, 256):
            log.log(seen, {"loss": 1.0})
            log.image(seen, "samples", picture, "a circle")
    with tracker(tmp_path, TrackingConfig(to=())) as log:
        log.start(128)
        log.log(256, {"loss": 2.0})
    for _ in range(2):  # and what goes on without a difference writes nothing again
        with tracker(tmp_path) as log:
            log.start(256)
        assert points(tmp_path) == points_of(read_rows(tmp_path / "metrics.jsonl"))
        assert [one.step for one in accumulated(tmp_path).Images("images/samples")] == [64, 128, 192, 256]
    assert len(files(tmp_path)[1].read_bytes()) > 2 * len(files(tmp_path)[2].read_bytes())


def test_a_damaged_file_before_whole_ones_costs_no_point_in_either_loader(tmp_path: Path) -> None:
    for seen in (0, 128, 256):
        with tracker(tmp_path) as log:
            log.start(seen)
            for n in (seen + 64, seen + 128):
                log.log(n, {"loss": n / 64})
    files(tmp_path)[0].write_bytes(b"\xff" * 400)
    with tracker(tmp_path) as log:
        log.start(384)
        log.log(448, {"loss": 7.0})
    rows = points_of(read_rows(tmp_path / "metrics.jsonl"))
    assert points(tmp_path) == rows
    assert served(tmp_path, lambda shown: ("train/loss", 448, 7.0) in shown) == rows


def test_rows_behind_a_flipped_bit_are_written_again(tmp_path: Path) -> None:
    """TensorBoard's Python loader compares checksums, and reads no further there."""
    with tracker(tmp_path) as log:
        log.start(0)
        for n in (64, 128):
            log.log(n, {"loss": n / 64})
    (file,) = files(tmp_path)
    data, value = file.read_bytes(), struct.pack("<f", 1.0)
    assert data.count(value) == 1
    file.write_bytes(data.replace(value, struct.pack("<f", 2.0)))
    with tracker(tmp_path) as log:
        log.start(128)
    assert points(tmp_path) == points_of(read_rows(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 400, b"\x0c" + bytes(11) + b"\xff" * 16])
def test_rows_of_a_damaged_file_are_written_again(tmp_path: Path, damage: bytes) -> None:
    with tracker(tmp_path) as log:
        log.start(0)
        log.log(64, {"loss": 1.0})
    files(tmp_path)[0].write_bytes(damage)
    with tracker(tmp_path) as log:
        log.start(64)
    assert points(tmp_path) == points_of(read_rows(tmp_path / "metrics.jsonl"))


def test_a_run_that_is_tracked_later_has_all_its_rows(tmp_path: Path) -> None:
    with tracker(tmp_path, TrackingConfig(to=())) as log:
        log.start(0)
        log.log(64, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()
    with tracker(tmp_path) as log:
        log.start(64)
        log.log(128, {"loss": 2.0})
    assert points(tmp_path) == points_of(read_rows(tmp_path / "metrics.jsonl"))


def test_in_a_bucket_the_file_is_there_at_commits_and_a_run_goes_on_elsewhere(s3: str, tmp_path: Path) -> None:
    run = open_storage(s3)
    killed = Tracker(run, TENSORBOARD, folder=tmp_path / "one")
    killed.start(0)
    killed.log(64, {"loss": 1.0})
    assert [info.size for info in run.list("tensorboard/")] == [0]
    killed.commit()
    assert [info.key for info in run.list()] == ["metrics.jsonl", "tensorboard/events.out.tfevents.000001"]
    killed.log(128, {"loss": 1.0})
    killed._close()
    with Tracker(run, TENSORBOARD, folder=tmp_path / "two") as log:
        log.start(64)
        log.log(128, {"loss": 2.0})
    copy = open_storage(str(tmp_path / "copy"))
    for info in run.list():
        copy.put(info.key, run.get(info.key))
    assert points(tmp_path / "copy") == points_of(parse_rows(run.get("metrics.jsonl")))
    assert ("train/loss", 128, 2.0) in points(tmp_path / "copy")


def test_an_upload_that_fails_costs_one_warning_and_no_commit(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_storage(s3)
    put = type(run).put

    def refused(self: Storage, key: str, data: bytes) -> None:
        if "tfevents" in key:
            raise StorageError("no room left")
        put(self, key, data)

    with Tracker(run, TENSORBOARD, folder=tmp_path) as log:
        log.start(0)
        with monkeypatch.context() as patch:
            patch.setattr(type(run), "put", refused)
            log.commit()
            log.commit()
        assert [info.size for info in run.list("tensorboard/")] == [0]
        log.commit()
        assert [info.size > 0 for info in run.list("tensorboard/")] == [True]
        (tmp_path / "tensorboard/events.out.tfevents.000001").unlink()  # nor does a temporary file that is gone
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: TensorBoard's event files cannot be written (no room left)" in line


def test_in_a_bucket_a_large_file_is_uploaded_once_and_goes_on_in_the_next(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_files, "TURN_BYTES", 50)
    run, puts = open_storage(s3), list[str]()
    put = type(run).put

    def counted(self: Storage, key: str, data: bytes) -> None:
        puts.append(key.removeprefix("tensorboard/events.out.tfevents."))
        if (puts[-1], puts.count("000002")) == ("000002", 1):
            raise StorageError("no room left")
        put(self, key, data)

    monkeypatch.setattr(type(run), "put", counted)
    with Tracker(run, TENSORBOARD, folder=tmp_path / "local") as log:
        log.start(0)
        for n in (64, 128, 192):
            log.log(n, {"loss": n / 64})
            log.commit()
    assert puts == ["metrics.jsonl", "000001", "metrics.jsonl", "000002", "metrics.jsonl", "000002", "000003",
                    "metrics.jsonl"]  # fmt: skip
    copy = open_storage(str(tmp_path / "copy"))
    for info in run.list():
        copy.put(info.key, run.get(info.key))
    assert points(tmp_path / "copy") == points_of(parse_rows(run.get("metrics.jsonl")))


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_processes_that_begin_at_once_write_files_of_their_own(
    where: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_storage(s3 if where == "bucket" else str(tmp_path / "run"))
    monkeypatch.setattr(EventFiles, "_files", lambda self: [])  # neither sees the other's
    one, two = (Tracker(run, TENSORBOARD, folder=tmp_path / name) for name in ("1", "2"))
    with one, two:
        one.log(64, {"loss": 1.0})
        two.log(64, {"fid": 2.0}, kind="eval")
    written = {info.key: run.get(info.key) for info in run.list("tensorboard/")}
    assert [key[-1] for key in written] == ["1", "2"]
    assert [[name in data for name in (b"train/loss", b"eval/fid")] for data in written.values()] == [
        [True, False], [False, True]
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_files_that_cannot_be_written_cost_one_warning(
    where: str, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    run = open_storage(s3 if where == "bucket" else str(tmp_path))
    with Tracker(run, TENSORBOARD, folder=tmp_path) as log:
        log.start(0)
        for n in range(1, 9):
            log.log(n, {"loss": 1.0})
            log.commit()
    assert len(parse_rows(run.get("metrics.jsonl"))) == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: TensorBoard's event files cannot be written (FileExistsError" in line


@pytest.mark.parametrize("damaged", [b"no picture", b"no picture at all, and long", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_picture_costs_a_warning_and_nothing_else(
    damaged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracker(tmp_path) as log:
        log.start(0)
        log.image(64, "samples", damaged)
        log.log(64, {"loss": 1.0})
        log.image(128, "samples", png(tile(np.zeros((1, 8, 8, 3), np.uint8), 1)))
    assert ("train/loss", 64, 1.0) in points(tmp_path)
    assert [one.step for one in accumulated(tmp_path).Images("images/samples")] == [128]
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: the picture samples at 64 samples is damaged" in line


def test_alerts_of_one_kind_at_one_n_are_in_one_text(tmp_path: Path) -> None:
    """Of several texts at a step TensorBoard's fast loader shows the last."""
    with tracker(tmp_path) as log:
        log.start(0)
        log.alert("spike", 64, "earlier")
        log.alert("spike", 128, "first")
    with tracker(tmp_path) as log:
        log.start(128)
        log.alert("spike", 128, "second")
        log.alert("stall", 128, "third")
    found = accumulated(tmp_path)
    last = found.Tensors("alert/spike/text_summary")[-1]
    assert (last.step, last.tensor_proto.string_val[0]) == (128, b"    first\n    second")
    assert [one.tensor_proto.string_val[0] for one in found.Tensors("alert/stall/text_summary")] == [b"    third"]


def test_without_its_package_a_run_says_so_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = [f"run={tmp_path}/run", f"data.train={tmp_path}/cache", "tracking.to=[wandb,tensorboard]"]
    assert cli.main(["train", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not installed: pip install 'latentmill[tensorboard]'" in line
    assert not any(tmp_path.iterdir())
    assert cli.main(["train", *words[:2], "tracking.to=[mlflow]"]) == 1
    assert "mlflow" in capsys.readouterr().err


def test_a_run_that_is_killed_twice_ends_with_the_rows_of_an_undisturbed_one(
    tmp_path: Path, warm_ranks: WarmRanks
) -> None:
    """Once between a commit and TensorBoard's row of it, once between two commits."""
    make_cache(tmp_path / "cache")
    run = tmp_path / "run"
    for when, there in (("committed", EVERY), ("training", 2 * EVERY)):
        assert warm_ranks.run("ranks.tracked_run", [str(tmp_path), "run", when], 1).returncode == 128 + signal.SIGKILL
        assert committed(open_storage(str(run)))[0] == there
        lacking = points_of(read_rows(run / "metrics.jsonl")) - points(run)
        assert bool(lacking) == (when == "committed")
    for name in ("run", "undisturbed"):
        ended = warm_ranks.run("ranks.tracked_run", [str(tmp_path), name], 1)
        assert ended.returncode == 0, ended.stderr[-2000:]
    shown = points(run)
    assert shown == points_of(read_rows(run / "metrics.jsonl"))
    assert [path.name[-1] for path in files(run)] == ["1", "2", "3"]
    steps = {n: value for name, n, value in points(tmp_path / "undisturbed") if name == "train/loss"}
    assert {n: value for name, n, value in shown if name == "train/loss"} == steps
    assert losses(str(run)) == losses(str(tmp_path / "undisturbed"))
    assert json.loads((run / "lease/000003.json").read_bytes())["state"] == "finished"
