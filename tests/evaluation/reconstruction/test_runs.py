"""Evaluations of autoencoders' runs: inside training, beside it, by `latentmill eval`, and from a card."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from made.autoencoder_run import VQ, make_autoencoder_run, make_module, make_pixels
from made.cache import make_cache
from made.real_pictures import with_reference
from pipeline import cli
from pipeline import eval as eval_verb
from pipeline.config import AutoencoderConfig, DataConfig, EvalRunConfig, FirstStageEvalConfig, TrackingConfig
from pipeline.distributed.world import World
from pipeline.errors import ConfigError, ContractMismatch, Interrupted, ParseError, RunError
from pipeline.evaluation import beside
from pipeline.evaluation.reconstruction import runs
from pipeline.evaluation.reconstruction.card import Card, is_autoencoders, parse_card
from pipeline.evaluation.reconstruction.evaluate import Reconstructing
from pipeline.evaluation.reconstruction.pictures import Pictures
from pipeline.evaluation.reference import save_reference
from pipeline.report import page
from pipeline.report.run import load
from pipeline.runs.directory import evaluation_folder, load_autoencoder_run
from pipeline.runs.retention import Retention, kept_checkpoints
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import Tracker, read_rows
from pipeline.training.evaluations import first_stage_evaluation

IMAGES = 6


def make(folder: Path, **changes: Any) -> AutoencoderConfig:
    """Caches of pixels and a run with one commit at 128 samples."""
    make_pixels(str(folder / "pixels"), [8])
    make_pixels(str(folder / "val"), [4, 5])
    data = DataConfig(train=str(folder / "pixels"), val=str(folder / "val"))
    settings = {"data": data, "eval": FirstStageEvalConfig(images=IMAGES, pairs=3, batch=4, every=64)}
    return make_autoencoder_run(folder, **{**settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make(folder)
    return folder


def weights(config: AutoencoderConfig) -> dict[str, Tensor]:
    state = make_module(config).named_parameters()
    return {name: tensor.detach() for name, tensor in state if name.startswith("model.")}


def stored(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "evals").glob("*"))


def still(metrics: dict[str, Any]) -> dict[str, Any]:
    """Figures without times."""
    return {name: value for name, value in metrics.items() if not name.endswith("_per_s") and name != "seconds"}


def test_eval_measures_an_autoencoders_run_and_takes_an_evaluation_that_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", f"run={folder / 'run'}", "images=7"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    (name,) = [name for name in stored(folder / "run") if "-n7-" in name]
    place = folder / "run" / "evals" / name
    assert name.startswith("000000000128-reconstruct-n7-")
    assert {path.name for path in place.iterdir()} == {
        "card.json", "metrics.json", "grid.png", "given.png", "grid.json", "pairs.png",
    }  # fmt: skip
    card = parse_card((place / "card.json").read_bytes())
    assert (card.n, card.weights, card.images) == (128, "ema", 7) and card.autoencoder["downsampling"] == 2
    assert f"psnr {card.metrics['psnr']:.2f}" in shown and card.line() in shown
    assert "7 pictures of" in card.line() and "ema weights at 128 samples" in card.line()
    assert "images/s" not in card.line(), "it is of the machine"
    assert json.loads((place / "metrics.json").read_text())["psnr"] == card.metrics["psnr"]
    monkeypatch.setattr(Reconstructing, "__call__", lambda *_, **__: pytest.fail("it was made again"))
    assert cli.main(command) == 0


def test_other_weights_and_numbers_lie_side_by_side(folder: Path) -> None:
    config = EvalRunConfig(run=str(folder / "run"), images=5)
    ema, raw = (runs.evaluate_run(replace(config, weights=kind)) for kind in ("ema", "raw"))  # type: ignore[arg-type]
    assert ema.vae_sha256 != raw.vae_sha256 and ema.metrics["psnr"] != raw.metrics["psnr"]
    names = [name for name in stored(folder / "run") if "-n5-" in name]
    assert len(names) == 2 and sum("-n5-raw-" in name for name in names) == 1


def test_a_card_makes_its_figures_again_and_refuses_other_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.evaluate_run(EvalRunConfig(run=str(folder / "run"), images=4, batch=3))
    (name,) = [name for name in stored(folder / "run") if "-n4-" in name]
    path = folder / "run" / "evals" / name / "card.json"
    assert cli.main(["eval", "--from-card", str(path)]) == 0
    assert "reproduced: the figures are those of the card" in capsys.readouterr().out
    facts = json.loads(path.read_text())
    changed = tmp_path / "card.json"
    changed.write_text(json.dumps(facts | {"metrics": facts["metrics"] | {"psnr": 1.0}}))
    assert cli.main(["eval", "--from-card", str(changed), f"run={folder / 'run'}"]) == 1
    assert "not reproduced: psnr is" in capsys.readouterr().out
    changed.write_text(json.dumps(facts | {"vae_sha256": "0" * 64}))
    with pytest.raises(ContractMismatch, match="autoencoder: 000000000000 on the card"):
        eval_verb.main(EvalRunConfig(run=str(folder / "run"), from_card=str(changed)))


def test_inside_training_figures_pairs_and_card_lie_under_evals_and_reach_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(tmp_path)
    run = open_storage(config.run)
    sent: list[tuple[int, str, bytes, str]] = []
    monkeypatch.setattr(Tracker, "image", lambda _, *what: sent.append(what))
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(run, TrackingConfig(wandb="off")))
        evaluate = stack.enter_context(first_stage_evaluation(config, run, World(), tracker))
        assert evaluate is not None
        metrics = evaluate(weights(config), 64, lambda: False)
        assert metrics is not None
        tracker.log(64, metrics, kind="eval")
        with pytest.raises(Interrupted):
            evaluate(weights(config), 128, lambda: True)
    place = Path(config.run) / evaluation_folder(64)
    assert (metrics["images"], metrics["n"], metrics["weights"]) == (IMAGES, 64, "ema")
    assert json.loads((place / "metrics.json").read_text())["psnr"] == metrics["psnr"]
    ((n, name, png, captions),) = sent
    assert (n, name, png) == (64, "pairs", (place / "pairs.png").read_bytes())
    assert captions.startswith("1. 00000") and len(captions.split("\n")) == 3
    assert not (Path(config.run) / evaluation_folder(128)).exists(), "an evaluation that was stopped left something"
    (row,) = [row for row in read_rows(Path(config.run) / "metrics.jsonl") if row["kind"] == "eval"]
    assert row["psnr"] == metrics["psnr"] and row["latent_std_by_channel"].keys() == {"0", "1", "2"}


def test_the_last_evaluation_may_have_more_pictures(tmp_path: Path) -> None:
    config = make(tmp_path, eval=FirstStageEvalConfig(images=2, final_images=5, pairs=0))
    evaluate = runs.in_training(config, open_storage(config.run), World())
    counts = [evaluate(weights(config), n, lambda: False)["images"] for n in (64, 128)]
    assert counts == [2, 5]
    assert not list(Path(config.run).glob("evals/*/*.png")), "no pairs were asked for"


def test_a_job_makes_the_figures_that_training_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(tmp_path, architecture=VQ)
    run = open_storage(config.run)
    inside = runs.in_training(config, run, World())(weights(config), 64, lambda: False)
    run.put(f"{evaluation_folder(96)}/ema.safetensors", save(weights(config)))
    assert beside.pending(run) == [96]
    assert eval_verb.main(EvalRunConfig(run=config.run, pending=True, device="cpu")) == 0
    assert beside.pending(run) == [] and "eval: 96 samples: psnr" in capsys.readouterr().out
    metrics = json.loads((Path(config.run) / evaluation_folder(96) / "metrics.json").read_text())
    assert still(metrics) == {**still(dict(inside)), "n": 96}
    assert metrics["codes_used"] > 0


def test_the_checkpoint_with_the_best_psnr_is_kept(tmp_path: Path) -> None:
    config = make(tmp_path)
    config = replace(config, checkpoint=replace(config.checkpoint, best="psnr", keep=1))
    run = open_storage(config.run)
    for n, psnr in ((64, 30.0), (96, 31.0), (128, 29.0)):
        run.put(f"{evaluation_folder(n)}/metrics.json", json.dumps({"n": n, "psnr": psnr}).encode())
    assert kept_checkpoints(run, [128, 96, 64], Retention.of(config)) == {128, 96}
    rfid = replace(config, checkpoint=replace(config.checkpoint, best="rfid"))
    for n, value in ((64, 2.0), (96, 9.0), (128, 3.0)):
        run.put(f"{evaluation_folder(n)}/metrics.json", json.dumps({"rfid_democlip": value}).encode())
    assert kept_checkpoints(run, [128, 96, 64], Retention.of(rfid)) == {128, 64}


def test_a_reference_of_the_run_or_of_the_command_gives_rfid(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = with_reference(Pictures.at(str(folder / "val"), "data.val").contract)
    save_reference(str(tmp_path / "ref.safetensors"), given["reference"])
    monkeypatch.setattr(runs, "load_features", lambda name, *_: given["features"])
    config = EvalRunConfig(run=str(folder / "run"), images=9, reference=str(tmp_path / "ref.safetensors"))
    card, without = runs.evaluate_run(config), runs.evaluate_run(replace(config, reference=""))
    assert card.metrics["rfid_democlip"] > card.metrics["rfid_democlip_floor_real"] > 0
    assert "rfid_democlip" not in without.metrics and without.reference is None
    assert [name for name in stored(folder / "run") if "-n9-democlip-" in name], "its name says the features"
    run = replace(load_autoencoder_run(config.run).config, eval=FirstStageEvalConfig(reference=config.reference))
    inside = runs.in_training(run, open_storage(str(tmp_path / "inside")), World())
    assert inside(weights(run), 64, lambda: False)["rfid_democlip"] > 0


def test_the_sheets_of_an_evaluation_are_its_pairs(folder: Path) -> None:
    runs.evaluate_run(EvalRunConfig(run=str(folder / "run"), images=8))
    (name,) = [name for name in stored(folder / "run") if "-n8-" in name]
    place = folder / "run" / "evals" / name
    given, grid = (np.asarray(Image.open(place / f"{sheet}.png")) for sheet in ("given", "grid"))
    assert given.shape == grid.shape == (16, 3 * 16 + 2 * 2, 3)
    metrics = json.loads((place / "metrics.json").read_text())
    captions = json.loads((place / "grid.json").read_text())["captions"]
    worst = float(np.square(given[:, :16].astype(float) - grid[:, :16]).mean())
    assert captions[0].endswith(f": {10 * np.log10(255**2 / worst):.1f} dB")
    assert float(captions[0].split(": ")[1].split()[0]) < metrics["psnr"]


def test_the_report_of_a_run_shows_figures_over_samples_and_the_worst_pairs(tmp_path: Path) -> None:
    config = make(tmp_path)
    evaluate = runs.in_training(config, open_storage(config.run), World())
    for n, factor in ((0, 0.5), (128, 1.0)):
        evaluate({name: factor * tensor for name, tensor in weights(config).items()}, n, lambda: False)
    run = load(config.run)
    html = page.page([run], {})
    assert not run.notes and run.last is not None and run.last.reconstructs
    assert "Worst reconstructions after 128 images" in html and 'class="samples pairs"' in html
    assert html.count("background-image:url(data:image/png;base64,") == 2  # pictures and reconstructions of the last
    assert ">PSNR <" in html and "dB, mean over pictures" in html
    assert f"{run.last.metrics['psnr']:.2f} ± {run.last.metrics['psnr_error']:.2f}" in html
    assert "Images/s decoded</figcaption>" not in html and "Images/s decoded <" not in html, "no chart of a constant"
    assert "images/s decoded" in html and "latent std" in html
    assert run.last.card["line"] in html.replace("&#x27;", "'")


def test_the_report_of_a_run_shows_the_parts_of_its_loss(tmp_path: Path) -> None:
    config = make(tmp_path)
    with Tracker(open_storage(config.run), TrackingConfig(wandb="off")) as tracker:
        for n in (64, 128):
            parts = {"rec": 0.5, "kl": 4.0, "logits_real": 1.0, "logits_fake": -1.0, "gan": 1.0, "discriminator": 0.4}
            tracker.log(n, {"loss": 0.5, **parts}, kind="train")
    html = page.page([load(config.run)], {})
    for title in ("Reconstruction error", "KL <", "Generator&#x27;s loss", "Logits of the discriminator"):
        assert title in html
    assert "Distance of latents to their codes" not in html, "there is no codebook"
    assert html.count("Logits of the discriminator</figcaption>") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance": (2.0,)}, "guidance: {run} is the run of an autoencoder, which draws nothing; leave it out"),
        ({"sampler": ("ddim",)}, "sampler: {run} is the run of an autoencoder"),
        ({"strength": 0.5}, "strength: {run} is the run of an autoencoder"),
        ({"keep": True}, "keep: {run} is the run of an autoencoder"),
        ({"caption": "2"}, "caption: {run} is the run of an autoencoder"),
        ({"data": DataConfig(val="{folder}/latents")}, "data.val={folder}/latents holds latents and no pictures"),
    ],
)
def test_what_does_not_fit_an_autoencoder_is_one_line(folder: Path, change: dict[str, Any], words: str) -> None:
    if "data" in change:
        make_cache(str(folder / "latents"), [2])
        change = {"data": DataConfig(val=str(folder / "latents"))}
    with pytest.raises((ConfigError, ContractMismatch)) as caught:
        eval_verb.main(EvalRunConfig(run=str(folder / "run"), **change))
    assert str(caught.value).startswith(words.format(run=folder / "run", folder=folder))
    assert "\n" not in str(caught.value)


def test_a_run_without_held_out_pictures_says_what_to_give(tmp_path: Path) -> None:
    config = make(tmp_path, data=DataConfig(train=str(tmp_path / "pixels")))
    with pytest.raises(ConfigError, match=r"has no data\.val: give the cache whose pictures are reconstructed"):
        eval_verb.main(EvalRunConfig(run=config.run))
    assert runs.evaluate_run(EvalRunConfig(run=config.run, data=DataConfig(val=str(tmp_path / "val")))).images == 9


def test_pictures_that_the_run_was_trained_on_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.evaluate_run(EvalRunConfig(run=str(folder / "run"), data=DataConfig(val=str(folder / "pixels"))))
    assert "its pictures are not new to the model" in capsys.readouterr().err


def test_a_run_of_the_other_kind_is_refused(folder: Path) -> None:
    other = folder / "diffusion"
    other.mkdir()
    (other / "run.json").write_text((folder / "run" / "run.json").read_text())
    (other / "config.yaml").write_text("run: r\nsamples: 1\n")
    with pytest.raises(RunError, match="is the run of a diffusion model"):
        load_autoencoder_run(str(other))


CARD = Card(
    metrics={"psnr": 30.0, "psnr_error": 0.1, "images": 4, "weights": "ema"},
    images=4,
    n=64,
    weights="ema",
    autoencoder={"architecture": "AutoencoderKL", "downsampling": 8, "channels": 4, "dtype": "float32"},
    vae_sha256="ab" * 32,
    pictures={"dataset": "cd" * 32, "records": 4, "resolution": 64},
    batch=4,
    features=None,
    reference=None,
    rank_deficient=False,
    device="cpu",
    versions={"latentmill": "0"},
)


def test_a_card_is_read_as_it_was_written() -> None:
    data = json.dumps(CARD.to_json()).encode()
    assert parse_card(data) == CARD and is_autoencoders(data)
    assert not is_autoencoders(b'{"sampler": "ddim"}')


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "diffusion"},
        {"format": 2},
        {"weights": "mine"},
        {"autoencoder": {"architecture": "AutoencoderKL"}},
        {"pictures": {"records": 4}},
        {"features": {"name": "democlip"}},
        {"reference": {"sha256": "a"}},
        {"perceptual": {"name": "st-alex"}},
        {"versions": {}},
        {"metrics": {"psnr": "high"}},
        {"unknown": 1},
        {"images": 0},
    ],
)
def test_a_card_that_is_damaged_or_of_another_version_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(ParseError):
        parse_card(json.dumps(CARD.to_json() | changes).encode())
