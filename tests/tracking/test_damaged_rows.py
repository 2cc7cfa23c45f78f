"""A metrics.jsonl that is damaged: rows are read, what is none is told apart, and going on loses neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config import TrackingConfig
from pipeline.errors import StorageError
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker, parse_lines, read_rows

ROW = b'{"n": 64, "time": 1.5, "kind": "train", "loss": 0.5}'
DAMAGED = [
    b"[" * 200_000,
    b'{"n": 64, "time": 1.5, "kind": "train", "x": ' + b"[" * 70 + b"]" * 70 + b"}",
    b'{"n": ' + b"9" * 4000 + b', "time": 1.5, "kind": "train"}',
    b'{"n": -1, "time": 1.5, "kind": "train"}',
    b'{"n": 9223372036854775808, "time": 1.5, "kind": "train"}',
    b'{"n": true, "time": 1.5, "kind": "train"}',
    b'{"n": 6.4, "time": 1.5, "kind": "train"}',
    b'{"n": "64", "time": 1.5, "kind": "train"}',
    b'{"n": 64, "kind": "train"}',
    b'{"n": 64, "time": 1.5}',
    b'{"n": 64, "time": "noon", "kind": "train"}',
    b'{"n": 64, "time": null, "kind": "train"}',
    b'{"n": 64, "time": NaN, "kind": "train"}',
    b'{"n": 64, "time": 1e999, "kind": "train"}',
    b'{"n": 64, "time": 1.5, "kind": 3}',
    b'{"n": 64, "time": 1.5, "kind": ["train"]}',
    b'{"n": 64, "n": 65, "time": 1.5, "kind": "train"}',
    b'{"n": 64, "time": 1.5, "kind": "\\ud800"}',
    b"[1, 2]",
    b"null",
    b"\0" * 4096,
    b"\xff\xfe{}",
    b"<html>",
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_line_that_is_no_row_is_counted_and_hides_no_other(line: bytes) -> None:
    rows, damaged = parse_lines(ROW + b"\n" + line + b"\n" + ROW + b"\n")
    assert ([row["loss"] for row in rows], damaged) == ([0.5, 0.5], 1)


def test_a_line_that_a_kill_has_cut_is_no_damage() -> None:
    assert parse_lines(ROW + b"\n" + ROW[:20]) == ([parse_lines(ROW)[0][0]], 0)


def test_going_on_drops_rows_beyond_n_and_keeps_every_line_that_it_cannot_read(tmp_path: Path) -> None:
    later = ROW.replace(b"64", b"128")
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([ROW, *DAMAGED, later, ROW]) + b"\n" + later[:20])
    with Tracker(open_storage(str(tmp_path)), TrackingConfig(wandb="off")) as tracker:
        tracker.start(64)
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines[:-2] == [ROW, *DAMAGED, ROW] and b'"start"' in lines[-2] and lines[-1] == b""
    assert [row["kind"] for row in read_rows(tmp_path / "metrics.jsonl")] == ["train", "train", "start"]


def test_a_folder_in_place_of_the_metrics_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl is a folder"):
        Tracker(open_storage(str(tmp_path)), TrackingConfig(wandb="off"))


def test_metrics_of_a_terabyte_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    os.truncate(tmp_path / "metrics.jsonl", 10**12)
    with pytest.raises(StorageError, match=r"has 1,000,000,000,000 bytes, .* move it away"):
        Tracker(open_storage(str(tmp_path)), TrackingConfig(wandb="off"))


def test_a_full_disk_ends_a_run_with_a_line_that_names_the_file(tmp_path: Path) -> None:
    """/dev/full stands for a disk that is full."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(open_storage(str(tmp_path)), TrackingConfig(wandb="off"), enabled=False)
    tracker._enabled, tracker._path = True, tmp_path / "metrics.jsonl"
    with pytest.raises(StorageError, match=r"the disk is full: cannot write .*metrics\.jsonl"), tracker:
        tracker.log(1, {"loss": 1.0})
