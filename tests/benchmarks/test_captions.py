"""The benchmark of several captions: the same latents on both sides, all figures printed, nothing given away."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from benchmarks import captions, machine
from benchmarks.streaming.latents import Latents, samples


@pytest.mark.long
def test_the_benchmark_prints_bytes_and_rates_of_both_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    words = ["records=64", "samples=64", "batch=8", "side=8", "rounds=1", "captions=3", "--write"]
    assert captions.main(words) == 0
    said = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in said.splitlines() if line.startswith("|")}
    found = {kind: [float(cell.replace(",", "")) for cell in rows[kind]] for kind in captions.KINDS}
    assert all(value > 0 for row in found.values() for value in row)
    assert 2 * 4 * 77 <= found["several"][0] - found["one"][0] <= 2 * 4 * 77 + 1024
    assert "616 are ids of further captions" in said and socket.gethostname() not in said
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() in said


def test_both_sides_have_the_same_latents() -> None:
    one = Latents(name="one", side=8, text="tokens", samples=4)
    several = Latents(name="several", side=8, text="tokens", samples=4, captions=3)
    for first, second in zip(samples(one, 0, 0, 4), samples(several, 0, 0, 4), strict=True):
        assert np.array_equal(first.members["moments"], second.members["moments"])
        assert second.members["captions"].shape == (3, 78) and len(second.meta["captions"]) == 3
