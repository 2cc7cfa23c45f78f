"""The precision in which pictures are drawn is on the card and in the folder's name, and nothing is measured in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from made.evaluated import denoiser_of, evaluator_of, in_memory, of_pixels
from made.run import SAMPLER, make_cache, make_run
from pipeline import eval as eval_verb
from pipeline import sample
from pipeline.config import (
    ClassTask,
    EvalRunConfig,
    InpaintTask,
    LayoutTask,
    SampleConfig,
    SamplerConfig,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    UnconditionalTask,
)
from pipeline.distributed.world import World
from pipeline.errors import ConfigError, ParseError
from pipeline.evaluation import evaluate
from pipeline.evaluation.card import Card, parse_card
from pipeline.evaluation.judging import Judging
from pipeline.evaluation.runs import commits
from pipeline.evaluation.runs.cards import config_of
from pipeline.evaluation.runs.while_training import in_training
from pipeline.inference import precision as precision_module
from pipeline.inference.precision import Precision, precision_of, products
from pipeline.models.denoiser import Denoiser
from pipeline.storage.urls import open_storage

FEW = SamplerConfig(sampler="euler", steps=2, guidance=1.0, batch=2)
TASKS = (UnconditionalTask(), ClassTask(), LayoutTask(), SemanticTask(), SuperresTask(), InpaintTask())
BF16 = Precision(torch.bfloat16)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def allowed() -> list[Any]:
    """PyTorch's settings of TF32 as they are."""
    return [getattr(where, name) for where, name, _ in precision_module._settings(True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    make_cache(folder)
    make_run(folder)
    return folder


def without_zeros(denoiser: Denoiser) -> Denoiser:
    """The denoiser with other weights than a fresh one's, of which the last are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return denoiser


def request_of(folder: Path, **changes: Any) -> EvalRunConfig:
    config = EvalRunConfig(run=str(folder / "run"), images=4, guidance=(2.0,), sampler=("ddim",), steps=(4,), batch=5)
    return replace(config, **changes)


def test_auto_is_bf16_on_gpus_that_have_it_and_a_cpu_has_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_of("auto", True, CPU) == precision_of("fp32", False, CPU) == Precision()
    assert precision_of("bf16", False, CPU) == BF16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has or including_emulation
        )
        assert precision_of("auto", False, GPU) == Precision(dtype)
        assert precision_of("fp32", True, GPU) == Precision(torch.float32, tf32=True)


def test_tf32_is_allowed_inside_alone_and_then_as_it_was() -> None:
    before = allowed()
    with products(tf32=True):
        inside = allowed()
        with products(tf32=False):
            assert not set(allowed()) & set(inside)
        assert allowed() == inside
    assert allowed() == before
    with pytest.raises(ZeroDivisionError), products(tf32=inside != before):
        assert 1 // 0
    assert allowed() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_images_are_drawn_with_tf32_where_it_is_named_and_judged_without(
    tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: dict[str, list[Any]] = {}
    draw, add = evaluate.draw, Judging.add

    def drawn(*arguments: Any) -> Any:
        noted["drawn"] = allowed()
        return draw(*arguments)

    def judged(*arguments: Any) -> None:
        noted["judged"] = allowed()
        add(*arguments)

    monkeypatch.setattr(evaluate, "draw", drawn)
    monkeypatch.setattr(Judging, "add", judged)
    task, cache = SemanticTask(), of_pixels()
    evaluator = evaluator_of(task, cache, in_memory(cache), precision=Precision(tf32=tf32))
    card = evaluator(denoiser_of(task, cache), 0, images=2, sampler=FEW).card
    with products(tf32):
        assert noted["drawn"] == allowed()
    with products(tf32=False):
        assert noted["judged"] == allowed()
    assert card.precision == ({"tf32": True} if tf32 else {})


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_draws_in_bf16_what_it_draws_in_fp32_but_for_rounding(task: TaskConfig) -> None:
    cache = of_pixels()
    validation = in_memory(cache)
    denoiser = without_zeros(denoiser_of(task, cache))
    whole = evaluator_of(task, cache, validation)(denoiser, 0, images=2, sampler=FEW)
    rounded = evaluator_of(task, cache, validation, precision=BF16)(denoiser.bfloat16(), 0, images=2, sampler=FEW)
    assert "images_not_finite" not in rounded.metrics
    apart = np.abs(whole.grid.astype(int) - rounded.grid.astype(int))
    assert 0 < apart.mean() < 4
    assert (whole.card.precision, rounded.card.precision) == ({}, {"denoiser": "bf16"})


def test_figures_in_bf16_lie_beside_those_in_fp32_and_are_made_again_in_bf16(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, halves = (eval_verb.evaluate_run(request_of(folder, precision=name))[0] for name in ("auto", "bf16"))
    assert whole.precision == {} and halves.precision == {"denoiser": "bf16"}
    assert whole.metrics["clip_score"] != halves.metrics["clip_score"]
    assert halves.metrics["clip_score"] == pytest.approx(whole.metrics["clip_score"], abs=2)
    assert "denoiser in bf16" in halves.line() and "bf16" not in whole.line()
    plain, named = sorted((path.name for path in (folder / "run/evals").iterdir()), key=lambda name: "-bf16-" in name)
    assert "-g2-n4-s0-bf16-" in named and "-g2-n4-s0-bf16-" not in plain
    assert eval_verb.evaluate_run(request_of(folder, precision="bf16"))[0] == halves  # which is kept
    url = str(folder / "run/evals" / named / "card.json")
    again = EvalRunConfig(run=str(folder / "run"), from_card=url)
    assert config_of(again, halves).precision == "bf16" and config_of(again, whole).precision == "fp32"
    assert config_of(replace(again, precision="fp32"), halves).precision == "fp32"
    assert config_of(again, replace(whole, precision={"tf32": True})).tf32
    assert eval_verb.main(again) == 0
    assert "reproduced: the figures are those of the card" in capsys.readouterr().out


def test_evaluations_in_training_are_in_the_precision_of_eval(folder: Path, tmp_path: Path) -> None:
    from made.run import make_denoiser, train_config
    from pipeline.data.format.manifest import load_manifest

    config = train_config(folder)
    config = replace(config, eval=replace(config.eval, images=3, precision="bf16"))
    manifest = load_manifest(open_storage(config.data.train))
    evaluate_at = in_training(config, open_storage(str(tmp_path)), World(), manifest, torch.zeros(32, 128))
    weights = {name: tensor.clone() for name, tensor in make_denoiser(config).state_dict().items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    evaluate_at(weights, 64, lambda: False)
    assert json.loads((tmp_path / f"evals/{64:012d}/card.json").read_text())["precision"] == {"denoiser": "bf16"}
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())  # fp32, as they were


def test_a_decoder_of_other_precision_is_on_the_card_and_does_not_make_its_figures_again() -> None:
    task, cache = UnconditionalTask(), of_pixels()
    evaluator = evaluator_of(task, cache, in_memory(cache))
    card = evaluator(denoiser_of(task, cache), 0, images=2, sampler=FEW).card
    halves: Any = SimpleNamespace(dtype=torch.bfloat16)
    assert Precision().facts(halves) == {"decoder": "bf16"}
    assert evaluator.differing(card) == []
    differing = evaluator.differing(replace(card, precision={"decoder": "bf16"}))
    assert differing == ["decoder: bf16 on the card, fp32 here"]
    evaluator.precision = {"decoder": "bf16"}
    assert evaluator.differing(card) == ["decoder: fp32 on the card, bf16 here"]
    assert evaluator.differing(replace(card, precision=None)) == []  # of an earlier version, which does not say


def test_a_card_of_a_precision_that_is_none_is_refused() -> None:
    task, cache = UnconditionalTask(), of_pixels()
    card: Card = evaluator_of(task, cache, in_memory(cache))(denoiser_of(task, cache), 0, images=2, sampler=FEW).card
    stored = json.loads(json.dumps(card.to_json()))
    assert stored["precision"] == {} and parse_card(json.dumps(stored).encode()).precision == {}
    earlier = {name: value for name, value in stored.items() if name != "precision"}
    assert parse_card(json.dumps(earlier).encode()).precision is None
    wrong: list[Any] = [{"denoiser": "fp8"}, {"tf32": "yes"}, {"tf32": 1}, {"encoder": "bf16"}, []]
    for precision in wrong:
        with pytest.raises(ParseError, match="precision"):
            parse_card(json.dumps(stored | {"precision": precision}).encode())


def test_sample_draws_in_the_precision_that_is_named(folder: Path, tmp_path: Path) -> None:
    config = SampleConfig(run=str(folder / "run"), n=2, dest=str(tmp_path / "o.png"), sampler=SAMPLER, prompt=("a",))
    whole, halves = (
        sample.sample_rows(replace(config, precision=name))[0].images.astype(int)  # type: ignore[arg-type]
        for name in ("auto", "bf16")
    )
    assert 0 < np.abs(whole - halves).mean() < 4


@pytest.mark.parametrize("tf32", [False, True])
def test_sample_and_eval_draw_with_tf32_where_their_key_names_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    """CPUs have no TF32: the settings that a GPU would be under are looked at."""
    noted = list[Any]()
    plain = sample.draw

    def drawn(*given: Any) -> Any:
        noted.append(allowed())
        return plain(*given)

    for module in (evaluate, sample):
        monkeypatch.setattr(module, "draw", drawn)
    for module in (commits, sample):
        monkeypatch.setattr(module, "precision_of", lambda name, tf32, device: Precision(tf32=tf32))
    config = SampleConfig(run=str(folder / "run"), n=1, dest=str(tmp_path / "o.png"), sampler=SAMPLER, prompt=("a",))
    sample.sample_rows(replace(config, tf32=tf32))
    card = eval_verb.evaluate_run(request_of(folder, tf32=tf32, images=3))[0]
    with products(tf32):
        assert len(noted) >= 2 and all(one == allowed() for one in noted)
    assert card.precision == ({"tf32": True} if tf32 else {})


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"tf32": True}])
def test_what_draws_nothing_has_no_precision_to_draw_in(change: dict[str, Any]) -> None:
    from pipeline.evaluation.classifier import NONE_OF_IT
    from pipeline.evaluation.reconstruction.runs import refuse_of_diffusion

    with pytest.raises(ConfigError, match=next(iter(change))):
        refuse_of_diffusion(EvalRunConfig(run="r", **change))
    assert set(change) <= set(NONE_OF_IT)
