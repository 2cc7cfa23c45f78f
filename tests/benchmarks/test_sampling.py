"""The benchmark of sampling: the same pictures on both sides, every row and target, and nothing given away."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from benchmarks import machine, sampling
from pipeline.errors import DataError


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_the_sampling_benchmark_draws_the_same_on_both_sides_and_prints_its_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """With the demo's network; main fails where diffusers' pipeline draws something else."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    words = ["cases=tiny", "batch=2", "steps=3", "rounds=1", "threads=1", f"sampler={sampler}"]
    assert sampling.main([*words, "--write"]) == 0
    said = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in said.splitlines() if "|" in line)}
    assert list(rows)[2:] == ["ours", "diffusers", "bare"]
    assert all(float(cells[0]) > 0 for name, cells in rows.items() if name in sampling.SIDES)
    for peer, target in sampling.TARGETS.items():
        assert f"- against {peer}: {rows[peer][-1].strip()} (target >= {target:g}: " in said
    assert f"## tiny: 3 steps of {sampler}, guidance 3, batch 2, latents 8x8 (64 pixels), 1 rounds" in said
    assert socket.gethostname() not in said
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("sampling-tiny-") and written.read_text() == said.removesuffix("\n")


def test_ours_is_so_many_times_a_peer_as_it_takes_less_time() -> None:
    """The middle of three rounds, each against its own neighbour."""
    found = sampling.Timings({"ours": [1.0, 2.0, 4.0], "diffusers": [3.0, 4.0, 4.0]})
    assert found.ratio("diffusers") == 2.0


def test_sides_that_draw_something_else_or_nothing_have_no_ratio() -> None:
    picture = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    sampling.check_same(picture, picture / 255)
    with pytest.raises(DataError, match="draws something else"):
        sampling.check_same(picture, picture[::-1] / 255)
    with pytest.raises(DataError, match="show nothing"):
        sampling.check_same(np.full_like(picture, 9), np.full_like(picture, 9) / 255)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["cases=tiny,huge"], "no case huge; choose of tiny, sd1"),
        (["sampler=heun"], "heun predicts twice a step"),
        (["guidanc=2"], "the keys are cases, rounds,"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampling.main(words) in (1, 2)
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1
