"""convert as a process of its own: killed or asked to stop, the same command goes on to the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from made.annotated import converted, summary, write_pictures
from made.encode import files

IMAGES = 120


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_killed_process_leaves_nothing_half_made(tmp_path: Path, number: int, status: int) -> None:
    write_pictures(tmp_path / "images", {f"{i % 3}/{i:04d}.png": (8, 8) for i in range(IMAGES)})
    whole = files(converted(tmp_path, "classes", dest=str(tmp_path / "whole"), shard_size=2))
    words = ["from=classes", f"images={tmp_path / 'images'}", f"dest={tmp_path / 'out'}", "shard_size=2"]
    process = subprocess.Popen([sys.executable, "-m", "preprocess.convert", *words], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "out" / "00001.tar").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == status, told
    left = files(tmp_path / "out")
    assert "convert.json" not in left
    assert left and {name: data for name, data in whole.items() if name in left} == left
    assert files(converted(tmp_path, "classes", shard_size=2)) == whole
    assert summary(tmp_path / "out")["images"] == IMAGES
