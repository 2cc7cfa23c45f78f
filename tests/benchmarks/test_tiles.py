"""The benchmarks of tiles and of larger pictures: their pictures, and what they print."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import larger, machine, tiles


def test_pictures_are_many_scenes_on_one_background_of_which_tiles_end_nowhere_at_an_edge() -> None:
    pictures = tiles.composed(2, 128, 0)
    assert pictures.shape == (2, 128, 128, 3) and pictures.dtype == np.uint8
    assert (pictures[0] != pictures[1]).any()
    for picture in pictures:
        backgrounds, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        assert counts.max() > 0.5 * counts.sum() and len(set(backgrounds[counts.argmax()])) == 1
    (wide,) = tiles.composed(1, 192, 0)
    assert wide.shape == (192, 192, 3)
    whole = larger.composed(larger.Plan(images=2), 128, larger_mask())
    assert whole.pictures.shape == (2, 128, 128, 3) and whole.labels.shape == whole.holes.shape == (2, 128, 128)
    assert set(np.unique(whole.holes)) == {0, 1} and whole.labels.max() > 0
    moved = larger.composed(larger.Plan(images=2, cut=1), 128, larger_mask())
    assert (moved.pictures[0] != whole.pictures[0]).any()


def larger_mask() -> object:
    from pipeline.conditions.facts import MaskFacts

    return MaskFacts(kinds=("rectangles",))


def test_the_memory_of_a_decode_is_measured_beside_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiles.job(tiles.Plan(work="job", side=64, tile=32, threads=1)) == 0
    assert re.fullmatch(r'\{"bytes": \d+, "seconds": [\d.e-]+\}\n', capsys.readouterr().out)


@pytest.mark.long
def test_the_benchmark_prints_every_way_of_cutting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert tiles.main(["pictures=2", "sides=128", "overlaps=0,32", "threads=1", "--write"]) == 0
    rows = {
        tuple(cell.strip() for cell in line.split("|")[1:3]): [cell.strip() for cell in line.split("|")[3:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| whole", "| middle"))
    }
    assert len(rows) == 1 + 2 * 3 * 2
    chosen, cut = rows["middle whole, norms tile", "32"], rows["middle whole, norms tile", "0"]
    assert chosen[0] == "yes" and float(chosen[2]) <= 0.3 and float(chosen[5]) <= 1.5
    assert cut[0] == "no" and float(cut[5]) > 1.5
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("tiles-quality-")
