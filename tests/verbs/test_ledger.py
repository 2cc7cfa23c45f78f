"""`latentmill ledger`: a run's ledger proves each sample once over kills and changes of world, or names what is wrong.

The stream, the ledger and the proof are the real ones; in place of a UNet, a loop that only consumes, with all ranks in
one process.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made.cache import make_cache
from pipeline import cli
from pipeline.config import TrainConfig
from pipeline.data.format.manifest import commit_manifest, load_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading import stream as stream_module
from pipeline.data.reading.batch import Batch
from pipeline.ledger import examine
from pipeline.runs.directory import load_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from ranks.consumed_run import BATCH, END, SIZES, WORLDS, Seen, begin, live


@pytest.fixture(autouse=True)
def streams_that_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POLL", 0.005), ("HORIZON_BATCHES", 8), ("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8)):
        monkeypatch.setattr(stream_module, name, value)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("ledger") / "cache")
    make_cache(url, SIZES)
    return url


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: str) -> tuple[str, Seen]:
    seen: Seen = {}
    config = begin(tmp_path_factory.mktemp("whole"), cache)
    live(config, 1, seen)
    return config.run, seen


@given(
    first=st.sampled_from(WORLDS),
    lives=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(0, 4)), min_size=10, max_size=10),
)
@settings(max_examples=1, deadline=None)
def test_a_run_killed_ten_times_on_changing_worlds_is_proved_and_sees_the_batches_of_an_undisturbed_one(
    cache: str, undisturbed: tuple[str, Seen], first: int, lives: list[tuple[int, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config, at = begin(folder, cache), WORLDS.index(first)
        seen: Seen = {}
        for other, steps, torn in lives:
            live(config, WORLDS[at], seen, steps=steps, torn=min(torn, WORLDS[at]))
            at = (at + other) % len(WORLDS)
        live(config, WORLDS[at], seen)
        lines, proof = examine(load_run(folder), folder)
        assert proof.problems == []
        assert totals(lines) == totals(read_ledger(open_storage(undisturbed[0])))
        assert sum(span.last - span.first for span in proof.spans) == END == sum(e.samples for e in proof.epochs)
        assert [(e.samples, e.used) for e in proof.epochs] == [(40, 40)] * 6
    assert seen == undisturbed[1]
    assert sorted(seen) == list(range(END))


# --------------------------------------------------------------------------------------------------------------------
# What is wrong is named


@pytest.fixture
def config(tmp_path: Path, cache: str) -> TrainConfig:
    return begin(tmp_path / "run", cache)


def refusal(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which a run is not proved."""
    assert cli.main(["ledger", config.run]) == 1
    said = capsys.readouterr()
    assert "Proved" not in said.out
    assert "NOT PROVED" in said.out or "  ! " in said.out
    assert said.err.count("\n") == 1
    return said.err


def expected(config: TrainConfig, number: int) -> str:
    cache = open_storage(config.data.train)
    blocks = dataset_of(cache, load_manifest(cache))
    found = blocks.order(config.seed, BATCH).locate(np.array([number]))
    return f"{int(blocks.shards[found.block[0]]):06d}.tar row {blocks.rows(int(found.block[0]))[found.place[0]]}"


def with_other_row(batch: Batch) -> Batch:
    rows = batch.rows.clone()
    rows[1] += 1
    return dataclasses.replace(batch, rows=rows)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda batch: [], "its share of the batch at sample 64 was left out"),
        (lambda batch: [batch, batch], "its share of the batch at sample 64 was taken twice"),
        (lambda batch: [with_other_row(batch)], "its records are others than those the order names"),
        (lambda batch: [batch, with_other_row(batch)], "counted 16 samples where 12 are due"),
    ],
)
def test_a_batch_left_out_or_repeated_or_a_wrong_record_is_named_with_its_rank_and_records(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], change: Callable[[Batch], list[Batch]], verdict: str
) -> None:
    live(config, 2, {}, change=lambda rank, batch: change(batch) if (rank, batch.n) == (1, 64) else [batch])
    said = refusal(config, capsys)
    assert f"samples 48 to 71, rank 1 of 2: {verdict}; the order names: sample " in said
    number = int(said.partition("the order names: sample ")[2].split(" ")[0])
    assert number == (68 if "the batch at sample 64" in verdict else 52)
    assert f"sample {number} = {expected(config, number)}" in said


def test_a_batch_trained_on_in_place_of_another_is_named_with_it(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[Batch] = []

    def change(rank: int, batch: Batch) -> list[Batch]:
        held.append(batch)
        return [held[-2]] if batch.n == 64 else [batch]

    live(config, 1, {}, change=change)
    said = refusal(config, capsys)
    assert "batch at sample 64 was left out and its share of the batch at sample 56 was taken twice" in said


def test_a_lost_ledger_file_is_named(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    live(config, 1, {}, steps=6)
    live(config, 4, {})
    (Path(config.run) / "ledger" / "rank00002.jsonl").unlink()
    said = refusal(config, capsys)
    assert "is not proved: samples 48 to 239: nothing of rank 2 of 4 (ledger/rank00002.jsonl is missing or was" in said
    assert "more problems" not in said


def edit(config: TrainConfig, rank: int, change: Callable[[list[str]], list[str]]) -> None:
    path = Path(config.run) / "ledger" / f"rank{rank:05d}.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines[:2] + lines[3:], "samples 48 to 71 are in no rank's ledger"),
        (lambda lines: lines[1:], "samples 0 to 23 are in no rank's ledger"),
        (lambda lines: lines[:-1], "the ledger ends at 216 samples, before the last commit at 240"),
        (lambda lines: lines + lines[:1], "samples 0 to 23: rank 0 of 1 has them twice"),
        (
            lambda lines: [*lines, lines[1].replace('"first": 24', '"first": 16')],
            "samples 24 to 47 are in the ledger twice: in 16 to 47 of 1 rank and in 24 to 47 of 1 rank",
        ),
        (lambda lines: ["{torn\n", *lines[1:]], "samples 0 to 23 are in no rank's ledger"),
        (lambda lines: [lines[0].replace('"last": 24', '"last": 22'), *lines[1:]], "not whole global batches of 8"),
    ],
)
def test_gaps_overlaps_and_a_ledger_that_ends_early_are_named(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]], line: str
) -> None:
    live(config, 1, {})
    edit(config, 0, change)
    assert cli.main(["ledger", config.run]) == 1
    said = capsys.readouterr()
    assert line in said.out
    assert said.err.startswith(f"latentmill ledger: {config.run} is not proved: ")


def test_lines_beyond_the_last_commit_are_told_and_prove_nothing(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    live(config, 2, {}, steps=7, torn=1)
    assert cli.main(["ledger", config.run]) == 0
    said = capsys.readouterr().out
    assert "Beyond the last commit the ledger goes on (1 lines)" in said
    assert "each of the 48 samples was trained on once" in said
    assert said.count("Proved in ") == 1


def test_runs_are_compared_and_each_is_told_with_its_epochs(
    config: TrainConfig, undisturbed: tuple[str, Seen], capsys: pytest.CaptureFixture[str]
) -> None:
    live(config, 2, {}, steps=10)
    live(config, 4, {})
    assert cli.main(["ledger", undisturbed[0], config.run]) == 0
    said = capsys.readouterr().out
    assert f"The same batches as {undisturbed[0]}, with the same noise." in said
    rows = [line.split() for line in said.partition(f"{config.run}: ")[2].splitlines()]
    assert ["0", "to", "71", "2", "3", "as", "the", "order", "names", "them"] in rows
    assert ["72", "to", "239", "4", "7", "as", "the", "order", "names", "them"] in rows
    assert ["0", "to", "5,", "each", "40", "40", "4", "0"] in rows


def test_a_run_stays_proved_when_its_dataset_grows_and_when_it_moves(
    config: TrainConfig, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live(config, 2, {})
    moved = str(tmp_path / "moved")
    manifest = make_cache(moved, SIZES)
    grown = dataclasses.replace(
        manifest, shards=manifest.shards[:-1], units=manifest.units[:-1], version=2, sources=("a", "b")
    )
    commit_manifest(open_storage(moved), grown)
    assert cli.main(["ledger", config.run, f"dataset={moved}"]) == 0
    assert f"{moved}: version 1 " in capsys.readouterr().out
    other = str(tmp_path / "other")
    make_cache(other, SIZES[1:])
    assert cli.main(["ledger", config.run, f"dataset={other}"]) == 1
    assert "restore it, or say where it lies: dataset=URL" in capsys.readouterr().err


def test_what_proves_nothing_is_said_in_one_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([config.run], "has nothing committed yet"),
        ([], "usage: latentmill ledger RUN"),
        ([config.run, "dest=x"], "dest= is no option of ledger"),
        ([str(tmp_path / "absent")], "is not a run directory"),
    ):
        assert cli.main(["ledger", *arguments]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_a_storage_without_a_ledger_is_a_gap(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    live(config, 1, {}, steps=3)
    open_storage(config.run).delete("ledger/rank00000.jsonl")
    assert "the ledger ends at 0 samples, before the last commit at 24" in refusal(config, capsys)


def test_one_run_that_cannot_be_read_hides_no_other(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live(config, 1, {})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{}")
    gone, bad = str(tmp_path / "gone"), str(tmp_path / "bad")
    assert cli.main(["ledger", gone, config.run, bad]) == 1
    said = capsys.readouterr()
    assert f"{config.run}: " in said.out and "Proved in " in said.out
    for url in (gone, bad):
        assert said.err.count(f"{url} is not proved: ") == 2  # where it is found, and in the last line
    assert said.err.splitlines()[-1].startswith("latentmill ledger: ")


def test_the_runs_of_a_sweep_are_proved_as_the_shell_names_them(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`latentmill ledger runs/sweep/*`, with what Hydra leaves there, and from within the folder."""
    for name in ("optim.lr=0.001", "optim.lr=0.002,optim.name=adamw"):
        live(begin(tmp_path / "sweep" / name, cache), 1, {})
    (tmp_path / "sweep" / "multirun.yaml").write_text("hydra: {}\n")
    assert cli.main(["ledger", *sorted(map(str, (tmp_path / "sweep").iterdir()))]) == 0
    said = capsys.readouterr()
    assert said.out.count("Proved in ") == 2 and "The same batches as " in said.out
    assert said.err.count("\n") == 1 and "multirun.yaml is what a sweep leaves" in said.err
    monkeypatch.chdir(tmp_path / "sweep")
    assert cli.main(["ledger", "optim.lr=0.001", f"dataset={cache}"]) == 0
    capsys.readouterr()
    assert cli.main(["ledger", "optim.lr=0.001", f"datset={cache}"]) == 1
    assert "datset= is no option of ledger" in capsys.readouterr().err
