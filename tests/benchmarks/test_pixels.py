"""The benchmark of cached pixels: both kinds of the same pictures, each record once, and nothing given away."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from benchmarks import machine, pixels


@pytest.mark.long
def test_the_benchmark_prints_bytes_and_rates_of_both_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert pixels.main(["images=64", "batch=16", "rounds=1", "workers=1", "resolution=32", "--write"]) == 0
    said = capsys.readouterr().out
    rows = {name: line for line in said.splitlines() if (name := line[2:].split(" |")[0].strip()) in pixels.KINDS}
    found = {name: [float(cell.replace(",", "")) for cell in line.split("|")[2:-1]] for name, line in rows.items()}
    assert found["array"][0] == found["png"][0] == 64
    assert 3 * 32 * 32 < found["array"][1] < 6000 and found["png"][1] < found["array"][1]
    assert all(value > 0 for row in found.values() for value in row)
    assert re.search(r"png / array", said) and socket.gethostname() not in said
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() in said


def test_pixels_that_differ_between_the_kinds_end_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from made.conditioned import make_conditioned
    from made.conditions import CONTRACTS
    from pipeline.data.reading import batch

    for kind, name in (("array", "pixels"), ("png", "pixels as PNGs")):
        make_conditioned(str(tmp_path / kind), CONTRACTS[name], [8, 8])
    plan = pixels.Plan(batch=4)
    pixels.require_alike(plan, tmp_path)
    monkeypatch.setattr(batch, "read_png", lambda data, size, out: out.fill(1))
    with pytest.raises(AssertionError, match="pixels differ"):
        pixels.require_alike(plan, tmp_path)
