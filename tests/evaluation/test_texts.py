"""Captions' states: a rank holds those of the images that it draws, and figures are those of one process."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from made.run import IMAGES, make_cache, make_denoiser, make_run, train_config
from made.thread_world import on_ranks
from pipeline import eval as eval_verb
from pipeline.config import EvalRunConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.evaluation import texts
from pipeline.evaluation.card import Card
from pipeline.evaluation.runs import commits, snapshots
from pipeline.evaluation.runs.cards import reproduce
from pipeline.evaluation.runs.snapshots import evaluate_pending
from pipeline.evaluation.texts import Encoded, Stored
from pipeline.evaluation.validation import Share, Validation, load_validation
from pipeline.inference.trained import encode_captions, load_encoders
from pipeline.models.encoders.text import TextTower
from pipeline.runs.names import SNAPSHOT
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
    validation, whole = loaded(folders["full"], tower, share, count), loaded(folders["full"], tower)
    assert validation.texts is not None and whole.texts is not None
    every = whole.texts.states(np.arange(IMAGES))
    for batch in share.batches(count):
        index = np.array(batch) % IMAGES
        np.testing.assert_array_equal(validation.texts.states(index), every[index])


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

    as_training = snapshots._as_training

    def locked_too(*arguments: Any) -> Any:
        with lock:
            return as_training(*arguments)

    monkeypatch.setattr(commits, "_load", locked)
    monkeypatch.setattr(snapshots, "_as_training", locked_too)


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


def test_two_ranks_make_a_cards_figures_again_and_say_so_once(
    folders: dict[str, Path], one_loads_at_a_time: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folders["full"] / "run")
    config = EvalRunConfig(run=run, images=7, guidance=(2.0,), sampler=("ddim",), steps=(4,), batch=3, device="cpu")
    eval_verb.evaluate_run(config)
    (place,) = Path(run).glob("evals/*-n7-*/card.json")
    again = EvalRunConfig(from_card=str(place), run=run, device="cpu")
    assert on_ranks(2, lambda world: reproduce(again, world)) == [0, 0]
    assert capsys.readouterr().out.count("reproduced: the figures are those of the card") == 1


def test_two_ranks_evaluate_a_snapshot_as_one_does(folders: dict[str, Path], one_loads_at_a_time: None) -> None:
    run = folders["full"] / "run"
    weights = make_denoiser(train_config(folders["full"])).state_dict()
    pending, found = EvalRunConfig(run=str(run), pending=True, device="cpu"), list[dict[str, Any]]()
    for size in (1, 2):
        folder = run / f"evals/{64:012d}"
        folder.mkdir(parents=True)
        save_file(weights, folder / SNAPSHOT)
        assert on_ranks(size, lambda world: evaluate_pending(pending, world)) == [0] * size
        found.append({**json.loads((folder / "metrics.json").read_text()), "seconds": 0})
        assert not (folder / SNAPSHOT).exists()
        shutil.rmtree(folder)
    assert found[0] == found[1] and found[0]["images"] == 12


def test_two_ranks_pass_over_a_damaged_snapshot_and_say_so_once(
    folders: dict[str, Path], one_loads_at_a_time: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders["full"] / "run" / f"evals/{96:012d}"
    folder.mkdir(parents=True)
    (folder / SNAPSHOT).write_bytes(b"damaged")
    pending = EvalRunConfig(run=str(folders["full"] / "run"), pending=True, device="cpu")
    try:
        assert on_ranks(2, lambda world: evaluate_pending(pending, world)) == [1, 1]
        assert sum("is passed over" in record.getMessage() for record in caplog.records) == 1
        assert (folder / SNAPSHOT).exists()
    finally:
        shutil.rmtree(folder)
