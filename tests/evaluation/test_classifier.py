"""The figures of a classifier: the same on any number of ranks, with error bars, and beside what ignorance reaches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from made.labelled import CLASSES, MODEL, labelled_config, make_labelled
from made.thread_world import on_ranks
from pipeline.data.format.manifest import load_manifest
from pipeline.distributed.world import World
from pipeline.errors import Interrupted
from pipeline.evaluation import classifier as evaluation
from pipeline.evaluation.classifier import Classified, Classifying, figures, table
from pipeline.models.classifier import Classifier
from pipeline.storage.urls import open_storage


@pytest.fixture
def classifying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Classifier]:
    """A cache of 23 records, and a classifier that says something. Batches have five records."""
    monkeypatch.setattr(evaluation, "BATCH", 5)
    url = str(tmp_path / "val")
    make_labelled(url, 23)
    network = Classifier(MODEL, CLASSES)
    network.reset_parameters(0)
    with torch.no_grad():
        network.pool.out.weight.copy_(torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(1)))
    return url, network.eval()


def measured(url: str, world: World, most: int = 100) -> Classifying:
    storage = open_storage(url)
    manifest = load_manifest(storage)
    return Classifying(storage, manifest, ("moments", "cond.class"), most, labelled_config(Path(url)).diffusion, world)


def test_any_number_of_ranks_gives_the_same_figures(classifying: tuple[str, Classifier]) -> None:
    url, network = classifying
    alone = measured(url, World())(network, 7, images=100)
    assert alone.metrics["images"] == 23, "all that there are"
    assert 0 < alone.metrics["accuracy"] < 1
    for result in on_ranks(3, lambda world: measured(url, world)(network, 7, images=100)):
        assert isinstance(result, Classified), result
        for name, value in alone.metrics.items():
            if name != "seconds":
                assert result.metrics[name] == value, name
    fewer = measured(url, World(), most=8)(network, 7, images=8)
    assert fewer.metrics["images"] == 8 and fewer.metrics != alone.metrics
    assert "accuracy_q1" in table(fewer.card) and "8 records" in fewer.card.line()


def test_a_rank_that_is_asked_to_stop_stops_all(classifying: tuple[str, Classifier]) -> None:
    url, network = classifying
    for result in on_ranks(
        2, lambda world: measured(url, world)(network, 7, images=20, stopped=lambda: world.rank == 1)
    ):
        assert isinstance(result, Interrupted)


def test_figures_are_means_over_records_whose_errors_are_those_of_records() -> None:
    """A record's quarters depend on one another, so that they count as one observation."""
    answers = [
        ((True, 0.1), (True, 0.2), (False, 1.0), (False, 1.1)),
        ((True, 0.3), (False, 0.9), (False, 1.2), (True, 0.8)),
        ((True, 0.0), (True, 0.0), (True, 0.4), (False, 2.0)),
        ((False, 3.0), (True, 0.5), (False, 1.5), (False, 1.5)),
    ]
    found = figures(answers, np.array([2, 2, 0, 1]))
    shares = [0.5, 0.5, 0.75, 0.25]
    assert found["accuracy"] == sum(shares) / 4
    assert found["accuracy_error"] == pytest.approx(np.std(shares, ddof=1) / 2)
    assert found["cross_entropy"] == pytest.approx(np.mean([nats for record in answers for _, nats in record]))
    assert [found[f"accuracy_q{i}"] for i in (1, 2, 3, 4)] == [0.75, 0.75, 0.25, 0.25]
    assert found["cross_entropy_q1"] == pytest.approx(0.85)
    assert 0.3 < found["accuracy_q1_low"] < 0.75 < found["accuracy_q1_high"] < 1
    assert found["accuracy_baseline"] == 0.5
    assert found["cross_entropy_baseline"] == pytest.approx(1.5 * math.log(2))
