"""The benchmark of folders runs, small, and compares like with like."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.folders import Settings, measure, told


@pytest.mark.long
def test_a_folder_and_tars_of_the_same_samples_are_encoded_by_turns(tmp_path: Path) -> None:
    settings = Settings(samples=24, unit_size=8, rounds=1, workers=1, folder=str(tmp_path / "kept"))
    measured = measure(settings, tmp_path)
    assert len(measured.tars) == len(measured.folder) == 1
    assert min(*measured.tars, *measured.folder, measured.listing) > 0
    text = told(settings, measured, "python -m benchmarks.folders")
    assert f"folder / tars: {measured.folder[0] / measured.tars[0]:.3f}" in text
