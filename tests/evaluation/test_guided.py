"""Evaluations whose images are led to the records' own pictures, captions or classes: their judges and cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from made import asked
from made.cache import contract
from made.evaluated import RECORDS, denoiser_of, evaluator_of, in_memory, of_pixels
from made.guided import make_classifier
from made.judged import CONDITIONS, given, pictures, scenes
from made.run import make_cache, make_run
from pipeline import cli
from pipeline.conditions.lowres import bicubic
from pipeline.config import (
    ClassTask,
    DiffusionConfig,
    GuideConfig,
    SamplerConfig,
    TaskConfig,
    UnconditionalTask,
)
from pipeline.data.format.contract import Contract, TextFacts, plain
from pipeline.data.format.members import arrays_of
from pipeline.diffusion.hooks import Hooks
from pipeline.errors import ConfigError, ContractMismatch
from pipeline.evaluation import evaluate
from pipeline.evaluation.card import parse_card
from pipeline.evaluation.evaluate import EvalResult, Evaluator
from pipeline.evaluation.kept import full_name
from pipeline.evaluation.steered import guides as guides_module
from pipeline.evaluation.steered.guides import RecordGuides, guide_of
from pipeline.evaluation.steered.judges import CaptionJudge, LedClassJudge, LikenessJudge
from pipeline.evaluation.tasks.judge import Given
from pipeline.inference.pictures import from_uint8
from pipeline.inference.steering.image import brightness
from pipeline.report import page
from pipeline.report.run import load

SAMPLER = SamplerConfig(sampler="ddim", steps=4, guidance=1.0, batch=4)
LEVELS = 10
DB = 20 * np.log10(255 / LEVELS)
"""PSNR of pictures that are as many levels lighter or darker."""


def captioned(**changes: Any) -> Contract:
    """The contract of a cache whose latents are its pixels, with captions."""
    facts = TextFacts(layer="last", length=3, width=8, pad=0, eot=5)
    return of_pixels(**{"text": facts, "text_sha256": "b" * 64, "caption_key": "txt", **changes})


def whole(cache: Contract) -> Contract:
    """The contract with the arrays that its conditions ask for, as files hold it."""
    return replace(cache, members=arrays_of(cache))


def run_info(cache: Contract) -> Any:
    """A run that was trained on such a cache."""
    return SimpleNamespace(
        contract=plain(whole(cache)),
        config=SimpleNamespace(diffusion=DiffusionConfig()),
        storage=SimpleNamespace(url="runs/a"),
    )


def guided(task: TaskConfig, config: GuideConfig, cache: Contract | None = None) -> Evaluator:
    cache = cache or captioned()
    validation = in_memory(cache)
    validation.captions[:] = [truth.caption for truth in scenes()[:RECORDS]]
    guides = RecordGuides(config, run_info(cache), cache, "v")
    assert set(guides.reads) <= set(validation.arrays)
    stage = evaluator_of(task, cache, validation).first_stage
    steering = guides.steering(stage, asked.encoders()[1], 0, torch.device("cpu"))
    return evaluator_of(task, cache, validation, steering=steering)


def evaluated(evaluator: Evaluator, task: TaskConfig, images: int = 6, batch: int = 4) -> EvalResult:
    cache = evaluator.validation.contract
    return evaluator(denoiser_of(task, cache), 64, images=images, sampler=replace(SAMPLER, batch=batch))


def off(numbers: list[int]) -> np.ndarray:
    """The records' pictures, LEVELS lighter or darker."""
    truth = pictures()[np.array(numbers) % RECORDS].astype(int)
    return np.where(truth < 128, truth + LEVELS, truth - LEVELS).astype(np.uint8)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[Hooks]:
    """The hooks of each batch, whose images are drawn as `off`."""
    seen: list[Hooks] = []

    def noted(*arguments: Any) -> tuple[np.ndarray, int]:
        seen.append(arguments[-1])
        return off(arguments[5]), 0

    monkeypatch.setattr(evaluate, "draw", noted)
    return seen


# --------------------------------------------------------------------------------------------------------------------
# Judges


def test_consistency_is_the_psnr_of_the_small_picture_against_the_target_where_it_counts() -> None:
    numbers = list(range(RECORDS))
    own = Given([""] * RECORDS, {}, pictures()[:RECORDS])
    mask = np.zeros((16, 16), np.uint8)
    mask[:4] = 1
    for where, grey in ((None, False), (mask, False), (None, True), (mask, True)):
        judge = LikenessJudge(of_pixels(), 4, where, grey)
        summary = judge.summary(judge.rows(off(numbers), own))
        values = []
        for drawn, truth in zip(off(numbers), own.pictures, strict=True):
            a, b = bicubic(drawn, 4), bicubic(truth, 4)
            a, b = (brightness(a), brightness(b)) if grey else (a, b)
            rows = slice(None) if where is None else slice(0, 4)
            values.append(20 * np.log10(255) - 10 * np.log10(np.mean((a[rows].astype(float) - b[rows]) ** 2)))
        assert summary["guide_consistency"] == pytest.approx(np.mean(values), abs=1e-9)
    judge = LikenessJudge(of_pixels(), 4)
    assert judge.rows(own.pictures, own)[0]["guide_consistency"] == 100
    assert [target.factor for target in judge.targets(own)] == [4] * RECORDS
    assert (judge.targets(own)[2].picture == bicubic(own.pictures[2], 4)).all()


def test_the_caption_and_the_class_that_a_picture_was_led_to_are_judged_as_their_tasks_would() -> None:
    own = given()
    captions = CaptionJudge(captioned())
    summary = captions.summary(captions.rows(pictures(), own))
    assert summary["attribute_accuracy"] > 0.95
    wrong = captions.summary(captions.rows(np.roll(pictures(), 1, 0), own))
    assert wrong["attribute_accuracy"] < 0.1
    lone = given(lone=True)
    classes = LedClassJudge(of_pixels())
    rows = classes.rows(pictures(lone=True), lone)
    assert classes.summary(rows, rows)["class_accuracy"] == 1
    assert classes.wanted(lone) == lone.members["cond.class"].tolist()
    assert not CaptionJudge(captioned(buckets=((32, 32),))).looks, "pictures of another world"


# --------------------------------------------------------------------------------------------------------------------
# Evaluations


def test_a_picture_leads_any_model_to_its_records_own(hooks: list[Hooks]) -> None:
    result = evaluated(guided(UnconditionalTask(), GuideConfig(image=8.0)), UnconditionalTask())
    metrics = result.metrics
    assert [[(steer.name, steer.weight) for steer in batch.steer] for batch in hooks] == [[("image", 8.0)]] * 2
    assert metrics["guide_consistency"] > DB - 1 and metrics["guide_consistency_error"] > 0
    assert metrics["guide_consistency_permuted"] < 22 and metrics["guide_consistency_reconstruction"] > 45
    assert result.shown is not None and (result.shown[0][::4, ::4] == bicubic(pictures()[0], 4)).all()
    wanted = from_uint8(np.stack([bicubic(picture, 4) for picture in pictures()[:4]]))
    assert torch.equal(hooks[0].steer[0].score._target, wanted)  # type: ignore[attr-defined]


def test_captions_and_classes_lead_models_that_read_none(
    hooks: list[Hooks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = captioned()
    run = make_classifier(tmp_path / "classifier", whole(own), in_channels=3)
    config = GuideConfig(clip=0.5, classifier=2.0, run=run, cutouts=0)
    result = evaluated(guided(UnconditionalTask(), config), UnconditionalTask())
    assert [(steer.name, steer.through_network) for steer in hooks[0].steer] == [("classifier", False), ("clip", True)]
    metrics = result.metrics
    for name in ("attribute_accuracy", "class_accuracy"):
        assert metrics[name] > 0.5 and metrics[f"{name}_reconstruction"] == 1 and metrics[f"{name}_permuted"] < 0.5
    names = CONDITIONS.classes.names  # type: ignore[union-attr]
    classes = given().members["cond.class"]
    assert result.captions[0] == f"{names[classes[0]]}, {scenes()[0].caption}"
    assert hooks[0].steer[0].score._classes_B.tolist() == classes[:4].tolist()  # type: ignore[attr-defined]


def test_a_weight_of_0_measures_the_model_alone_as_guided_ones_are(hooks: list[Hooks]) -> None:
    task = UnconditionalTask()
    alone = guided(task, GuideConfig(image=8.0, weight=0.0))
    assert not any(one.gradients for one in alone.steering._all)
    metrics = evaluated(alone, task).metrics
    led = evaluated(guided(task, GuideConfig(image=8.0)), task).metrics
    assert {**metrics, "seconds": 0} == {**led, "seconds": 0}, "these pictures are drawn alike here"
    assert [batch.steer for batch in hooks[:2]] == [(), ()] and hooks[2].steer
    names = {full_name(guided(task, GuideConfig(image=w)), 6, SAMPLER, "ema", "a") for w in (8.0, 2.0)}
    names |= {full_name(alone, 6, SAMPLER, "ema", "a"), full_name(guided(task, GuideConfig()), 6, SAMPLER, "ema", "a")}
    assert len(names) == 4


def test_a_card_says_how_pictures_were_guided_and_its_guide_is_found_again(hooks: list[Hooks], tmp_path: Path) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[:8] = 255
    url = asked.picture(tmp_path / "mask.png", mask)
    config = GuideConfig(image=4.0, clip=0.5, factor=2, grey=True, mask=url, cutouts=2)
    task = UnconditionalTask()
    evaluator = guided(task, config)
    card = parse_card(json.dumps(evaluated(evaluator, task).card.to_json()).encode())
    facts = {name: fact for name, fact in card.steering.items() if not name.endswith("_sha256")}
    assert facts == {
        "guide.image": 4.0, "guide.factor": 2, "guide.grey": True, "guide.clip": 0.5, "guide.cutouts": 2
    }  # fmt: skip
    assert "guide.image 4.0" in card.line() and "guide_consistency" in card.line()
    assert guide_of(card.steering, GuideConfig(mask=url)) == config
    with pytest.raises(ConfigError, match=r"say with guide\.mask= where it is"):
        guide_of(card.steering, GuideConfig())
    assert guided(task, config).differing(card) == []
    asked.picture(tmp_path / "mask.png", 255 - mask)
    assert guided(task, config).differing(card)[0].startswith("steering: ")
    alone = evaluated(guided(task, replace(config, clip=0.0, weight=0.0)), task).card
    assert guide_of(alone.steering, GuideConfig(mask=url)).weights == {"image": 0.0}
    assert guide_of({"strength": 0.5}, GuideConfig(run="c")) == GuideConfig(run="c")
    hostile: list[Mapping[str, Any]] = [{"guide.image": "8"}, {"guide.target": "/etc/passwd"}, {"guide.other": 1.0}]
    for others in hostile:
        with pytest.raises(ConfigError, match="guide"):
            guide_of(others, GuideConfig())


@pytest.mark.parametrize(
    ("config", "cache", "run", "words"),
    [
        (
            GuideConfig(image=1.0, factor=5),
            captioned(),
            captioned(),
            "guide.factor=5 does not divide the 64 x 64 pixels",
        ),
        (GuideConfig(clip=1.0), of_pixels(), captioned(), "guide=clip: data.val=v has no captions"),
        (GuideConfig(clip=1.0), captioned(), of_pixels(), "runs/a was trained on a cache without captions"),
    ],
)
def test_what_the_records_cannot_lead_to_is_refused(
    config: GuideConfig, cache: Contract, run: Contract, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        RecordGuides(config, run_info(run), cache, "v")


def test_a_classifier_needs_records_with_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides_module, "load_classifier", lambda *_, **__: 1 / 0)
    own = contract(conditions=CONDITIONS)
    config = GuideConfig(classifier=1.0, run=make_classifier(tmp_path / "classifier", whole(own)))
    none = contract(conditions=replace(CONDITIONS, classes=None))
    with pytest.raises(ConfigError, match=r"guide=classifier: data\.val=v has no classes"):
        RecordGuides(config, run_info(own), none, "v")
    few = contract(conditions=replace(CONDITIONS, classes=replace(CONDITIONS.classes, count=30)))  # type: ignore[type-var]
    with pytest.raises(ContractMismatch, match=r"knows 24 classes, and data\.val=v has 30"):
        RecordGuides(config, run_info(own), few, "v")
    RecordGuides(config, run_info(own), own, "v")


# --------------------------------------------------------------------------------------------------------------------
# The verb and the report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with pictures, and a run that is asked for nothing."""
    folder = tmp_path_factory.mktemp("guided")
    make_cache(folder, 8, conditions=("pixels",))
    make_run(folder, task=UnconditionalTask())
    return folder


def test_the_report_shows_guided_beside_unguided_and_a_card_is_made_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    words = ["eval", f"run={run}", "images=4", "guidance=1", "sampler=ddim", "steps=4", "device=cpu", "guide=image"]
    assert cli.main([*words, "guide.weight=0"]) == 0 and cli.main([*words, "guide.weight=2"]) == 0
    printed = re.findall(r"^ +guide_consistency +([0-9.]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 2 and float(printed[1]) > float(printed[0]) + 0.5
    (path,) = run.glob("evals/*guide.image2*/card.json")
    assert cli.main(["eval", "--from-card", str(path)]) == 0
    assert "reproduced: the figures are those of the card" in capsys.readouterr().out
    loaded = load(str(run))
    assert [bool(e.grid) for e in loaded.evaluations] == [True, True]
    html = page.page([loaded], {})
    assert "The same noise without and with guides" in html and "guide.factor 4, guide.image 2.0" in html
    section = html.partition("The same noise without and with guides")[2].partition("<h2>")[0]
    assert section.count('class="tile') == 3 * 4  # the target, without, with
    assert "consistency with the target" in html


def test_runs_that_draw_nothing_take_no_guide(folder: Path, tmp_path: Path) -> None:
    run = make_classifier(tmp_path / "classifier", whole(contract(conditions=CONDITIONS)))
    assert cli.main(["eval", f"run={run}", "guide=image"]) == 1


def test_class_conditional_models_are_led_to_the_classes_that_they_are_asked_for(hooks: list[Hooks]) -> None:
    """Of a class-conditional model the guide's figure is its own."""
    task, config = ClassTask(), GuideConfig(image=1.0)
    metrics = evaluated(guided(task, config), task).metrics
    assert {"class_accuracy", "guide_consistency"} <= set(metrics)
