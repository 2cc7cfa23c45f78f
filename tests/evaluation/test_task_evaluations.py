"""Evaluations of every task, from conditions in memory to what a run directory, the report and the tracker get."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from made.evaluated import RECORDS, denoiser_of, evaluator_of, in_memory, of_pixels
from made.judged import CONDITIONS, given, pictures
from made.report import parse
from made.stlpips_golden import seeded
from made.thread_world import on_ranks
from pipeline.config import (
    ClassTask,
    InpaintTask,
    LayoutTask,
    SamplerConfig,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    UnconditionalTask,
)
from pipeline.config.tasks.figures import PERCEIVED, Figure
from pipeline.config.tasks.found import facts_of
from pipeline.distributed.world import World
from pipeline.evaluation import evaluate
from pipeline.evaluation.beside import show
from pipeline.evaluation.card import parse_card
from pipeline.evaluation.evaluate import EvalResult, Evaluator
from pipeline.evaluation.judging import Rows
from pipeline.evaluation.stored import write
from pipeline.evaluation.tasks.judge import make_judge
from pipeline.models.perceptual.loaded import from_tensors
from pipeline.models.perceptual.network import Perceptual
from pipeline.report import page
from pipeline.report.grid import png, tile
from pipeline.report.run import load
from pipeline.storage.urls import open_storage

SAMPLER = SamplerConfig(sampler="ddim", steps=4, guidance=1.0, batch=4)
TASKS = (
    UnconditionalTask(),
    ClassTask(),
    LayoutTask(),
    SemanticTask(),
    SuperresTask(),
    InpaintTask(),
)
SHOWN = ("layout", "semantic", "superres", "inpaint")


def drawn_as_records(*arguments: Any) -> tuple[np.ndarray, int]:
    """In place of sampling: every third image is noise, the others are their records' pictures."""
    numbers = arguments[5]
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    return np.stack([noise if i % 3 == 2 else pictures()[i % RECORDS] for i in numbers]), 0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling itself is what other tests are about."""
    monkeypatch.setattr(evaluate, "draw", drawn_as_records)


def figures_without_weights(task: TaskConfig) -> list[Figure]:
    """The task's figures that need no weights of a perceptual distance."""
    return [figure for figure in facts_of(task).figures if figure not in PERCEIVED]


@cache
def evaluated(task: TaskConfig, images: int = 5) -> EvalResult:
    facts = of_pixels()
    return evaluator_of(task, facts, in_memory(facts))(denoiser_of(task, facts), 64, images=images, sampler=SAMPLER)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_cache_without_captions_is_judged_by_its_tasks_figures_alone(task: TaskConfig) -> None:
    metrics = evaluated(task).metrics
    assert "clip_score" not in metrics and not [name for name in metrics if name.startswith("attribute")]
    for figure in figures_without_weights(task):
        if figure.name == "completed" and figure.name not in metrics:  # no object is partly hidden
            continue
        assert np.isfinite(metrics[figure.name]), figure.name
        ends = {"share": ("low", "high"), "mean": ("error",), "pooled": ("error",)}[figure.kind]
        assert all(f"{figure.name}_{end}" in metrics for end in ends)


@pytest.mark.parametrize(
    ("task", "bound"),
    [
        (ClassTask(), "permuted"),
        (LayoutTask(), "permuted"),
        (SemanticTask(), "permuted"),
        (SuperresTask(), "baseline"),
        (InpaintTask(), "baseline"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_figure_stands_between_bounds(task: TaskConfig, bound: str) -> None:
    """The autoencoder loses nothing but half a level."""
    metrics, figures = evaluated(task).metrics, figures_without_weights(task)
    for figure in figures:
        if figure.name in metrics:
            assert (f"{figure.name}_{bound}" in metrics) == (figure.name != "psnr_outside")  # which filling leaves
            assert metrics[f"{figure.name}_reconstruction"] >= (45 if "psnr" in figure.name else 0.93), figure.name
    assert not [name for name in metrics if name.endswith("_low_permuted")]


@pytest.mark.parametrize("task", [SuperresTask(), InpaintTask()], ids=lambda task: task.name)
def test_the_perceptual_distance_stands_between_bounds_and_the_card_names_its_weights(task: TaskConfig) -> None:
    facts, network = of_pixels(), from_tensors(seeded("alex"), "made")
    denoiser = denoiser_of(task, facts)

    def evaluator(world: World, perceptual: Perceptual | None = network) -> Evaluator:
        judge = make_judge(facts, task, perceptual)
        return evaluator_of(task, facts, in_memory(facts), world=world, judge=judge)

    def evaluation(world: World) -> EvalResult:
        return evaluator(world)(denoiser, 64, images=6, sampler=SAMPLER)

    result = evaluation(World())
    metrics, card = result.metrics, parse_card(json.dumps(result.card.to_json()).encode())
    assert metrics["st_lpips_reconstruction"] < metrics["st_lpips"] / 10  # half a level; noise among the pictures
    assert 0 < metrics["st_lpips_baseline"] < metrics["st_lpips_permuted"] and metrics["st_lpips_error"] > 0
    assert not [name for name in metrics if name.endswith("_permuted") and name != "st_lpips_permuted"]
    assert card.judge["perceptual_sha256"] == network.sha256
    assert f"st-LPIPS by st-alex {network.sha256[:12]}" in card.line()
    differing = {perceptual: evaluator(World(), perceptual).differing(card) for perceptual in (network, None)}
    assert differing == {network: [], None: [f"perceptual: {network.sha256[:12]} on the card, none here"]}
    others = {name: value for name, value in metrics.items() if not name.startswith(("seconds", "st_lpips"))}
    assert others | {"seconds": 0} == evaluated(task, 6).metrics | {"seconds": 0}
    for together in on_ranks(2, evaluation):
        assert {**together.metrics, "seconds": 0} == {**metrics, "seconds": 0}


def test_permuted_conditions_are_those_of_the_next_image() -> None:
    """An evaluation whose pictures are the records' own is right, and wrong by what the next record was given."""
    facts = of_pixels()
    validation = in_memory(facts)
    evaluator = evaluator_of(LayoutTask(), facts, validation)
    judging, numbers = evaluator.judging, list(range(RECORDS))
    counted = Rows()
    judging.add(counted, numbers, pictures()[:RECORDS], judging.given(numbers, RECORDS), RECORDS)
    metrics = judging.figures(counted)
    assert metrics["layout_right"] == metrics["layout_right_reconstruction"] == 1
    assert metrics["layout_right_permuted"] == 0 and metrics["layout_iou_permuted"] < 0.1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_figures_are_those_of_any_world(task: TaskConfig) -> None:
    facts = of_pixels()
    denoiser = denoiser_of(task, facts)

    def evaluation(world: World) -> EvalResult:
        evaluator = evaluator_of(task, facts, in_memory(facts), world=world)
        return evaluator(denoiser, 64, images=9, sampler=SAMPLER)

    alone = evaluation(World())
    for together in on_ranks(2, evaluation):
        assert {**together.metrics, "seconds": 0} == {**alone.metrics, "seconds": 0}
        assert alone.captions == together.captions and np.array_equal(alone.grid, together.grid)


def test_integers_reach_the_task_as_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 2049 is no float16, and class 16,777,217 no float32."""
    facts = of_pixels()
    seen = {}
    for task in (ClassTask(), SemanticTask()):
        denoiser = denoiser_of(task, facts)
        monkeypatch.setattr(denoiser.task, "prepare", lambda batch, *a, **k: seen.update(batch) or batch)
        evaluator_of(task, facts, in_memory(facts))(denoiser, 64, images=2, sampler=SAMPLER)
    assert (seen["cond.class"].dtype, seen["cond.labels"].dtype) == (torch.int32, torch.uint8)


def test_a_picture_is_judged_by_the_variant_that_the_task_saw() -> None:
    variants = 3
    lowres = replace(CONDITIONS.lowres, variants=variants)  # type: ignore[type-var]
    facts = of_pixels(conditions=replace(CONDITIONS, lowres=lowres))
    validation = in_memory(facts)
    small = validation.arrays["cond.lowres"]
    validation.arrays["cond.lowres"] = np.stack([np.full_like(small, 60 * k) for k in range(variants)], axis=1)
    evaluator, task = evaluator_of(SuperresTask(), facts, validation, seed=4), denoiser_of(SuperresTask(), facts).task
    numbers = list(range(RECORDS))
    batch = evaluator.judging.batch(numbers, RECORDS, torch.device("cpu"))
    prepared = task.prepare(batch, evaluator.seed, torch.tensor(numbers), training=False)["cond.lowres"]
    judged = torch.from_numpy(evaluator.judging.given(numbers, RECORDS).members["cond.lowres"])
    assert torch.equal(prepared, judged.float().div(127.5).sub(1)) and len(judged.unique()) > 1


def test_inpainted_pictures_are_pasted_before_they_are_shown_and_measured() -> None:
    result = evaluated(InpaintTask())
    known = ~np.unpackbits(given().members["cond.mask"][:3], axis=-1).astype(bool)
    assert np.array_equal(result.grid[known], pictures()[:3][known])
    assert not np.array_equal(result.grid[2], pictures()[2])  # noise, inside the hole
    assert result.metrics["psnr_outside"] < 20  # noise before that
    assert result.card.judge["pasted"] is True


# --------------------------------------------------------------------------------------------------------------------
# Cards, pages and the tracker


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_what_was_given_is_stored_beside_what_was_drawn_and_shown(task: TaskConfig, tmp_path: Path) -> None:
    run, result = open_storage(str(tmp_path)), evaluated(task)
    folder = write(run, result)
    assert run.exists(f"{folder}/given.png") == (task.name in SHOWN)
    run.put("config.yaml", b"run: a\n")
    html = page.page([load(str(tmp_path))], {})
    parse(html)
    assert html.count("-given{background-image") == (task.name in SHOWN)
    assert html.count('class="pair"') == (3 if task.name in SHOWN else 0)
    titles = [figure.title for figure in facts_of(task).figures if figure.name in result.metrics]
    assert all(title[1:] in html for title in titles)
    sent = []
    show(run, 64, SimpleNamespace(image=lambda n, name, png, words: sent.append((name, words))))  # type: ignore[arg-type]
    assert [name for name, _ in sent] == ["samples", *(["given"] if task.name in SHOWN else [])]
    assert all(words.startswith(f"1. {result.captions[0]}") for _, words in sent)


@pytest.mark.parametrize("damage", ["no picture", "another size", "missing"])
def test_samples_are_shown_without_a_damaged_picture_of_what_was_given(damage: str, tmp_path: Path) -> None:
    run = open_storage(str(tmp_path))
    given_png = f"{write(run, evaluated(LayoutTask()))}/given.png"
    run.put("config.yaml", b"run: a\n")
    if damage == "missing":
        run.delete(given_png)
    else:
        run.put(given_png, png(tile(pictures()[:1], 1)) if damage == "another size" else b"<svg onload=alert(1)>")
    read = load(str(tmp_path))
    html = page.page([read], {})
    assert html.count('class="sample"') == 3 and 'class="pair"' not in html and "-given" not in html
    assert [note.startswith(f"{given_png} is left out") for note in read.notes] == [True] * (damage != "missing")
    sent: list[str] = []
    show(run, 64, SimpleNamespace(image=lambda n, name, png, words: sent.append(name)))  # type: ignore[arg-type]
    assert sent[0] == "samples"


def test_compared_runs_show_the_figures_of_each_task_with_its_bounds(tmp_path: Path) -> None:
    for task in (ClassTask(), SemanticTask()):
        run = open_storage(str(tmp_path / task.name))
        write(run, evaluated(task))
        write(run, replace(evaluated(task), n=128))
        run.put("config.yaml", b"run: a\n")
    html = page.page([load(str(tmp_path / name)) for name in ("class", "semantic")], {})
    text = "".join(parse(html).text)
    for heading in ("Class accuracy", "Mean IoU of labels", "Label accuracy"):
        assert heading in text
    assert text.count("permuted 0.") >= 3


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_card_names_the_task_its_figures_and_how_they_were_made(task: TaskConfig) -> None:
    card = evaluated(task).card
    again = parse_card(json.dumps(card.to_json()).encode())
    assert again == card and card.clip == {}
    assert card.judge["figures"] == [figure.name for figure in figures_without_weights(task)]
    assert card.judge.get("truth") == ("pixels" if task.name in ("superres", "inpaint") else None)
    assert card.judge.get("classes") == ("records" if task.name == "class" else None)
    line = card.line()
    assert f"task {task.name}" in line and figures_without_weights(task)[-1].name in line


def test_the_words_beside_pictures_are_names_or_numbers_of_images() -> None:
    assert (
        evaluated(UnconditionalTask()).captions
        == evaluated(SuperresTask()).captions
        == [f"image {i}" for i in range(3)]
    )
    assert evaluated(ClassTask()).captions[0] in CONDITIONS.classes.names  # type: ignore[union-attr]


def test_records_start_over_where_images_are_more() -> None:
    result = evaluated(SemanticTask(), images=RECORDS + 3)
    assert result.metrics["images"] == RECORDS + 3 and result.card.captions["records"] == RECORDS
