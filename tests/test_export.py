"""Exported folders load in diffusers and transformers and compute what the run does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import make_cache, make_run

from pipeline import export
from pipeline.config import ExportConfig
from pipeline.errors import ConfigError, DestinationExists
from pipeline.evaluation.trained import load_encoders, load_trained
from pipeline.models import convert, convert_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_cache(folder)
    make_run(folder)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> ExportConfig:
    return ExportConfig(run=str(folder / "run"), dest=str(tmp_path / "sd"))


@torch.no_grad()
def test_diffusers_folder_computes_what_the_run_does(config: ExportConfig, capsys: pytest.CaptureFixture) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    assert export.main(config) == 0
    assert "the denoiser's output differ by" in capsys.readouterr().out
    trained = load_trained(config.run)
    ours = trained.denoiser(torch.zeros(32, 128))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 800]), torch.randn(2, 32, 128)
    theirs = UNet2DConditionModel.from_pretrained(config.dest, subfolder="unet")(x, t, context).sample
    expected = ours.unet(x, t, context)
    assert float((theirs - expected).abs().max() / expected.abs().max()) <= 1e-4
    first_stage = load_encoders(trained.contract)[0]
    vae = AutoencoderKL.from_pretrained(config.dest, subfolder="vae")
    assert vae.config.scaling_factor == first_stage.scale
    z = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(vae.decode(z / first_stage.scale).sample.clamp(-1, 1), first_stage.decode(z))
    scheduler = DDIMScheduler.from_pretrained(config.dest, subfolder="scheduler")
    assert scheduler.config.prediction_type == "epsilon" and scheduler.config.beta_schedule == "scaled_linear"


@torch.no_grad()
def test_exported_pipeline_encodes_captions_as_the_cache_did(config: ExportConfig) -> None:
    from diffusers import StableDiffusionPipeline

    export.main(config)
    pipeline = StableDiffusionPipeline.from_pretrained(config.dest, safety_checker=None)
    tower = load_encoders(load_trained(config.run).contract)[1]
    caption = "a small cyan triangle above a large yellow cross"
    states, empty = pipeline.encode_prompt(caption, "cpu", 1, True, negative_prompt="")
    torch.testing.assert_close(states, tower.encode(tower.tokenize([caption])), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty, tower.encode(tower.tokenize([""])), rtol=1e-4, atol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(caption, height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


def test_penultimate_layer_is_exported_as_a_shorter_tower(folder: Path, tmp_path: Path) -> None:
    contract = load_trained(str(folder / "run")).contract
    facts = replace(contract.text, layer="penultimate", length=20)
    contract = replace(
        contract, text=facts, encoders={**contract.encoders, "text_layer": "penultimate", "text_length": 20}
    )
    tower = load_encoders(contract)[1]
    assert convert_clip.is_clip(tower)
    convert_clip.save_text_model(tower, tmp_path / "text")
    convert_clip.save_tokenizer(tower, tmp_path / "tokens")
    captions = ["a red circle", "", "One sees a LARGE blue box, a very long caption " * 4]
    assert convert_clip.largest_difference(tower, tmp_path / "text", tmp_path / "tokens", captions) <= 1e-5
    assert json.loads((tmp_path / "text" / "config.json").read_text())["num_hidden_layers"] == 2


def test_failed_check_leaves_the_destination_as_it_was(config: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    export.main(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.dest).rglob("*")}
    convert_all = convert.to_diffusers
    monkeypatch.setattr(convert, "to_diffusers", lambda *a: {k: v * 1.01 for k, v in convert_all(*a).items()})
    with pytest.raises(export.ExportDiffers, match="denoiser"):
        export.main(config)
    assert {path: path.stat().st_mtime_ns for path in Path(config.dest).rglob("*")} == before
    assert [path.name for path in Path(config.dest).parent.iterdir()] == ["sd"]  # no temporary folder left


def test_foreign_folder_is_never_written_over(config: ExportConfig) -> None:
    dest = Path(config.dest)
    dest.mkdir()
    export.main(config)  # an empty folder is fine
    export.main(config)  # and so is an earlier export
    (dest / export.MARKER).unlink()
    with pytest.raises(DestinationExists, match="no earlier export"):
        export.main(config)
    assert (dest / "model_index.json").exists()


def test_compvis_file_holds_the_unet(config: ExportConfig, tmp_path: Path) -> None:
    dest = str(tmp_path / "model.safetensors")
    assert export.main(replace(config, format="compvis", dest=dest, weights="raw")) == 0
    state = load_file(dest)
    unet = load_trained(config.run, which="raw").denoiser(torch.zeros(32, 128)).unet
    assert all(name.startswith("model.diffusion_model.") for name in state)
    back = convert.from_compvis(state, unet.config)
    assert all(torch.equal(back[name], tensor) for name, tensor in unet.state_dict().items())


def test_unknown_format_and_unfit_dest_are_refused(config: ExportConfig) -> None:
    with pytest.raises(ConfigError, match="diffusers, compvis"):
        export.main(replace(config, format="onnx"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="safetensors"):
        export.main(replace(config, format="compvis"))


def test_unconditional_run_exports_without_text(folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    (tmp_path / "cache").symlink_to(folder / "cache")
    run = make_run(tmp_path, task="unconditional").run
    dest = tmp_path / "sd"
    assert export.main(ExportConfig(run=run, dest=str(dest))) == 0
    assert not (dest / "model_index.json").exists() and "no text encoder" in (dest / "README.md").read_text()
    UNet2DModel.from_pretrained(dest, subfolder="unet")
