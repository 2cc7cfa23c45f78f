"""`latentmill autoencoder` on a small cache of pixels: what it writes, records, refuses, and begins with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from made.encode import config as encode_config
from made.encode import write_sized
from made.first_stages import vq_folder
from made.pixels import BATCH, GAN, KL, VQ, config_of, make_pixels
from made.stlpips_golden import seeded
from pipeline import autoencoder
from pipeline.cli import main as cli
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EncodersConfig,
    FirstStageLossConfig,
    GanConfig,
    GuardConfig,
    LaunchConfig,
)
from pipeline.data.reading.batch import Batch
from pipeline.errors import ContractMismatch, DatasetError, LossSpike, NonFinite, RunError, WeightsError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from pipeline.models.perceptual.network import Kind
from pipeline.runs.checkpoint import load_weights
from pipeline.runs.directory import committed
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import read_rows
from pipeline.training.objectives.first_stage import FirstStageObjective, PreparedPictures
from preprocess import encode

BOTH = pytest.mark.parametrize("stage", [KL, VQ], ids=lambda stage: stage.name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_pixels(tmp_path_factory.mktemp("pixels"))


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def weights(run: str, which: str = "ema") -> dict[str, torch.Tensor]:
    return load_weights(open_storage(run), 0, which, ("model.",))[1]


def rows(run: str, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_rows(Path(run, "metrics.jsonl")) if row["kind"] == kind]


def test_the_loss_falls_and_rows_hold_its_parts(cache: str, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path / "run", gan=GanConfig(), samples=30 * BATCH)
    assert autoencoder.main(config) == 0
    found = rows(config.run)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert {"rec", "kl", "lr", "grad_norm", "tflops", "images_per_s"} <= found[-1].keys()
    assert "discriminator" not in found[-1] and "lambda" not in found[-1]
    stored = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert stored["contract"]["stored"] == "pixels" and "init" not in stored


@BOTH
def test_bf16_follows_fp32_within_its_precision(cache: str, tmp_path: Path, stage: Any) -> None:
    """The discriminator and its weight among the rest."""
    found = []
    for precision in ("fp32", "bf16"):
        config = config_of(cache, tmp_path / precision, stage, samples=6 * BATCH)
        autoencoder.main(replace(config, precision=precision))  # type: ignore[arg-type]
        found.append(rows(config.run))
    fp32, bf16 = found
    assert fp32[-1]["lambda"] > 0
    for mine, exact in zip(bf16, fp32, strict=True):
        assert mine["loss"] == pytest.approx(exact["loss"], rel=2e-2)
        assert mine["loss"] != exact["loss"]


def test_pngs_train_to_the_bit_as_arrays_do(cache: str, tmp_path: Path) -> None:
    (tmp_path / "png").mkdir()
    pngs = make_pixels(tmp_path / "png", pixels="png")
    for url, name in ((cache, "array"), (pngs, "pngs")):
        assert autoencoder.main(config_of(url, tmp_path / name, samples=2 * BATCH)) == 0
    one, other = (weights(str(tmp_path / name), "raw") for name in ("array", "pngs"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("kind", "prefix"), [("alex", ""), ("lpips-vgg", "lpips-vgg:")])
def test_the_perceptual_network_is_a_loss_and_no_part_of_what_is_trained_and_stored(
    cache: str, tmp_path: Path, kind: Kind, prefix: str
) -> None:
    weights_file = tmp_path / "weights.safetensors"
    save_file(dict(seeded(kind)), weights_file)
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    loss = FirstStageLossConfig(perceptual=f"{prefix}{weights_file}#sha256={digest}", perceptual_weight=2.0, kl=1e-2)
    config = config_of(cache, tmp_path / "run", crop=0, loss=loss, gan=GanConfig(), samples=2 * BATCH)
    autoencoder.main(config)
    row = rows(config.run)[-1]
    assert row["perceptual"] > 0
    assert row["loss"] == pytest.approx(row["rec"] + 2 * row["perceptual"] + 1e-2 * row["kl"], rel=1e-5)
    _, stored = load_weights(open_storage(config.run), 0, "raw")
    assert {name.partition(".")[0] for name in stored} == {"model"}
    without = replace(config, run=str(tmp_path / "without"), loss=replace(loss, perceptual="none"))
    autoencoder.main(without)
    mine, other = weights(config.run, "raw"), weights(without.run, "raw")
    assert any((value - other[name]).abs().max() > 1e-5 for name, value in mine.items()), "it moves nothing"
    changed = replace(loss, perceptual=f"{prefix}{weights_file}#sha256={'0' * 64}")
    with pytest.raises(WeightsError, match=r"loss\.perceptual") as caught:
        autoencoder.main(replace(config, run=str(tmp_path / "other"), loss=changed))
    assert "\n" not in str(caught.value)


@BOTH
def test_a_run_begins_with_the_averages_of_another(cache: str, tmp_path: Path, stage: Any) -> None:
    first = config_of(cache, tmp_path / "first", stage, samples=4 * BATCH)
    autoencoder.main(first)
    optim = replace(first.optim, lr=1e-12)
    second = config_of(cache, tmp_path / "second", stage, init=first.run, optim=optim, samples=BATCH, gan=GanConfig())
    second = replace(second, loss=replace(second.loss, restart=0))
    autoencoder.main(second)
    for name, value in weights(first.run).items():
        assert torch.allclose(weights(second.run, "raw")[name], value, atol=1e-9), name
    facts = json.loads((tmp_path / "second" / "run.json").read_bytes())["init"]
    assert (facts["kind"], facts["weights"], facts["n"], facts["from"]) == ("run", "ema", 4 * BATCH, first.run)
    autoencoder.main(replace(second, samples=2 * BATCH))
    assert json.loads((tmp_path / "second" / "run.json").read_bytes())["init"] == facts


def test_a_run_begins_with_a_folder_of_diffusers(cache: str, tmp_path: Path) -> None:
    folder = str(vq_folder(tmp_path / "vq", scaling_factor=0.5))
    stage = replace(VQ, codes=32)
    config = config_of(cache, tmp_path / "run", stage, init=folder, gan=GanConfig(), samples=BATCH)
    config = replace(config, optim=replace(config.optim, lr=1e-12), loss=replace(config.loss, restart=0))
    autoencoder.main(config)
    theirs = load_autoencoder(EncodersConfig(vae=folder)).model.state_dict()  # type: ignore[attr-defined]
    mine = weights(config.run, "raw")
    assert {f"model.{name}" for name in theirs} == mine.keys()
    assert all(torch.allclose(mine[f"model.{name}"], value, atol=1e-9) for name, value in theirs.items())


def test_weights_of_another_architecture_or_of_none_are_refused_with_one_line(cache: str, tmp_path: Path) -> None:
    folder = str(vq_folder(tmp_path / "vq"))
    for init, error, line in (
        (folder, WeightsError, "holds another architecture than autoencoder=kl: quantize.embedding.weight is no part"),
        (str(tmp_path / "none"), WeightsError, "there is no such file or folder"),
        (cache, WeightsError, f"init={cache}"),
    ):
        with pytest.raises(error, match=line) as caught:
            autoencoder.main(config_of(cache, tmp_path / "run", init=init))
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match=r"encoder\.conv_in\.weight is \(8, 3, 3, 3\), not \(16, 3, 3, 3\)"):
        autoencoder.main(config_of(cache, tmp_path / "wide", replace(VQ, codes=32, channels=16), init=folder))


def test_a_cache_without_pixels_is_refused_before_a_rank_starts(tmp_path: Path) -> None:
    from made import cache as small_cache

    small_cache.make_cache(str(tmp_path / "moments"), [20])
    config = config_of(str(tmp_path / "moments"), tmp_path / "run", deepspeed=DeepSpeedConfig(stage=2))
    with pytest.raises(ContractMismatch, match="holds no pixels, but moments"):
        autoencoder.main(replace(config, launch=LaunchConfig(processes=2)))
    assert not (tmp_path / "run").exists()
    with pytest.raises(DatasetError):
        autoencoder.main(config_of(str(tmp_path / "nothing"), tmp_path / "run"))


def test_zero_stage_3_is_refused_with_one_line(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data.train={cache}", f"run={tmp_path / 'run'}", "deepspeed=zero3"]
    assert cli(["autoencoder", *words]) == 1
    line = capsys.readouterr().err
    assert "deepspeed.stage=3 cuts the weights of a discriminator" in line and "set deepspeed=zero2" in line
    assert line.count("\n") == 1


def test_a_loss_that_is_not_finite_names_its_sample_and_stops_before_the_optimizer(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = FirstStageObjective.prepare

    def damaged(self: FirstStageObjective, batch: Batch) -> PreparedPictures:
        prepared = prepare(self, batch)
        if batch.n == 3 * BATCH:
            prepared.images[5] = torch.nan
        return prepared

    monkeypatch.setattr(FirstStageObjective, "prepare", damaged)
    config = config_of(cache, tmp_path / "run")
    with pytest.raises(NonFinite, match=r"the autoencoder's gradient of .*: sample 29 \(.*picture is not finite"):
        autoencoder.main(config)
    assert committed(open_storage(config.run)) == [2 * BATCH]


def test_a_discriminator_that_overflows_names_the_samples_of_which_it_does(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TrainableAutoencoder.forward

    def overflowing(self: TrainableAutoencoder, *arguments: Any, **named: Any) -> Any:
        outputs = forward(self, *arguments, **named)
        if outputs.logits_fake is None:
            return outputs
        return replace(
            outputs, logits_fake=outputs.logits_fake * torch.tensor([1.0] * 6 + [torch.inf, 1.0]).view(-1, 1, 1, 1)
        )

    monkeypatch.setattr(TrainableAutoencoder, "forward", overflowing)
    with pytest.raises(
        NonFinite, match=r"the discriminator's gradient of samples 24 to 31 .*: sample 30 \(.*loss is not"
    ):
        autoencoder.main(config_of(cache, tmp_path / "run"))


def test_the_guard_looks_at_the_autoencoder_and_not_at_the_discriminator(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discriminator's gradient that is a thousand times larger than before is no jump."""
    forward, factor = TrainableAutoencoder.forward, {"logits_fake": 1.0, "reconstruction": 1.0}

    def louder(self: TrainableAutoencoder, *arguments: Any, **named: Any) -> Any:
        outputs = forward(self, *arguments, **named)
        louder = {name: getattr(outputs, name) * value for name, value in factor.items() if value != 1}
        return replace(outputs, **louder)

    monkeypatch.setattr(TrainableAutoencoder, "forward", louder)
    guard = GuardConfig(action="stop", window=8, loss=3.0, grad_norm=50.0)
    gan = replace(GAN, after=100 * BATCH, warmup=100 * BATCH, ramp=0)
    settings: dict[str, Any] = {"guard": guard, "gan": gan, "checkpoint": CheckpointConfig(every=4 * BATCH)}
    config = config_of(cache, tmp_path / "run", samples=12 * BATCH, **settings)
    assert autoencoder.main(config) == 0
    factor["logits_fake"] = -1e3
    assert autoencoder.main(replace(config, samples=16 * BATCH)) == 0
    norms = [row["grad_norm_discriminator"] for row in rows(config.run)]
    assert max(norms[12:]) > 50 * max(norms[:12])
    factor["reconstruction"] = 30.0
    with pytest.raises(LossSpike, match="times its median"):
        autoencoder.main(replace(config, samples=20 * BATCH))


def test_a_collapsed_codebook_is_an_alert_once_over_restarts_of_the_run(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = TrainableAutoencoder.reset_parameters

    def collapsed(self: TrainableAutoencoder, seed: int) -> None:
        reset(self, seed)
        with torch.no_grad():
            self.codebook[1:] = 50.0

    monkeypatch.setattr(TrainableAutoencoder, "reset_parameters", collapsed)
    stage = replace(VQ, codes=100)
    config = config_of(cache, tmp_path / "run", stage, gan=GanConfig(), samples=4 * BATCH)
    config = replace(config, loss=replace(config.loss, restart=0), optim=replace(config.optim, lr=1e-9))
    autoencoder.main(config)
    autoencoder.main(replace(config, samples=8 * BATCH))
    alerts = [row for row in rows(config.run, "alert") if row["alert"] == "codebook"]
    assert len(alerts) == 1
    assert "codes are in use: the codebook collapses; give loss.restart" in alerts[0]["text"]


def test_a_change_of_the_losses_is_refused_at_a_resume(cache: str, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path / "run", samples=2 * BATCH)
    autoencoder.main(config)
    with pytest.raises(RunError, match=r"gan\.after was 32 and is 40"):
        autoencoder.main(replace(config, gan=replace(GAN, after=40), samples=4 * BATCH))


def test_a_mixture_with_pictures_that_are_too_small_names_them(cache: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_sized(tmp_path / "in" / "0.tar", [(12, 12)] * 8)
    small: dict[str, Any] = {"stored": "pixels", "resolution": (12,), "text_storage": "none"}
    assert encode.main(encode_config(str(tmp_path / "in/*.tar"), tmp_path / "small", **small)) == 0
    mixed = DataConfig(train=cache, mix=(str(tmp_path / "small"),))
    with pytest.raises(ContractMismatch, match=r"crop=16 is larger than pictures of data\.mix=.*small, 12x12"):
        autoencoder.main(config_of(cache, tmp_path / "run", data=mixed))
