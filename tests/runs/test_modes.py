"""What a run writes has the modes that the umask asks for, and a disk that is full is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from made.lease import this_process
from pipeline import train
from pipeline.errors import StorageError
from pipeline.runs.lease import Lease, enqueue
from pipeline.runs.ledger import Ledger
from pipeline.storage.urls import open_storage
from ranks.faulty_run import BATCH, config_of, make_cache


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_files_and_folders_of_a_run_have_the_modes_that_the_umask_asks_for(tmp_path: Path, umask: int) -> None:
    cache = make_cache(tmp_path / "cache", [8, 8])
    before = os.umask(umask)
    try:
        assert train.main(config_of(str(tmp_path / "run"), cache, samples=2 * BATCH, every=BATCH)) == 0
        enqueue(open_storage(str(tmp_path / "queued")), "7")
    finally:
        os.umask(before)
    found = {path for name in ("run", "queued") for path in [tmp_path / name, *(tmp_path / name).rglob("*")]}
    assert {"config.yaml", "run.json", "metrics.jsonl", "commit.json", "rank00000.jsonl"} <= {p.name for p in found}
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_ledger_that_a_full_disk_does_not_take_is_one_line(tmp_path: Path) -> None:
    ledger = Ledger(open_storage(str(tmp_path)), tmp_path, 0, 1)
    ledger.start(0)
    ledger._path = Path("/dev/full")
    with pytest.raises(StorageError, match="the disk is full: cannot write /dev/full"):
        ledger.commit(8)


def test_a_run_in_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    """A file stands where the folder's parent should be: root, whom these tests may run as, may write anywhere else."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/run/lease/000001\.json: Not a directory"):
        Lease.take(open_storage(str(tmp_path / "file/run")), this_process())
