"""`latentmill train task=classifier`: it learns, resumes bit-equal, is measured by noise level, and what cannot use it
says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from made.labelled import CLASSES, END, EVERY, labelled_config, make_labelled
from pipeline import eval as eval_verb
from pipeline import export, sample, train
from pipeline.config import (
    DataConfig,
    EvalRunConfig,
    ExportConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    UnconditionalTask,
)
from pipeline.config.loading.load import load
from pipeline.config.tasks.found import own_figures
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.stream import Stream
from pipeline.distributed.world import World
from pipeline.errors import ConfigError, ContractMismatch, LatentmillError, RunError
from pipeline.inference.classifier import load_classifier
from pipeline.jobs.train import fitting
from pipeline.ledger import examine
from pipeline.report import page
from pipeline.runs.directory import committed, load_any_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from pipeline.training.trainer import Trainer
from ranks.faulty_run import state

LOST = EVERY + 3 * 16


class Lost(Exception):
    """A run that is left."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, another of the same classes, and a finished run."""
    where = tmp_path_factory.mktemp("classifier")
    make_labelled(str(where / "cache"), 64)
    make_labelled(str(where / "val"), 32, seed=1)
    train.main(labelled_config(where))
    return where


def rows(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.run) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def figures(folder: Path, n: int) -> dict[str, Any]:
    return json.loads((folder / "run" / "evals" / f"{n:012d}" / "metrics.json").read_text("utf-8"))


def refused(kind: type[LatentmillError], action: Any) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_begins_at_chance_and_learns_where_there_is_little_noise(folder: Path) -> None:
    config = labelled_config(folder)
    first, last = rows(config, "train")[0], rows(config, "train")[-1]
    assert first["loss"] == pytest.approx(math.log(CLASSES), abs=1e-5)
    by_noise = list(last["loss_by_noise"].values())
    assert by_noise[0] < 0.3 * math.log(CLASSES) < by_noise[-1]
    validated = rows(config, "val")
    assert [row["n"] for row in validated] == list(range(EVERY, END + 1, EVERY))
    assert validated[-1]["loss"] < 0.7 * math.log(CLASSES)


def test_evaluations_say_how_often_it_is_right_in_each_quarter_of_the_noise(folder: Path) -> None:
    before, after = figures(folder, 0), figures(folder, END)
    for metrics in (before, after):
        assert {figure.name for figure in own_figures(labelled_config(folder).task)} <= metrics.keys()
        assert metrics["images"] == 32
        assert metrics["accuracy_baseline"] == 1 / CLASSES
        assert metrics["cross_entropy_baseline"] == pytest.approx(math.log(CLASSES))
        quarters = [metrics[f"accuracy_q{i}"] for i in (1, 2, 3, 4)]
        assert metrics["accuracy"] == pytest.approx(sum(quarters) / 4)
        assert metrics["accuracy_q1_low"] <= metrics["accuracy_q1"] <= metrics["accuracy_q1_high"]
    assert before["cross_entropy"] == pytest.approx(math.log(CLASSES), abs=1e-5)
    assert before["cross_entropy_error"] == pytest.approx(0, abs=1e-5)
    assert after["accuracy_q1"] > 0.9 and after["cross_entropy_q1"] < 0.3
    assert after["cross_entropy_q4"] > after["cross_entropy_q1"]
    assert after["accuracy_error"] > 0
    assert not (folder / "run" / "evals" / f"{END:012d}" / "grid.png").exists()


def test_it_sees_the_records_noise_and_times_of_a_diffusion_run(folder: Path) -> None:
    """The ledgers of both hold the same records and the same hash of all draws."""
    config = labelled_config(folder)
    drawing = replace(config, run=str(folder / "drawing"), task=UnconditionalTask(), samples=EVERY)
    drawing = replace(drawing, data=DataConfig(train=config.data.train), checkpoint=replace(config.checkpoint, best=""))
    train.main(drawing)
    ledgers = [
        totals([line for line in read_ledger(open_storage(c.run)) if line.last <= EVERY]) for c in (config, drawing)
    ]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0][0] == EVERY


def test_a_run_that_is_left_resumes_bit_equal_and_its_ledger_proves_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_batch, config = Trainer._next_batch, labelled_config(folder, "disturbed")

    def lost(self: Trainer, stream: Stream) -> Batch:
        if self.n == LOST:
            raise Lost
        return next_batch(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next_batch", lost)
        with pytest.raises(Lost):
            train.train(config, World())
    assert committed(open_storage(config.run)) == [EVERY]
    train.train(config, World())
    urls = [str(folder / name) for name in ("disturbed", "run")]
    assert state(urls[0])[0] == END
    assert state(urls[0]) == state(urls[1])
    for url in urls:
        assert not examine(load_any_run(url), url)[1].problems


def test_eval_measures_a_checkpoint_and_gives_what_training_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_verb.main(EvalRunConfig(run=str(folder / "run"), images=32, device="cpu")) == 0
    said = capsys.readouterr().out
    assert "accuracy_q4" in said and "most common class 0.250" in said
    written = next((folder / "run" / "evals").glob(f"{END:012d}-classify-n32-*/metrics.json"))
    again, found = json.loads(written.read_text("utf-8")), figures(folder, END)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}
    card = json.loads((written.parent / "card.json").read_text("utf-8"))
    assert card["kind"] == "classifier" and card["pictures"]["records"] == 32
    page.write([str(folder / "run")], str(folder / "report.html"))
    shown = (folder / "report.html").read_text("utf-8")
    assert "Accuracy, quarter 1 of the noise" in shown and "Cross-entropy" in shown


def test_what_a_classifier_cannot_do_is_said_in_one_line(folder: Path) -> None:
    run = str(folder / "run")
    for action in (
        lambda: sample.main(SampleConfig(run=run, dest=str(folder / "out.png"))),
        lambda: export.main(ExportConfig(run=run, dest=str(folder / "exported"))),
        lambda: train.main(replace(labelled_config(folder, "begun"), task=UnconditionalTask(), init=run)),
    ):
        assert "the run of a classifier, which draws no pictures" in refused(RunError, action)
    drawing: dict[str, Any] = {"guidance": (1.0,), "strength": 0.5, "keep": True, "caption": "2"}
    for key, value in drawing.items():
        said = refused(ConfigError, partial(eval_verb.main, EvalRunConfig(run=run, **{key: value})))
        assert said.startswith(f"{key}: ") and "draws nothing" in said
    assert "is not the run of a classifier" in refused(RunError, lambda: load_classifier(str(folder / "drawing")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.drop=0.1"], "task.drop=0.1 with task=classifier: there is nothing that it could do without; set"),
        (["init=somewhere"], "init=somewhere with task=classifier: it begins with random weights; leave init out"),
        (["eval.sampler.guidance=2"], "eval.sampler.guidance=2 with task=classifier: it draws no pictures"),
        (["eval.sampler.guidance_low=1"], "eval.sampler.guidance_low=1 with task=classifier"),
        (["diffusion=min_snr"], "task=classifier minimizes cross-entropy: set diffusion.loss=l2"),
        (["diffusion.loss=l1"], "task=classifier minimizes cross-entropy"),
        (["eval.reference=r", "data.val=v"], "eval.reference=r with task=classifier: it draws no pictures"),
        (["eval.perceptual=st-alex"], "whose evaluations compare no pictures"),
        (["model.context_width=16"], "task=classifier gives the UNet no tokens to attend to"),
        (["task.pool=max"], "task.pool=max: there are attention, mean"),
        (
            ["checkpoint.best=fid", "data.val=v"],
            "checkpoint.best=fid is no figure of task=classifier: choose one of task",
        ),
        (["data.val=c"], "data.val=c is the training cache"),
    ],
)
def test_keys_that_say_nothing_of_a_classifier_are_refused_in_one_line(words: list[str], said: str) -> None:
    given = ["run=r", "data.train=c", "task=classifier", "model.context_width=0"]
    assert said in refused(ConfigError, lambda: load("train", [*given, *words]))


@pytest.mark.parametrize(
    ("train_classes", "val_classes", "said"),
    [
        (0, 4, "lacks cond.class, which task=classifier reads; encode it with conditions=[class]"),
        (4, 0, "lacks cond.class, which task=classifier reads"),
        (4, 5, "has class made otherwise than"),
    ],
)
def test_caches_that_do_not_fit_are_refused(tmp_path: Path, train_classes: int, val_classes: int, said: str) -> None:
    make_labelled(str(tmp_path / "cache"), 16, train_classes)
    make_labelled(str(tmp_path / "val"), 16, val_classes, seed=1)
    assert said in refused(ContractMismatch, lambda: train.main(labelled_config(tmp_path)))


def test_submit_says_what_a_step_needs(folder: Path) -> None:
    config = labelled_config(folder)
    manifest = load_manifest(open_storage(config.data.train))
    needed, _ = fitting(config, manifest, None, 1, gpus=False)
    assert needed.parameters == sum(p.numel() for p in load_classifier(config.run).network.parameters())
    assert needed.peak > needed.state


def test_recipes_load_and_their_largest_knows_imagenet() -> None:
    shapes: TrainConfig = load("train", ["run=r", "data.train=c", "experiment=shapes_classifier"])
    assert not shapes.task.draws and shapes.model.context_width == 0
    imagenet: TrainConfig = load("train", ["run=r", "data.train=c", "experiment=ldm8_classifier"])
    assert (imagenet.optim.batch, imagenet.samples) == (256, 300_000 * 256)
    assert imagenet.diffusion == load("train", ["run=r", "data.train=c", "experiment=ldm8_class"]).diffusion


def test_pending_evaluations_are_made_as_training_makes_them(folder: Path) -> None:
    """eval.where=job: a snapshot of the weights waits for `eval pending=true`."""
    config = labelled_config(folder)
    classifier = load_classifier(config.run)
    run = open_storage(str(folder / "run"))
    run.put(f"evals/{EVERY:012d}/ema.safetensors", save(dict(classifier.network.state_dict())))
    assert eval_verb.main(EvalRunConfig(run=config.run, pending=True, device="cpu")) == 0
    again, found = figures(folder, EVERY), figures(folder, END)
    assert again["n"] == EVERY and again["accuracy"] == found["accuracy"]


def test_the_loaded_classifier_knows_its_cache_and_its_classes(folder: Path) -> None:
    trained = load_classifier(str(folder / "run"), at=END)
    assert (trained.n, trained.weights, trained.count) == (END, "ema", CLASSES)
    assert trained.classes == ("kind 0", "kind 1", "kind 2", "kind 3")
    assert trained.contract == load_manifest(open_storage(str(folder / "cache"))).contract
    assert trained.config.prediction == "v"
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    said = torch.stack([trained.log_probability(x, 900.0, 0.9, torch.full((3,), k)) for k in range(CLASSES)])
    assert said.exp().sum(dim=0) == pytest.approx([1.0] * 3, abs=1e-5)
