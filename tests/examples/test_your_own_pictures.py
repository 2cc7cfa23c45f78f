"""docs/start/your_own_pictures.md, word for word: from scikit-learn's digits to a model of them, without a network."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from made.digit_classifier import DigitClassifier, classes, pixels, read
from made.places import REPOSITORY
from pipeline import sample
from pipeline.config import SampleConfig
from pipeline.runs.directory import load_autoencoder_run, load_run
from pipeline.status import status

PAGE = REPOSITORY / "docs" / "start" / "your_own_pictures.md"
HEADING = "## The whole path\n"
DRAWN = 16
"""Digits of each class that are judged."""


def commands() -> list[list[str]]:
    """The words of each command under the heading."""
    block = PAGE.read_text(encoding="utf-8").split(HEADING)[1].split("\n\n")[0]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_page_begins_where_there_is_nothing_and_ends_with_a_drawn_seven() -> None:
    words = commands()
    assert [line[:2] for line in words[:2]] == [["python", "examples/digits.py"], ["latentmill", "encode"]]
    assert words[-1][:4] == ["latentmill", "sample", "run=runs/digits", "class=7"]
    verbs = [line[1] for line in words[1:]]
    assert verbs == [
        *("encode", "encode", "autoencoder", "export", "reconstruct"),
        *("encode", "verify", "train", "sample"),
    ]


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_the_commands_of_the_page_make_a_model_whose_digits_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own; digits that were not trained on reconstruct with 27 dB at least."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for words in commands():
        program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "pipeline.cli"]
        done = subprocess.run([*program, *words[1:]], check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, words
    figures = json.loads((tmp_path / "reconstructed" / "metrics.json").read_text())
    assert figures["psnr"] >= 27
    assert (tmp_path / "seven.png").exists()
    assert [status(f"runs/{name}").state for name in ("ae", "digits")] == ["finished"] * 2
    contract = load_run("runs/digits").contract
    assert contract["encoders"]["vae"] == "ae"
    assert contract["scale"] == json.loads((tmp_path / "ae" / "config.json").read_text())["scaling_factor"]
    assert load_autoencoder_run("runs/ae").contract["stored"] == "pixels"

    records = read(tmp_path / "digits")
    judge = DigitClassifier(pixels(records), classes(records))
    held_out = read(tmp_path / "digits" / "val")
    assert judge.share(pixels(held_out), classes(held_out)) >= 0.95
    rows = sample.sample_rows(
        SampleConfig(run="runs/digits", class_=tuple(map(str, range(10))), n=DRAWN, seed=1, dest="all.png")
    )
    drawn = np.concatenate([row.images for row in rows])
    asked = np.repeat(np.arange(10), DRAWN)
    assert judge.share(drawn, asked) >= 0.8
