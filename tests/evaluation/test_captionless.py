"""A class-conditional run of a cache without captions, from the verb to its card: no text tower is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from made import run as made
from made.judged import NAMES
from pipeline import cli
from pipeline import eval as eval_verb
from pipeline.config import ClassTask, EvalRunConfig, SamplerConfig, TrainConfig
from pipeline.config.conditions import ClassesConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.distributed.world import World
from pipeline.evaluation.runs.while_training import in_training
from pipeline.inference import trained
from pipeline.storage.urls import open_storage

SAMPLER = SamplerConfig(sampler="ddim", steps=4, guidance=2.0, batch=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of a run of class-conditional shapes, with one commit."""
    folder = tmp_path_factory.mktemp("captionless")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    made.make_cache(
        folder,
        8,
        drawn={"classes": True, "single": True},
        text_storage="none",
        conditions=("class",),
        classes=ClassesConfig(names=str(folder / "names.txt")),
    )
    facts = load_manifest(open_storage(str(folder / "cache"))).contract
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "Facts", lambda: facts)
        made.make_run(folder, task=ClassTask())
    return replace(made.train_config(folder, task=ClassTask()), eval=made.EvalConfig(images=6, grid=4, sampler=SAMPLER))


@pytest.fixture(autouse=True)
def towerless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a text tower was loaded")

    monkeypatch.setattr(trained, "load_text", refuse)


def test_the_verb_and_training_agree_and_the_card_is_made_again(
    config: TrainConfig, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    run = open_storage(str(tmp_path))
    state = trained.load_trained(config.run).state
    inside = in_training(config, run, World(), load_manifest(open_storage(config.data.train)), None)(
        state, 128, lambda: False
    )
    request = EvalRunConfig(run=config.run, images=6, guidance=(2.0,), sampler=("ddim",), steps=(4,), batch=4)
    card = eval_verb.evaluate_run(request)[0]
    assert {**inside, "seconds": 0} == {**card.metrics, "seconds": 0}
    assert card.clip == {} and card.captions["records"] == 6 and card.task == "class"
    assert eval_verb.evaluate_run(request)[0] == card  # which is kept
    (path,) = (Path(config.run) / "evals").glob("*-ddim-4-g2-n6-s0-*/card.json")
    assert cli.main(["eval", "--from-card", str(path)]) == 0
    assert "reproduced" in capsys.readouterr().out
    assert json.loads((path.parent / "grid.json").read_text())["captions"][0] in NAMES


def test_a_snapshot_is_evaluated_beside_training(config: TrainConfig) -> None:
    run, folder = open_storage(config.run), "evals/000000000128"
    run.put(f"{folder}/ema.safetensors", save(trained.load_trained(config.run).state))
    assert eval_verb.main(EvalRunConfig(run=config.run, pending=True)) == 0
    assert json.loads(run.get(f"{folder}/card.json"))["judge"] == {"classes": "records", "figures": ["class_accuracy"]}
    assert not run.exists(f"{folder}/ema.safetensors")
