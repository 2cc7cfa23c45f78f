"""An autoencoder leaves as a folder that diffusers and `encode` load, or as a file under CompVis' names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from made.autoencoder_run import KL, SIDE, VQ, make_autoencoder_run, make_module, make_pixels, picture
from pipeline import cli, export, philox
from pipeline.config import AutoencoderConfig, EncodersConfig, ExportConfig, FirstStageConfig, GanConfig
from pipeline.errors import ConfigError, DestinationExists, RunError
from pipeline.inference.first_stage import load_trained_autoencoder
from pipeline.interchange.agreement import ExportDiffers
from pipeline.interchange.first_stage import diffusers as folders
from pipeline.interchange.first_stage.scale import pictures
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.weights import read_file, weights_hash
from pipeline.runs.datasets import dataset_and_order

declare_torchvision_ops()

RECORDS = 40
GAN = GanConfig(weight=0.5, channels=8, layers=2)


@pytest.fixture(scope="module", params=["kl", "vq"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AutoencoderConfig:
    folder = tmp_path_factory.mktemp(request.param)
    make_pixels(str(folder / "pixels"), [RECORDS // 2] * 2)
    return make_autoencoder_run(folder, {"kl": KL, "vq": VQ}[request.param], gan=GAN, kept={"power-0.1": 3.0})


@pytest.fixture(scope="module")
def kl_run(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderConfig:
    folder = tmp_path_factory.mktemp("alone")
    make_pixels(str(folder / "pixels"), [RECORDS])
    return make_autoencoder_run(folder, KL)


@pytest.fixture
def config(run: AutoencoderConfig, tmp_path: Path) -> ExportConfig:
    return ExportConfig(run=run.run, dest=str(tmp_path / "ae"))


def loaded(folder: str | Path, architecture: FirstStageConfig):  # type: ignore[no-untyped-def]
    import diffusers

    return {"kl": diffusers.AutoencoderKL, "vq": diffusers.VQModel}[architecture.regularizer].from_pretrained(folder)


@torch.no_grad()
def test_a_folder_of_diffusers_reconstructs_as_the_run_does(
    config: ExportConfig, run: AutoencoderConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", f"run={config.run}", f"dest={config.dest}"]) == 0
    said = capsys.readouterr().out
    assert "the reconstructions differ by" in said
    assert "ema weights at 128 samples, format diffusers" in said
    theirs = loaded(config.dest, run.autoencoder)
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = make_module(run).eval()
    found = theirs(x, sample_posterior=False) if run.autoencoder.regularizer == "kl" else theirs(x)
    torch.testing.assert_close(found.sample, ours(x, None).reconstruction, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_scale_brings_latents_of_the_training_data_to_a_deviation_of_one(
    config: ExportConfig, run: AutoencoderConfig
) -> None:
    assert export.main(config) == 0
    described = json.loads((Path(config.dest) / "config.json").read_text())
    vae = loaded(config.dest, run.autoencoder)
    pixels = np.stack([picture(unit, row) for unit in range(2) for row in range(RECORDS // 2)])
    encoded = vae.encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    z = encoded.latent_dist.sample(torch.Generator().manual_seed(9)) if "latent_dist" in encoded else encoded.latents
    expected = 1 / float(z.double().std(correction=0))
    assert described["scaling_factor"] == pytest.approx(expected, rel=0.02 if "latent_dist" in encoded else 1e-4)
    assert f"of the latents of {RECORDS} pictures that" in (Path(config.dest) / "README.md").read_text()
    assert json.loads((Path(config.dest) / "latentmill.json").read_text())["scale_images"] == RECORDS


@torch.no_grad()
def test_the_scale_is_of_the_first_samples_of_the_run_and_drawn_as_training_draws(
    config: ExportConfig, run: AutoencoderConfig
) -> None:
    assert export.main(replace(config, scale_images=5)) == 0
    trained = load_trained_autoencoder(run.run)
    dataset, order = dataset_and_order(trained.info)
    numbers = torch.arange(5)
    found = order.locate(numbers.numpy())
    shards, rows = dataset.records_at(found.block, found.place)
    pixels = np.stack([picture(int(shard), int(row)) for shard, row in zip(shards, rows, strict=True)])
    encoded = trained.model.encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    if run.autoencoder.regularizer == "kl":
        posterior = encoded.latent_dist
        noise = philox.normal(run.seed, philox.Stream.POSTERIOR, numbers, tuple(posterior.mean.shape[1:]))
        z = posterior.mean + posterior.std * noise
    else:
        z = encoded.latents
    deviation = float(z.double().std(correction=0))
    described = json.loads((Path(config.dest) / "config.json").read_text())
    assert described["scaling_factor"] == float(f"{1 / deviation:.5g}")


def test_pictures_of_other_sides_are_cut_around_the_middle() -> None:
    """As a run with crop= may have them."""
    pixels = torch.arange(19 * 18).remainder(256).to(torch.uint8).view(1, 1, 19, 18).expand(1, 3, 19, 18)
    cut = pictures(pixels, 4)
    torch.testing.assert_close(cut, pixels[..., 1:17, 1:17].float() / 127.5 - 1)


def test_no_pictures_give_a_scale_of_one_that_is_written(config: ExportConfig, run: AutoencoderConfig) -> None:
    """diffusers' default of 0.18215 is Stable Diffusion's, also of a VQModel."""
    assert export.main(replace(config, scale_images=0)) == 0
    assert json.loads((Path(config.dest) / "config.json").read_text())["scaling_factor"] == 1.0
    assert loaded(config.dest, run.autoencoder).config.scaling_factor == 1.0
    assert "it was not measured" in (Path(config.dest) / "README.md").read_text()


def test_training_data_that_are_gone_are_named_before_anything_is_written(tmp_path: Path) -> None:
    make_pixels(str(tmp_path / "pixels"), [16])
    run = make_autoencoder_run(tmp_path, KL)
    (tmp_path / "pixels").rename(tmp_path / "moved")
    config = ExportConfig(run=run.run, dest=str(tmp_path / "ae"))
    with pytest.raises(RunError, match="scale_images=0, which writes scaling_factor 1"):
        export.main(config)
    assert not (tmp_path / "ae").exists()
    assert export.main(replace(config, scale_images=0)) == 0


def test_raw_weights_and_further_averages_leave_as_those_of_a_diffusion_model_do(
    config: ExportConfig, run: AutoencoderConfig
) -> None:
    own = dict(make_module(run).model.named_parameters())["encoder.conv_in.weight"]
    for number, (words, factor) in enumerate([({"weights": "raw"}, 2.0), ({"ema": 0.1}, 3.0)]):
        dest = f"{config.dest}{number}"
        assert export.main(replace(config, dest=dest, scale_images=0, **words)) == 0  # type: ignore[arg-type]
        assert torch.equal(loaded(dest, run.autoencoder).encoder.conv_in.weight, factor * own)


@torch.no_grad()
def test_encode_takes_the_folder_and_decodes_as_the_run_does(
    config: ExportConfig, run: AutoencoderConfig, tmp_path: Path
) -> None:
    assert export.main(config) == 0
    stage = load_autoencoder(EncodersConfig(vae=config.dest))
    ours = make_module(run).eval()
    is_kl = run.autoencoder.regularizer == "kl"
    assert stage.stored == ("moments" if is_kl else "latents")
    assert (stage.downsampling, stage.latent_channels) == (run.autoencoder.downsampling, 3)
    assert stage.scale == json.loads((tmp_path / "ae/config.json").read_text())["scaling_factor"] != 1.0
    assert stage.weights_sha256 == weights_hash(ours.model.state_dict().items())
    x = torch.from_numpy(picture(0, 0))[None].float() / 127.5 - 1
    decoded = stage.decode(stage.mean(x) * stage.scale)
    torch.testing.assert_close(decoded, ours(x, None).reconstruction.clamp(-1, 1), atol=2e-5, rtol=1e-4)


def test_weights_that_reconstruct_something_else_leave_no_folder(
    config: ExportConfig, run: AutoencoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(state: dict[str, torch.Tensor], path: Path) -> None:
        save(state | {"decoder.conv_out.bias": state["decoder.conv_out.bias"] + 1}, path)

    save = folders.save_tensors
    monkeypatch.setattr(folders, "save_tensors", damaged)
    with pytest.raises(ExportDiffers, match="the reconstructions differ by"):
        export.main(replace(config, scale_images=0))
    assert not Path(config.dest).exists()


def test_a_folder_of_others_is_left_alone_and_an_earlier_export_is_replaced(config: ExportConfig) -> None:
    Path(config.dest).mkdir()
    (Path(config.dest) / "config.json").write_text("{}")
    with pytest.raises(DestinationExists, match="no earlier export"):
        export.main(config)
    (Path(config.dest) / "config.json").unlink()
    for images in (0, 8):
        assert export.main(replace(config, scale_images=images, check=False)) == 0
    (Path(config.dest) / "notes.txt").write_text("mine")
    assert export.main(replace(config, scale_images=0, check=False)) == 0
    names = {path.name for path in Path(config.dest).iterdir()}
    weights = "diffusion_pytorch_model.safetensors"
    assert names == {"config.json", weights, "README.md", "latentmill.json", "SHA256SUMS", "notes.txt"}


# --------------------------------------------------------------------------------------------------------------------
# CompVis


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_file_in_compvis_names_holds_every_weight(
    config: ExportConfig, run: AutoencoderConfig, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = f"{config.dest}.{suffix}"
    assert export.main(replace(config, dest=dest, format="compvis")) == 0
    said = capsys.readouterr().out
    assert "tensors read back as they were written" in said
    assert "CompVis' own code has 32 groups in every norm, and this autoencoder 4" in said
    state, facts = read_file(Path(dest))
    own = dict(make_module(run).model.state_dict())
    assert len(state) == len(own)
    codebook = state.pop("quantize.embedding.weight", None)
    assert (codebook is None) == (run.autoencoder.regularizer == "kl")
    if codebook is not None:
        assert torch.equal(codebook, own.pop("quantize.embedding.weight"))
    back = compvis_vae.from_compvis(state)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)
    assert facts["autoencoder"]["channels"] == 8
    assert facts["scale"] > 0


def test_what_compvis_cannot_build_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    make_pixels(str(tmp_path / "pixels"), [16])
    run = make_autoencoder_run(tmp_path, replace(KL, middle_attention=False))
    config = ExportConfig(run=run.run, dest=str(tmp_path / "ae.safetensors"), format="compvis")
    with pytest.raises(ConfigError, match="attention in the middle, or nowhere; export format=diffusers"):
        export.main(config)
    assert not (tmp_path / "ae.safetensors").exists()


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def test_an_autoencoder_has_no_encoders(config: ExportConfig) -> None:
    with pytest.raises(ConfigError, match="is the run of an autoencoder, which has none"):
        export.main(replace(config, encoders=EncodersConfig()))


def test_latents_without_variance_have_no_scale(kl_run: AutoencoderConfig, tmp_path: Path) -> None:
    trained = load_trained_autoencoder(kl_run.run)
    with torch.no_grad():
        trained.model.quant_conv.weight.zero_()
        trained.model.quant_conv.bias.copy_(torch.tensor([0.0] * 3 + [-40.0] * 3))
    with pytest.raises(RunError, match="so that no scale makes it 1"):
        folders.export_autoencoder(ExportConfig(run=kl_run.run, dest=str(tmp_path / "ae")), trained, None)  # type: ignore[arg-type]
