"""Verbs that want one average read that alone, and nothing that they use is unproved (docs/explained/commits.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from made.commits import KINDS, SHAPES, STAMP, save, save_now, state_of, values
from pipeline.distributed.world import World
from pipeline.errors import CheckpointCorrupt, RunError
from pipeline.runs.averages import load_average
from pipeline.runs.checkpoint import load_weights, newest_good, read_commit, seal
from pipeline.runs.directory import checkpoint_folder
from pipeline.runs.fragments import Fragment, Section, are_sections
from pipeline.runs.profiles import kind_of
from pipeline.storage.local import LocalStorage
from pipeline.training.saver import Stamp

LENGTH = 100_000
"""Elements of the large state's parameter."""
WIDTHS = (0.05, 0.1)
LARGE = ("weights", "exp_avg", "exp_avg_sq", "ema", *map(kind_of, WIDTHS))
LARGE_STAMP = Stamp(stage="torch", config={}, manifests={"train": "m"}, shapes={"w": (LENGTH,)})


class Counting(LocalStorage):
    """Counts the bytes of checkpoints' files that are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts = [0]

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        super().read_into(key, offset, view)
        if key.endswith(".safetensors"):
            self.counts[0] += len(view)

    def child(self, prefix: str) -> Counting:
        below = Counting(self.root / prefix)
        below.counts = self.counts
        return below


def large_state(n: int) -> dict[str, list[Fragment]]:
    return {kind: [Fragment("w", 0, torch.full((LENGTH,), n + LARGE.index(kind) / 8))] for kind in LARGE}


def save_large(run: LocalStorage, n: int) -> None:
    save_now(run, World(), large_state(n), n=n, steps=n // 10, stamp=LARGE_STAMP)


def kinds_read(run: Counting, action: Callable[[], Any]) -> float:
    """How many kinds' bytes an action reads."""
    run.counts[0] = 0
    action()
    return run.counts[0] / (4 * LENGTH)


def without_sections(run: LocalStorage, n: int) -> None:
    """Make the commit one of an earlier version, which has hashes of whole files alone."""
    commit = read_commit(run, n)
    for entry in commit.files:
        del entry["sections"]
    run.put(checkpoint_folder(n) + "commit.json", seal(commit))


def file_of(run: LocalStorage, n: int) -> Path:
    path = run.local_path(checkpoint_folder(n) + read_commit(run, n).files[0]["name"])
    assert path is not None
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def begin_of(run: LocalStorage, n: int, kind: str) -> int:
    """Byte of the first value of a kind in the checkpoint's only file."""
    begin = 0
    for section in read_commit(run, n).files[0]["sections"]:
        if section["kind"] == kind:
            return begin
        begin += section["bytes"]
    raise KeyError(kind)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_average_is_read_without_the_moments_and_the_other_averages(tmp_path: Path, weights: str) -> None:
    run = Counting(tmp_path)
    save_large(run, 100)
    assert 1.0 <= kinds_read(run, lambda: load_weights(run, which=weights)) < 1.01
    n, loaded = load_weights(run, which=weights)
    assert (n, loaded["w"].unique().tolist()) == (100, [100.375 if weights == "ema" else 100.0])


def test_another_stored_average_is_read_alone_and_a_fitted_one_reads_each_snapshot_once(tmp_path: Path) -> None:
    run = Counting(tmp_path)
    save_large(run.child("averages"), 50)
    save_large(run, 100)
    assert 1.0 <= kinds_read(run, lambda: load_average(run, ema=WIDTHS[0])) < 1.01
    assert 4.0 <= kinds_read(run, lambda: load_average(run, ema=0.07)) < 4.04  # two widths, at two times


def test_a_commit_of_an_earlier_version_is_read_after_all_of_it_was_proved(tmp_path: Path) -> None:
    run = Counting(tmp_path)
    save_large(run, 100)
    expected = load_weights(run)[1]["w"]
    start = begin_of(run, 100, "exp_avg")
    without_sections(run, 100)
    assert kinds_read(run, lambda: load_weights(run)) >= len(LARGE)
    assert torch.equal(load_weights(run)[1]["w"], expected)
    flip(file_of(run, 100), start)
    with pytest.raises(CheckpointCorrupt, match="its SHA-256 does not match"):
        load_weights(run, 100)


def test_no_byte_that_has_changed_is_used(tmp_path: Path) -> None:
    """Wherever a bit of the file flips (every third byte is tried): either it is told, or it was none of the average
    and of the header."""
    run = LocalStorage(tmp_path)
    save(run, 100)
    path = file_of(run, 100)
    whole = path.read_bytes()
    first, passed = begin_of(run, 100, "weights"), []
    tried = range(0, len(whole), 3)
    for at in tried:
        flip(path, at)
        with suppress(CheckpointCorrupt):
            _, loaded = load_weights(run, 100)
            passed.append(at)
            assert torch.equal(torch.cat([loaded[name].flatten() for name in SHAPES]), values(100, "ema"))
        path.write_bytes(whole)
    size = 4 * 17
    ema = first + KINDS.index("ema") * size
    assert passed == [at for at in tried if at >= first and not ema <= at < ema + size]


def test_a_damaged_average_is_passed_over_aloud_and_damaged_moments_hinder_a_resume_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = LocalStorage(tmp_path)
    save(run, 100)
    save(run, 200)
    flip(file_of(run, 200), begin_of(run, 200, "exp_avg") + 3)
    assert load_weights(run)[0] == 200
    assert "damaged" not in capsys.readouterr().err
    commit = newest_good(run)
    assert commit is not None
    assert commit.n == 100
    flip(file_of(run, 200), begin_of(run, 200, "ema") + 3)
    assert load_weights(run)[0] == 100
    assert "the checkpoint at 200 samples is damaged" in capsys.readouterr().err
    flip(file_of(run, 100), begin_of(run, 100, "ema") + 3)
    with pytest.raises(CheckpointCorrupt, match=r"no checkpoint of .* is whole"):
        load_weights(run)


@pytest.mark.parametrize("ema", [0.0, 0.07])
def test_an_average_of_other_parameters_is_no_damage_and_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ema: float
) -> None:
    """An autoencoder's average is of its model alone; older commits have no more of it."""
    run = LocalStorage(tmp_path)
    for n in (100, 200):
        state = state_of(n)
        state["ema"] = [fragment for fragment in state["ema"] if fragment.name == "conv"]
        state |= {kind_of(width): state["ema"] for width in WIDTHS}
        save_now(run, World(), state, n=n, steps=1, stamp=STAMP)
    assert list(load_average(run, ema=ema, prefixes=("conv",))[1]) == ["conv"]
    with pytest.raises(RunError, match=r"the commit at 200 samples holds no values of bias .*; weights=raw is of all"):
        load_average(run, ema=ema)
    assert "damaged" not in capsys.readouterr().err


def section(kind: str, size: int) -> Section:
    return Section(kind, size, "a" * 64)


def test_sections_that_a_file_cannot_have_are_no_sections() -> None:
    header, ema = section("", 100), section("ema", 60)
    assert are_sections([header, ema], 160)
    assert not are_sections([], 0)
    assert not are_sections([ema], 60)
    assert not are_sections([ema, header], 160)
    assert not are_sections([header, ema], 161)
    assert not are_sections([header, ema, ema], 220)
    assert not are_sections([section("", 1 << 40), ema], (1 << 40) + 60)


def reseal(run: LocalStorage, sections: Any) -> None:
    """Seal the commit at 100 samples again, with other sections of its only file."""
    key = checkpoint_folder(100) + "commit.json"
    commit = read_commit(run, 100)
    commit.files[0]["sections"] = sections
    run.put(key, seal(commit))


@pytest.mark.parametrize("wrong", [5, ["x"], [{"kind": ""}], [{"kind": "", "bytes": 5, "sha256": "a" * 64}], {"": 1}])
def test_a_commit_with_sections_that_no_run_can_have_sealed_is_damaged(tmp_path: Path, wrong: Any) -> None:
    run = LocalStorage(tmp_path)
    save(run, 100)
    reseal(run, wrong)
    with pytest.raises(CheckpointCorrupt, match=r"commit\.json"):
        load_weights(run, 100)


def test_values_that_lie_outside_of_the_section_of_their_kind_are_refused(tmp_path: Path) -> None:
    """Their hash would be that of other values."""
    run = LocalStorage(tmp_path)
    save(run, 100)
    sections = json.loads(json.dumps(read_commit(run, 100).files[0]["sections"]))
    named = {entry["kind"]: entry for entry in sections}
    named["ema"]["kind"], named["exp_avg"]["kind"] = "exp_avg", "ema"  # both have hashes that are right
    reseal(run, sections)
    with pytest.raises(CheckpointCorrupt, match="its commit has no hash of that kind"):
        load_weights(run, 100)


def test_what_a_run_commits_has_a_hash_of_every_kind(tmp_path: Path) -> None:
    run = LocalStorage(tmp_path)
    save_now(run, World(), large_state(10), n=10, steps=1, stamp=LARGE_STAMP)
    (entry,) = read_commit(run, 10).files
    assert [one["kind"] for one in entry["sections"]] == ["", *LARGE]
    assert sum(one["bytes"] for one in entry["sections"]) == entry["bytes"]
