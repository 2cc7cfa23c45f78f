"""Captions' states: a rank holds those of the images that it draws, and figures are those of one process."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.run import IMAGES, make_cache, make_run
from made.thread_world import on_ranks
from pipeline import eval as eval_verb
from pipeline.config import EvalRunConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.evaluation import texts
from pipeline.evaluation.card import Card
from pipeline.evaluation.runs import commits
from pipeline.evaluation.texts import Encoded, Stored
from pipeline.evaluation.validation import Share, Validation, load_validation
from pipeline.inference.trained import encode_captions, load_encoders
from pipeline.models.encoders.text import TextTower
from pipeline.storage.urls import open_storage

KINDS = ("full", "tokens")
BATCH = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache and a run for each way in which a cache holds captions."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        make_cache(made[kind], text_storage=kind)
        make_run(made[kind])
    return made


@pytest.fixture(scope="module")
def tower(folders: dict[str, Path]) -> TextTower:
    manifest = load_manifest(open_storage(str(folders["full"] / "cache")))
    tower = load_encoders(manifest.contract)[1]
    assert tower is not None
    return tower


def loaded(folder: Path, tower: TextTower, share: Share | None = None, count: int = IMAGES) -> Validation:
    storage = open_storage(str(folder / "cache"))
    return load_validation(storage, load_manifest(storage), ("text",), count, tower, share=share)


def test_a_rank_holds_the_states_of_its_own_images_alone(folders: dict[str, Path], tower: TextTower) -> None:
    whole = loaded(folders["full"], tower)
    assert isinstance(whole.texts, Stored) and "text" not in whole.arrays
    every = whole.texts.states(np.arange(IMAGES))
    parts = [Share(BATCH, rank, 2) for rank in range(2)]
    seen: list[int] = []
    for share in parts:
        validation = loaded(folders["full"], tower, share)
        assert validation.texts is not None and validation.captions == whole.captions
        own = [number for batch in share.batches(IMAGES) for number in batch]
        assert validation.texts.nbytes == every[own].nbytes
        np.testing.assert_array_equal(validation.texts.states(np.array(own)), every[own])
        with pytest.raises(AssertionError, match="images of another rank"):
            validation.texts.states(np.array([next(i for i in range(IMAGES) if i not in own)]))
        seen += own
    assert sorted(seen) == list(range(IMAGES))


def test_a_rank_has_the_states_of_images_that_begin_with_the_first_record_again(
    folders: dict[str, Path], tower: TextTower
) -> None:
    count, share = 2 * IMAGES + 3, Share(BATCH, 1, 3)
    validation = loaded(folders["full"], tower, share, count)
    assert validation.texts is not None
    for batch in share.batches(count):
        assert validation.texts.states(np.array(batch) % IMAGES).shape[0] == len(batch)


def test_encoded_states_do_not_depend_on_the_batch_and_keep_within_their_bytes(
    tower: TextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "ENCODED_TOGETHER", 4)
    captions = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "box", "star")]
    expected = np.concatenate([encode_captions(tower, captions[i : i + 4]).half().numpy() for i in range(0, 9, 4)])
    one = expected[0].nbytes
    for most, kept in ((1 << 28, 9), (5 * one, 5), (0, 0)):
        encoded = Encoded(tower, captions, most_kept=most)
        for index in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 2, 2], [3, 4]):
            np.testing.assert_array_equal(encoded.states(np.array(index)), expected[index])
        assert encoded.nbytes == kept * one


@pytest.fixture
def one_loads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads share PyTorch's generator, of which the encoders' weights are drawn here."""
    lock, load = threading.Lock(), commits._load

    def locked(*arguments: Any) -> commits.Prepared:
        with lock:
            return load(*arguments)

    monkeypatch.setattr(commits, "_load", locked)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_figures_of_one_and_write_once(
    kind: str, folders: dict[str, Path], one_loads_at_a_time: None
) -> None:
    """Both load, draw and judge; rank 0 decides and stores. A second evaluation is taken from what is there."""
    folder = folders[kind]
    config = EvalRunConfig(run=str(folder / "run"), images=13, guidance=(2.0,), sampler=("ddim",), steps=(4,))
    config = replace(config, batch=BATCH, device="cpu")
    alone = eval_verb.evaluate_run(config)[0]
    stored = {path.name: path.read_bytes() for path in (folder / "run/evals").glob("*/*.png")}
    shutil.rmtree(folder / "run/evals")
    cards: list[Any] = [result[0] for result in on_ranks(2, lambda world: eval_verb.evaluate_run(config, world))]
    for card in cards:
        assert isinstance(card, Card)
        assert {**card.metrics, "seconds": 0} == {**alone.metrics, "seconds": 0}
    assert {path.name: path.read_bytes() for path in (folder / "run/evals").glob("*/*.png")} == stored
    (place,) = (folder / "run/evals").glob("*/metrics.json")
    written = place.stat().st_mtime_ns
    kept = on_ranks(2, lambda world: eval_verb.evaluate_run(config, world))
    assert kept[0] == kept[1] == [cards[0]] and place.stat().st_mtime_ns == written
