"""Evaluations whose images begin from the records' own pictures, or keep a region of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made.cache import contract
from made.evaluated import RECORDS, denoiser_of, evaluator_of, in_memory, of_pixels
from made.judged import CONDITIONS, MASK, given, pictures
from made.run import make_cache, make_run
from made.thread_world import on_ranks
from pipeline import cli
from pipeline import eval as eval_verb
from pipeline.conditions.facts import Conditions
from pipeline.config import (
    ClassTask,
    EvalRunConfig,
    InpaintTask,
    LayoutTask,
    SamplerConfig,
    SuperresTask,
    TaskConfig,
    UnconditionalTask,
)
from pipeline.config.loading.load import load
from pipeline.data.format.contract import Contract
from pipeline.diffusion.hooks import Hooks
from pipeline.distributed.world import World
from pipeline.errors import ConfigError, ContractMismatch, ParseError
from pipeline.evaluation import evaluate
from pipeline.evaluation.card import parse_card
from pipeline.evaluation.evaluate import EvalResult, Evaluator
from pipeline.evaluation.kept import full_name
from pipeline.evaluation.runs import commits
from pipeline.evaluation.steered.asked import asked_of
from pipeline.evaluation.steered.keep import KeepJudge, RecordKeep
from pipeline.evaluation.tasks.judge import Given
from pipeline.inference.steering.images import made_anew
from pipeline.report.run import load as load_report

SAMPLER = SamplerConfig(sampler="euler", steps=2, guidance=1.0, batch=4)
LEVELS = 10
"""By how many levels pictures differ from the records' in these tests: 28.13 dB."""
DB = 20 * np.log10(255 / LEVELS)


def steered(task: TaskConfig, cache: Contract, world: World | None = None, **keys: Any) -> Evaluator:
    validation, asked = in_memory(cache), asked_of(EvalRunConfig(run="r", **keys), cache, task, "data.val=v")
    assert set(asked.reads) <= set(validation.arrays)
    plain = evaluator_of(task, cache, validation, world=world)
    return evaluator_of(task, cache, validation, world=world, steering=asked.steering(validation, plain.first_stage))


def evaluated(evaluator: Evaluator, task: TaskConfig, images: int = 6, batch: int = 4) -> EvalResult:
    cache = evaluator.validation.contract
    return evaluator(denoiser_of(task, cache), 64, images=images, sampler=replace(SAMPLER, batch=batch))


def off(numbers: list[int]) -> np.ndarray:
    """The records' pictures, LEVELS lighter or darker."""
    truth = pictures()[np.array(numbers) % RECORDS].astype(int)
    return np.where(truth < 128, truth + LEVELS, truth - LEVELS).astype(np.uint8)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[int, Hooks]:
    """The hooks of each image, drawn as `off`."""
    seen: dict[int, Hooks] = {}

    def noted(*arguments: Any) -> tuple[np.ndarray, int]:
        numbers, whole = arguments[5], arguments[-1]
        start, keep = whole.start, whole.keep
        for i, number in enumerate(numbers):
            seen[number] = Hooks(
                start=start and replace(start, latents_BCHW=start.latents_BCHW[i]),
                keep=keep and replace(keep, latents_BCHW=keep.latents_BCHW[i], new_B1HW=keep.new_B1HW[i]),
            )
        return off(numbers), 0

    monkeypatch.setattr(evaluate, "draw", noted)
    return seen


# --------------------------------------------------------------------------------------------------------------------
# Begin from the records' own pictures


@pytest.mark.parametrize("batch", [2, 9])
def test_image_i_begins_from_the_latents_of_its_record_in_any_batch(hooks: dict[int, Hooks], batch: int) -> None:
    evaluator = steered(ClassTask(), of_pixels(), strength=0.5)
    evaluated(evaluator, ClassTask(), images=9, batch=batch)
    latents = torch.from_numpy(evaluator.validation.arrays["latents"]).float()
    for number in range(9):
        start = hooks[number].start
        assert start is not None and start.strength == 0.5 and hooks[number].keep is None
        assert torch.equal(start.latents_BCHW, latents[number % RECORDS])


@pytest.mark.parametrize("task", [UnconditionalTask(), ClassTask(), LayoutTask(), InpaintTask()], ids=lambda t: t.name)
def test_how_near_images_stay_to_their_start_is_measured_for_every_task(
    hooks: dict[int, Hooks], task: TaskConfig
) -> None:
    """Pooled over all pictures, between the autoencoder's ceiling and what their own task measures."""
    metrics = evaluated(steered(task, of_pixels(), strength=0.5), task).metrics
    assert metrics["psnr_start"] == pytest.approx(DB, abs=1e-6) and metrics["psnr_start_error"] < 1e-6
    assert metrics["psnr_start_reconstruction"] > 48  # float16 of the pixels
    assert metrics["class_kept"] == metrics["class_kept_reconstruction"] == 1
    assert metrics["class_kept_low"] < 1 == metrics["class_kept_high"]
    own = evaluated(evaluator_of(task, of_pixels(), in_memory(of_pixels())), task).metrics
    assert set(metrics) - set(own) == {
        *("psnr_start", "psnr_start_error", "psnr_start_reconstruction"),
        *("class_kept", "class_kept_low", "class_kept_high", "class_kept_reconstruction"),
    }
    assert {name: metrics[name] for name in own if name != "seconds"} == {
        name: value for name, value in own.items() if name != "seconds"
    }


def test_classes_are_those_of_the_records_and_not_those_that_are_asked_for(
    hooks: dict[int, Hooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class-conditional model may be asked for another class than its start's."""
    monkeypatch.setattr(evaluate, "draw", lambda *arguments: (off([n + 1 for n in arguments[5]]), 0))
    metrics = evaluated(steered(ClassTask(), of_pixels(), strength=1.0), ClassTask()).metrics
    labels = given().members["cond.class"][:RECORDS]
    same = float(np.mean(labels == np.roll(labels, -1)))
    assert metrics["class_kept"] == pytest.approx(same, abs=0.2) and metrics["class_kept"] < 0.7
    assert metrics["psnr_start"] < 20


def test_without_the_records_pictures_the_start_is_their_reconstruction(hooks: dict[int, Hooks]) -> None:
    cache = of_pixels(conditions=Conditions(classes=CONDITIONS.classes))
    metrics = evaluated(steered(UnconditionalTask(), cache, strength=0.5), UnconditionalTask()).metrics
    assert metrics["psnr_start_to_reconstruction"] == pytest.approx(DB, abs=0.05)
    assert not [name for name in metrics if name.startswith("psnr") and name.endswith("_reconstruction_reconstruction")]


# --------------------------------------------------------------------------------------------------------------------
# Keep a region of the records' own pictures


def test_the_outside_of_each_records_mask_is_kept_pasted_and_measured_before_that(hooks: dict[int, Hooks]) -> None:
    evaluator = steered(UnconditionalTask(), of_pixels(), keep=True)
    result = evaluated(evaluator, UnconditionalTask(), images=8)
    holes = np.unpackbits(given().members["cond.mask"][:RECORDS], axis=-1).astype(bool)
    for number in range(8):
        keep, hole = hooks[number].keep, holes[number % RECORDS]
        assert keep is not None and hooks[number].start is None
        assert torch.equal(keep.new_B1HW[0], torch.from_numpy(hole).float())
        latents = torch.from_numpy(evaluator.validation.arrays["latents"][number % RECORDS]).float()
        assert torch.equal(keep.latents_BCHW, latents)
    assert result.metrics["psnr_kept"] == pytest.approx(DB, abs=1e-6)
    for picture, truth, drawn, hole in zip(result.grid, pictures(), off([0, 1, 2]), holes, strict=False):
        assert (picture[~hole] == truth[~hole]).all() and (picture[hole] == drawn[hole]).all()


def test_what_is_kept_is_pasted_before_the_task_judges_and_the_start_is_compared(hooks: dict[int, Hooks]) -> None:
    metrics = evaluated(steered(UnconditionalTask(), of_pixels(), keep=True, strength=0.5), UnconditionalTask()).metrics
    inside = np.unpackbits(given().members["cond.mask"][:RECORDS], axis=-1).mean()
    assert metrics["psnr_kept"] == pytest.approx(DB, abs=1e-6)
    assert metrics["psnr_start"] == pytest.approx(DB - 10 * np.log10(inside), abs=1e-6)  # only the holes differ
    assert hooks[0].start is not None and hooks[0].keep is not None


def test_a_record_keeps_what_the_variant_of_its_image_number_does_not_hide(hooks: dict[int, Hooks]) -> None:
    variants = 3
    cache = of_pixels(conditions=replace(of_pixels().conditions, mask=replace(MASK, variants=variants, packed=False)))
    validation = in_memory(cache)
    masks = np.zeros((RECORDS, variants, 64, 64), np.uint8)
    masks[:, np.arange(variants), np.arange(variants)] = 1  # row k of variant k
    validation.arrays["cond.mask"] = masks
    asked = asked_of(EvalRunConfig(run="r", keep=True), cache, UnconditionalTask(), "v")
    stage = evaluator_of(UnconditionalTask(), cache, validation).first_stage
    evaluator = evaluator_of(UnconditionalTask(), cache, validation, seed=4, steering=asked.steering(validation, stage))
    evaluated(evaluator, UnconditionalTask(), images=12)
    chosen = [int(hook.keep.new_B1HW[0, :, 0].argmax()) for _, hook in sorted(hooks.items()) if hook.keep]
    expected = evaluator.judging._chosen("cond.mask", masks[np.arange(12) % RECORDS], range(12)).argmax(1)[:, 0]
    assert chosen == expected.tolist() and set(chosen) == {0, 1, 2}


def test_a_latent_position_is_kept_where_none_of_its_pixels_is_hidden() -> None:
    holes = torch.zeros(2, 1, 16, 24, dtype=torch.uint8)
    holes[0, 0, 7, 8] = holes[1, 0, 8, 23] = 1
    new = made_anew(holes, 8)
    assert new.dtype == torch.float32 and new.nonzero().tolist() == [[0, 0, 0, 1], [1, 0, 1, 2]]


def test_pictures_that_a_mask_hides_whole_have_no_figure() -> None:
    cache = of_pixels(conditions=replace(CONDITIONS, mask=replace(MASK, packed=False)))
    judge = KeepJudge(cache, UnconditionalTask())
    own = Given([""], {"cond.mask": np.ones((1, 64, 64), np.uint8)}, pictures()[:1])
    assert judge.summary(judge.rows(off([0]), own)) == {}
    assert (RecordKeep(judge, None).finish(off([0]), own) == off([0])).all()  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# Everywhere the same, and said on the card


@pytest.mark.parametrize("keys", [{"strength": 0.5}, {"keep": True}], ids=["strength", "keep"])
def test_images_do_not_depend_on_batches_and_figures_are_those_of_any_world(keys: dict[str, Any]) -> None:
    task = UnconditionalTask()

    def evaluation(world: World) -> EvalResult:
        return evaluated(steered(task, of_pixels(), world, **keys), task, images=3, batch=2)

    alone, whole = evaluation(World()), evaluated(steered(task, of_pixels(), **keys), task, images=3, batch=3)
    assert np.abs(alone.grid.astype(int) - whole.grid.astype(int)).max() <= 1
    name = "psnr_start" if "strength" in keys else "psnr_kept"
    assert whole.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-3)
    plain = evaluated(evaluator_of(task, of_pixels(), in_memory(of_pixels())), task, images=3, batch=3)
    assert np.abs(plain.grid.astype(int) - whole.grid.astype(int)).max() > 8
    for together in on_ranks(2, evaluation):
        assert {**together.metrics, "seconds": 0} == {**alone.metrics, "seconds": 0}
        assert np.array_equal(alone.grid, together.grid)


def test_a_card_says_what_images_began_from_and_is_another_without(hooks: dict[int, Hooks]) -> None:
    task, cache = UnconditionalTask(), of_pixels()
    evaluators = {
        "plain": steered(task, cache),
        "start": steered(task, cache, strength=0.5),
        "less": steered(task, cache, strength=0.25),
        "both": steered(task, cache, strength=0.5, keep=True),
    }
    cards = {name: evaluated(evaluator, task).card for name, evaluator in evaluators.items()}
    assert "steering" not in cards["plain"].to_json()
    assert cards["both"].to_json()["steering"] == {"strength": 0.5, "keep": True}
    assert "; keep, strength 0.5; " in cards["both"].line() and "psnr_start " in cards["start"].line()
    for name, card in cards.items():
        parsed = parse_card(json.dumps(card.to_json()).encode())
        assert parsed.steering == card.steering
        same = [other for other, evaluator in evaluators.items() if not evaluator.differing(parsed)]
        assert same == [name]
    assert evaluators["plain"].differing(cards["both"]) == [
        "steering: keep, strength 0.5 on the card, none here",
    ]
    names = {name: full_name(one, 6, SAMPLER, "ema", "a") for name, one in evaluators.items()}
    assert len(set(names.values())) == 4 and names["both"].startswith("euler-2-g1-n6-s0-keep-strength0.5-")


@pytest.mark.parametrize(
    "steering",
    [
        {"strength": 2.0},
        {"strength": 0.0},
        {"strength": "0.5"},
        {"strength": None},
        {"keep": False},
        {"keep": 1},
        {"other": {"deep": 1}},
        {"other": float("inf")},
        {"other": "x" * 101},
        [],
    ],
    ids=str,
)
def test_steering_that_is_none_is_refused_on_a_card(hooks: dict[int, Hooks], steering: Any) -> None:
    card = evaluated(evaluator_of(UnconditionalTask(), of_pixels(), in_memory(of_pixels())), UnconditionalTask()).card
    with pytest.raises(ParseError):
        parse_card(json.dumps(card.to_json() | {"steering": steering}).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with masks and pictures, and a run."""
    folder = tmp_path_factory.mktemp("steered")
    make_cache(folder, 12, conditions=("mask", "pixels"))
    make_run(folder)
    return folder


def test_figures_of_a_card_are_made_again_with_the_same_start_and_mask(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run={folder / 'run'}", "images=4", "guidance=[2]", "sampler=[ddim]", "steps=[4]", "device=cpu"]
    words = ["eval", *words]
    assert cli.main(words) == 0 and cli.main([*words, "strength=0.5", "keep=true"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"psnr_kept +\d", printed) and re.search(r"psnr_start +\d", printed)
    (path,) = (folder / "run/evals").glob("*-ddim-4-g2-n4-s0-keep-strength0.5-*/card.json")
    assert len(list((folder / "run/evals").iterdir())) == 2
    assert cli.main(["eval", "--from-card", str(path)]) == 0
    assert "reproduced: the figures are those of the card" in capsys.readouterr().out
    before = path.stat().st_mtime_ns
    assert cli.main([*words, "strength=0.5", "keep=true"]) == 0 and path.stat().st_mtime_ns == before
    shown = {e.card["line"]: e.card.get("steering") for e in load_report(str(folder / "run")).evaluations}
    assert sorted(map(str, shown.values())) == ["None", "{'keep': True, 'strength': 0.5}"]
    facts = json.loads(path.read_text())
    path.with_name("other.json").write_text(json.dumps({**facts, "steering": {"unheard of": 1.0}}))
    with pytest.raises(ContractMismatch, match=r"steering: unheard of 1\.0 on the card, none here"):
        eval_verb.main(EvalRunConfig(run=str(folder / "run"), from_card=str(path.with_name("other.json"))))


# --------------------------------------------------------------------------------------------------------------------
# What is refused: before weights are read, in one line


@pytest.mark.parametrize(
    ("task", "cache", "keys", "message"),
    [
        (
            SuperresTask(),
            CONDITIONS,
            {"strength": 0.5},
            "strength=0.5: a model of task=superres makes a large image of",
        ),
        (InpaintTask(), CONDITIONS, {"keep": True}, "keep=true: a model of task=inpaint is given the masks, and pic"),
        (
            UnconditionalTask(),
            Conditions(),
            {"keep": True},
            "keep=true: data.val=v holds no masks: leave keep out, or encode it with conditions=[mask]",
        ),
    ],
    ids=["superres", "inpaint", "no masks"],
)
def test_what_a_task_or_a_cache_does_not_allow_is_refused(
    task: TaskConfig, cache: Conditions, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        asked_of(EvalRunConfig(run="r", **keys), contract(conditions=cache), task, "data.val=v")
    assert "\n" not in str(caught.value)


def test_masks_that_are_missing_are_said_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path, 4)
    monkeypatch.setattr(commits, "load_trained", lambda *_: 1 / 0)
    config = load("eval", [f"run={folder / 'run'}", f"data.val={tmp_path / 'cache'}", "keep=true"])
    with pytest.raises(ConfigError, match="holds no masks"):
        eval_verb.main(config)
