"""The benchmark of what steers sampling: a row for each case, and nothing given away."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from benchmarks import machine, steering
from made.run import make_cache, make_run
from pipeline.config import UnconditionalTask


def test_the_benchmark_draws_each_case_and_says_how_much_longer_than_plain_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    make_cache(tmp_path, 4, conditions=("mask", "pixels"))
    make_run(tmp_path, task=UnconditionalTask())
    capsys.readouterr()
    words = [f"run={tmp_path / 'run'}", f"val={tmp_path / 'cache'}", "cases=plain,start,keep,image,clip"]
    assert steering.main([*words, "steps=2", "batch=2", "rounds=1", "threads=1", "cutouts=1", "--write"]) == 0
    said = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in said.splitlines() if "|" in line)}
    assert list(rows)[2:] == ["plain", "start", "keep", "image", "clip"]
    assert float(rows["plain"][2]) == 1 and all(float(rows[name][0]) > 0 for name in list(rows)[2:])
    assert socket.gethostname() not in said and str(tmp_path) not in said
    assert list((tmp_path / "results").glob("steering-*.md"))


def test_the_time_is_the_middle_of_the_rounds_beside_their_neighbours() -> None:
    text = steering.report({"plain": [1.0, 2.0, 4.0], "image": [3.0, 4.0, 4.0]}, 8)
    assert "| image" in text and text.splitlines()[-1].split("|")[-2].strip() == "2.00"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "run= and val= are missing"),
        (["run=a", "val=b", "cases=clasifier"], "no case clasifier; choose of plain, start, keep, image"),
        (["run=a", "val=b", "cases=classifier"], "needs classifier=RUN"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steering.main(words) in (1, 2)
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1
