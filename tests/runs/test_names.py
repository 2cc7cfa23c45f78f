"""What others put into a run directory is left alone by everything that reads or tidies one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made.commits import save
from made.lease import elsewhere
from pipeline.evaluation.beside import pending
from pipeline.runs import names
from pipeline.runs.directory import committed
from pipeline.runs.holder import holder_bytes
from pipeline.runs.lease import newest
from pipeline.runs.ledger import Stretch, read_ledger, truncate_ledgers
from pipeline.runs.retention import Retention, retain
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

STRAYS = (
    ".ipynb_checkpoints/commit-checkpoint.json",
    ".ipynb_checkpoints/commit.json",
    "000000000064 (copy)/commit.json",
    "000000000064.bak/commit.json",
    "backup/commit.json",
    "64/commit.json",
    "0000000000064/commit.json",
    "\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0666\u0664/commit.json",
    "\u00b2\u00b2\u00b2/commit.json",
    "+00000000064/commit.json",
    "000000000064/backup/commit.json",
    "000000000064/._commit.json",
    "000000000064/desktop.ini",
    "000000000064/rank00000-0123abcd.safetensors.orig",
    "000000000064/notes.txt",
    "._000000000064",
    "Thumbs.db",
    ".DS_Store",
    "commit.json",
    "-1/commit.json",
    "9999999999999999999999/commit.json",
)
"""Names that Jupyter, file managers, Macs, Windows and people leave under checkpoints/."""


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


@pytest.mark.parametrize("key", STRAYS)
def test_a_name_that_is_none_of_ours_is_no_checkpoint_and_stays(run: Storage, key: str) -> None:
    stray = f"checkpoints/{key}"
    run.put(stray, b"{}")
    for n in (64, 128, 192):
        save(run, n, retention=Retention(1))
    assert committed(run) == [192]
    assert run.get(stray) == b"{}"
    assert not [info.key for info in run.list("checkpoints/000000000064/") if info.key != stray]


def test_a_checkpoint_that_is_removed_leaves_what_others_put_beside_its_files(run: Storage) -> None:
    save(run, 64)
    run.put("checkpoints/000000000064/notes.txt", b"mine")
    save(run, 128)
    retain(run, Retention(1))
    assert [info.key for info in run.list("checkpoints/000000000064/")] == ["checkpoints/000000000064/notes.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("\u00b2\u00b2\u00b2.json", "000009 (copy).json", ".ipynb_checkpoints/000009.json", "._000009.json", "9.json"),
        *("000000.json", "000009.json~", "00000000000000000009.json", "\u0660\u0660\u0660\u0660\u0660\u0669.json"),
    ],
)
def test_a_name_that_is_none_of_ours_is_no_lease(run: Storage, name: str) -> None:
    run.put("lease/000002.json", holder_bytes(elsewhere(host="n2")))
    run.put(f"lease/{name}", b"not ours")
    number, holder = newest(run)
    assert holder is not None
    assert (number, holder.host) == (2, "n2")


@pytest.mark.parametrize(
    "name", ["rank00000.jsonl.bak", "._rank00000.jsonl", "rank0.jsonl", "old/rank00000.jsonl", "notes.jsonl"]
)
def test_a_name_that_is_none_of_ours_is_no_ledger_and_stays_as_it_is(run: Storage, name: str) -> None:
    lines = [Stretch(0, 8, 0, 1, 8, 1, 2), Stretch(8, 16, 0, 1, 8, 3, 4)]
    run.put("ledger/rank00000.jsonl", b"".join(json.dumps(vars(line)).encode() + b"\n" for line in lines))
    run.put(f"ledger/{name}", b"mine\n")
    truncate_ledgers(run, 8)
    assert read_ledger(run) == lines[:1]
    assert run.get(f"ledger/{name}") == b"mine\n"


def test_a_name_that_is_none_of_ours_is_no_snapshot_to_evaluate(run: Storage) -> None:
    for folder in ("000000000064", "000000000064 (copy)", ".ipynb_checkpoints", "\u00b2\u00b2", "64", "\u0666\u0664"):
        run.put(f"evals/{folder}/ema.safetensors", b"")
    assert pending(run) == [64]


@pytest.mark.parametrize(
    ("reader", "key", "value"),
    [
        (names.commit_of, names.checkpoint_folder(12800) + "commit.json", 12800),
        (names.commit_of, names.checkpoint_folder(10**14) + "commit.json", 10**14),
        (names.checkpoint_of, "checkpoints/000000012800/rank00003-3f9a0c21.safetensors", 12800),
        (names.checkpoint_of, "checkpoints/000000012800/rank123456-3f9a0c21.json", 12800),
        (names.lease_of, names.lease_key(1), 1),
        (names.lease_of, names.lease_key(1234567), 1234567),
        (names.ledger_of, names.ledger_key(7), 7),
        (names.evaluation_of, names.evaluation_folder(64) + "/metrics.json", (64, "")),
        (names.evaluation_of, names.evaluation_folder(64, "ddim-4-g2-n4-s0") + "/card.json", (64, "ddim-4-g2-n4-s0")),
        (names.evaluation_of, "evals/000000000064/deeper/card.json", None),
        (names.evaluation_of, "evals/jobs.log", None),
    ],
)
def test_names_of_ours_are_read_as_they_are_written(reader: Callable[[str], Any], key: str, value: Any) -> None:
    assert reader(key) == value


def test_the_newest_lease_counts_though_others_lie_beside(run: Storage) -> None:
    for number in (1, 2, 10):
        run.put(names.lease_key(number), holder_bytes(replace(elsewhere(), host=f"n{number}")))
    assert newest(run)[0] == 10
