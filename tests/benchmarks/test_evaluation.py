"""The benchmark of evaluation: bare networks are those inside of the features, and what it wants is said."""

from __future__ import annotations

import pytest
import torch

from benchmarks import evaluation
from pipeline.evaluation.features.networks import load_features


@pytest.mark.parametrize("name", ["democlip", "inception"])
def test_the_bare_network_gives_features_of_the_same_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 4)
    bare = evaluation.bare_network(name, load_features(name, "cpu", 0).network)()
    assert bare.shape == (evaluation.BATCH, load_features(name, "cpu", 0).width)
    assert torch.isfinite(bare).all()


def test_precision_and_recalls_memory_is_that_of_the_process_that_holds_them() -> None:
    added, seconds = evaluation.held(3000, 8)
    assert 0 <= added < 1e9 and seconds > 0


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["parts=features,speed"], "no part speed; choose of features, memory, whole, beside"),
        (["parts=whole"], "want run=RUN, a run of captioned shapes"),
        (["image=3"], "the keys are"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main(words) in (1, 2)
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1
