"""Runs on a cache of several captions: the ledger proves them across kills and worlds, and evaluations say which
caption they took."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made.captioned import SEVERAL, make_captioned, words_of, write_captioned
from made.encode import config as encode_config
from made.run import SAMPLER, train_config
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EvalRunConfig,
    LaunchConfig,
    OptimConfig,
    TrainConfig,
)
from pipeline.config.check.verbs import check
from pipeline.errors import ConfigError
from pipeline.eval import evaluate_run, reproduce
from pipeline.evaluation.card import parse_card
from pipeline.ledger import examine
from pipeline.runs.directory import load_any_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from pipeline.training.trainer import Trainer
from preprocess import encode
from ranks import consumed_run

KEYS: dict[str, Any] = {"caption_key": ("txt", "json:long", "json:alternatives"), "captions_most": 5}


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


class Lost(Exception):
    """Ends a run as a kill does."""


def sums(url: str | Path) -> tuple[int, int, int]:
    run = load_any_run(str(url))
    lines, proof = examine(run, str(url))
    assert not proof.problems
    return totals(lines)


def test_the_ledger_proves_several_captions_across_kills_and_other_worlds(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    make_captioned(cache, dataclasses.replace(SEVERAL, storage="full"), consumed_run.SIZES)
    whole = consumed_run.begin(tmp_path / "whole", cache)
    consumed_run.live(whole, 2, {})
    moved = consumed_run.begin(tmp_path / "moved", cache)
    for world, steps, torn in ((4, 7, 2), (1, 8, 0), (2, 10**6, 0)):
        consumed_run.live(moved, world, {}, steps=steps, torn=torn)
    assert sums(whole.run) == sums(moved.run)
    other = consumed_run.begin(tmp_path / "other", cache)
    consumed_run.live(replace(other, seed=4), 2, {}, steps=3)
    line, first = (read_ledger(open_storage(one.run))[0] for one in (other, whole))
    assert line.noise != first.noise  # another draw of captions is another sum


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("captioned")
    for name, first in (("train", 0), ("val", 100)):
        path = write_captioned(where / f"{name}.tar", 12, first)
        encode.main(encode_config(path, where / name, batch=12, caption_weights=(1.0, 1.0, 2.0), **KEYS))
    assert train.main(config_of(where, "run")) == 0
    return where


def config_of(folder: Path, run: str, **changes: Any) -> TrainConfig:
    base = train_config(folder)
    fields: dict[str, Any] = {
        "run": str(folder / run),
        "data": DataConfig(train=str(folder / "train"), val=str(folder / "val")),
        "deepspeed": DeepSpeedConfig(engine="torch"),
        "optim": OptimConfig(lr=1e-3, warmup=0, batch=4),
        "launch": LaunchConfig(threads=1),
        "checkpoint": CheckpointConfig(every=8),
        "tracking": replace(base.tracking, every=4),
        "samples": 24,
        "device": "cpu",
        "eval": replace(base.eval, images=4, grid=2, loss_images=4),
    }
    return replace(base, **{**fields, **changes})


def rows(folder: Path, kind: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["n"], row["loss"]) for row in lines if row["kind"] == kind]


def test_a_killed_run_goes_on_with_the_captions_that_it_would_have_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def lost(self: Trainer, batch: Any) -> None:
        if self.n == 20:
            raise Lost
        step(self, batch)

    config = config_of(folder, "killed", data=DataConfig(train=str(folder / "train")))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lost)
        with pytest.raises(Lost):
            train.main(config)
    assert train.main(config) == 0
    assert sums(folder / "killed") == sums(folder / "run")
    assert dict(rows(folder / "killed", "train")) == dict(rows(folder / "run", "train"))


def test_evaluations_take_the_first_caption_unless_told(folder: Path) -> None:
    evaluated = sorted((folder / "run/evals").glob("*/card.json"))[-1]
    assert "caption" not in json.loads(evaluated.read_text())["captions"]
    tiles = json.loads((evaluated.parent / "grid.json").read_text())
    assert tiles["captions"] == [words_of(100 + i)["txt"] for i in range(2)]
    asked = EvalRunConfig(
        run=str(folder / "run"),
        images=2,
        sampler=(SAMPLER.sampler,),
        steps=(4,),
        guidance=(1.0,),
        device="cpu",
        caption="3",
    )
    (card,) = evaluate_run(asked)
    assert (
        card.caption == "3"
        and "; caption 3;" in card.line()
        and parse_card(json.dumps(card.to_json()).encode()) == card
    )
    (stored,) = [
        path for path in (folder / "run/evals").glob("*/card.json") if path != evaluated and "g1-" in str(path)
    ]
    shown = json.loads((stored.parent / "grid.json").read_text())["captions"]
    assert shown[:2] == [words_of(100 + i)["alternatives"][0] for i in range(2)]
    assert reproduce(EvalRunConfig(run="", from_card=str(stored), device="cpu")) == 0
    (first,) = evaluate_run(replace(asked, caption="1"))
    (drawn,) = evaluate_run(replace(asked, caption="drawn"))
    assert (first.caption, drawn.caption) == ("1", "drawn")


def test_the_held_out_loss_is_of_the_caption_that_evaluations_take(folder: Path) -> None:
    first = dict(rows(folder / "run", "val"))
    second = config_of(folder, "second")
    assert train.main(replace(second, samples=8, eval=replace(second.eval, caption="2"))) == 0
    assert rows(folder / "second", "train") == rows(folder / "run", "train")[:2]
    other = dict(rows(folder / "second", "val"))
    assert other[8] != first[8] and abs(other[8] - first[8]) < 0.1


@pytest.mark.parametrize("caption", ["0", "-1", "first", "", "100", "1.5"])
def test_a_caption_that_is_none_is_refused(tmp_path: Path, caption: str) -> None:
    base = config_of(tmp_path, "run")
    with pytest.raises(ConfigError, match=f"eval.caption={caption}: the number of a caption"):
        check(replace(base, eval=replace(base.eval, caption=caption)))
    if caption:
        with pytest.raises(ConfigError, match=f"caption={caption}: the number of a caption"):
            check(EvalRunConfig(run="r", caption=caption))
