"""latentmill eval by two real ranks that meet by gloo: its figures are those of one process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.run import SOURCE, make_cache, make_run
from pipeline import eval as eval_verb
from pipeline.config import EvalRunConfig, LaunchConfig, ReferenceConfig
from pipeline.distributed.ranks import run_local
from preprocess import reference

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


def made_by(run: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The card of a run's only evaluation, and its picture. The evaluation is taken away."""
    (place,) = (run / "evals").iterdir()
    card = json.loads((place / "card.json").read_text())
    with Image.open(place / "grid.png") as grid:
        picture = np.asarray(grid)
    shutil.rmtree(run / "evals")
    return {**card, "metrics": {**card["metrics"], "seconds": 0}}, picture


def test_two_ranks_evaluate_as_one_process_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ranks that launch.processes starts; and a launcher's, whose error is said once."""
    make_cache(tmp_path)
    dest = str(tmp_path / "reference.safetensors")
    reference.main(ReferenceConfig(dataset=str(tmp_path / "cache"), source=str(tmp_path / SOURCE), dest=dest))
    make_run(tmp_path, reference=dest)
    run = tmp_path / "run"
    alone = EvalRunConfig(
        run=str(run),
        images=13,
        guidance=(2.0,),
        sampler=("ddim",),
        steps=(4,),
        batch=4,
        device="cpu",
        launch=LaunchConfig(processes=1, threads=1),
    )
    together = replace(alone, launch=LaunchConfig(processes=2, threads=1))
    assert eval_verb.main(together) == 0
    card, picture = made_by(run)
    assert capfd.readouterr().out.count(card["line"]) == 1
    words = [f"run={run}", "at=77", "device=cpu", "launch.threads=1"]
    assert run_local("pipeline.cli", ["eval", *words], 2, 1) == 1
    assert capfd.readouterr().err.count("latentmill eval") == 1
    assert eval_verb.main(alone) == 0
    one, by_one = made_by(run)
    assert one == card and card["metrics"]["images"] == 13 and "fid_democlip" in card["metrics"]
    np.testing.assert_array_equal(picture, by_one)
