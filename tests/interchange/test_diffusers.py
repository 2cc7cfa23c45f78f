"""Exported folders load in diffusers and transformers and compute what the run does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from made.run import make_cache, make_run
from pipeline import cli, export, sample
from pipeline.config import ExportConfig, SampleConfig, SamplerConfig, UnconditionalTask
from pipeline.diffusion.sampling import initial_noise
from pipeline.errors import ConfigError, DestinationExists
from pipeline.inference.trained import Trained, load_encoders, load_trained
from pipeline.interchange import clip
from pipeline.interchange import unet as convert
from pipeline.interchange.diffusers import MARKER
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_cache(folder)
    make_run(folder, kept={"power-0.1": 3.0})
    return folder


def copy_of(folder: Path, where: Path, prediction: str = "epsilon") -> str:
    """The run in a folder of its own, with another kind of prediction."""
    run = where / "run"
    shutil.copytree(folder / "run", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("prediction: epsilon", f"prediction: {prediction}"))
    return str(run)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> ExportConfig:
    return ExportConfig(run=str(folder / "run"), dest=str(tmp_path / "sd"))


def test_another_average_of_the_run_is_exported_by_its_width(
    config: ExportConfig, capsys: pytest.CaptureFixture
) -> None:
    from diffusers import UNet2DConditionModel

    words = [f"run={config.run}", f"dest={config.dest}", "ema=0.10"]
    assert cli.main(["export", *words]) == 0
    assert "ema=0.1 weights at 128 samples" in capsys.readouterr().out
    unet = UNet2DConditionModel.from_pretrained(config.dest, subfolder="unet")
    own = load_trained(config.run).state["unet.conv_in.weight"]
    assert torch.equal(unet.conv_in.weight, 3 * own)


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
    assert tower is not None
    caption = "a small cyan triangle above a large yellow cross"
    states, empty = pipeline.encode_prompt(caption, "cpu", 1, True, negative_prompt="")
    torch.testing.assert_close(states, tower.encode(tower.tokenize([caption])), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty, tower.encode(tower.tokenize([""])), rtol=1e-4, atol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(caption, height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)


def test_diffusers_folder_is_complete(config: ExportConfig) -> None:
    export.main(config)
    files = {path.relative_to(config.dest).as_posix() for path in Path(config.dest).rglob("*") if path.is_file()}
    assert files >= {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert not [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]


@pytest.mark.parametrize(("guidance", "prediction"), [(3.0, "epsilon"), (1.0, "epsilon"), (3.0, "v")])
def test_pictures_of_the_exported_pipeline_are_our_samplers(
    folder: Path, tmp_path: Path, guidance: float, prediction: str
) -> None:
    """The same caption, the same noise as `latents=`, and the exported scheduler: DDIM, whose init_noise_sigma is 1."""
    from diffusers import StableDiffusionPipeline

    run = copy_of(folder, tmp_path, prediction)
    dest = str(tmp_path / "sd")
    export.main(ExportConfig(run=run, dest=dest))
    sampler = SamplerConfig(sampler="ddim", steps=10, guidance=guidance)
    caption = "a large red circle left of a small blue square"
    config = SampleConfig(run=run, prompt=(caption,), n=3, sampler=sampler, seed=5, device="cpu")
    ours = sample.sample_rows(config)[0].images

    pipeline = StableDiffusionPipeline.from_pretrained(dest, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.init_noise_sigma == 1.0
    theirs = pipeline(
        caption,
        num_images_per_prompt=3,
        latents=initial_noise(5, torch.arange(3), (4, 8, 8)),
        num_inference_steps=10,
        guidance_scale=guidance,
        output_type="np",
    ).images
    difference = float(np.abs(ours / 255 - theirs).max())
    print(f"largest difference over pixels: {255 * difference:.2f}/255 ({prediction}, guidance {guidance:g})")
    assert difference <= 2 / 255
    levels = ours.astype(int)
    other = sample.sample_rows(replace(config, prompt=("a small green cross",)))[0].images.astype(int)
    assert np.abs(levels - other).max() > 8, "pictures that no caption changes agree whatever is wrong"
    assert levels.std() > 10, "pictures of one grey agree whatever is wrong"
    assert all(np.abs(levels[i] - levels[j]).mean() > 2 for i, j in ((0, 1), (1, 2))), "and so do pictures of no noise"


def test_penultimate_layer_is_exported_as_a_shorter_tower(folder: Path, tmp_path: Path) -> None:
    contract = load_trained(str(folder / "run")).contract
    assert contract.text is not None
    facts = replace(contract.text, layer="penultimate", length=20)
    contract = replace(
        contract, text=facts, encoders={**contract.encoders, "text_layer": "penultimate", "text_length": 20}
    )
    tower = load_encoders(contract)[1]
    assert tower is not None
    assert clip.is_clip(tower)
    clip.save_text_model(tower, tmp_path / "text")
    clip.save_tokenizer(tower, tmp_path / "tokens")
    captions = ["a red circle", "", "One sees a LARGE blue box, a very long caption " * 4]
    assert clip.largest_difference(tower, tmp_path / "text", tmp_path / "tokens", captions) <= 1e-5
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


def test_what_the_pipeline_cannot_do_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = copy_of(folder, tmp_path)
    facts = json.loads((Path(run) / "run.json").read_text())
    facts["contract"]["text"]["storage"] = "trimmed"
    next(member for member in facts["contract"]["members"] if member["name"] == "text")["shape"][0] = -1
    (Path(run) / "run.json").write_text(json.dumps(facts))
    dest = tmp_path / "sd"
    export.main(ExportConfig(run=run, dest=str(dest)))
    assert "encoder_attention_mask" in capsys.readouterr().err
    assert "encoder_attention_mask" in (dest / "README.md").read_text()
    assert (dest / "model_index.json").exists()

    stage, tower = load_encoders(load_trained(run).contract)
    stage.shift = 0.1
    monkeypatch.setattr(Trained, "encoders", lambda *args, **kwargs: (stage, tower))
    export.main(ExportConfig(run=run, dest=str(dest)))
    assert not (dest / "model_index.json").exists() and (dest / "text_encoder" / "config.json").exists()
    assert "shifted" in (dest / "README.md").read_text()


def test_foreign_folder_is_never_written_over(config: ExportConfig) -> None:
    dest = Path(config.dest)
    dest.mkdir()
    export.main(config)  # an empty folder is fine
    export.main(config)  # and so is an earlier export
    (dest / MARKER).unlink()
    with pytest.raises(DestinationExists, match="no earlier export"):
        export.main(config)
    assert (dest / "model_index.json").exists()


def test_unknown_format_and_unfit_dest_are_refused(config: ExportConfig) -> None:
    with pytest.raises(ConfigError, match="diffusers, compvis"):
        export.main(replace(config, format="onnx"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\.safetensors or \.ckpt"):
        export.main(replace(config, format="compvis"))


def test_unconditional_run_exports_without_text(folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    (tmp_path / "cache").symlink_to(folder / "cache")
    run = make_run(tmp_path, task=UnconditionalTask()).run
    dest = tmp_path / "sd"
    assert export.main(ExportConfig(run=run, dest=str(dest))) == 0
    assert json.loads((dest / "model_index.json").read_text())["_class_name"] == "LDMPipeline"
    assert not (dest / "text_encoder").exists() and "no text encoder" in (dest / "README.md").read_text()
    UNet2DModel.from_pretrained(dest, subfolder="unet")
