"""What is exported of each objective samples in diffusers as it does here, or the export says that it cannot."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made.run import make_cache, make_run
from pipeline import export
from pipeline.config import DiffusionConfig, ExportConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.process import PROCESSES
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.diffusion.schedule import Schedule
from pipeline.inference.trained import load_encoders, load_trained
from pipeline.interchange.scheduler import pipeline_runs, scheduler_config
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()

CONFIG = DiffusionConfig()
RUNS = {
    "epsilon": CONFIG,
    "x0-cosine": replace(CONFIG, prediction="x0", schedule="cosine"),
    "zero_snr": replace(CONFIG, prediction="v", zero_terminal_snr=True),
    "edm": replace(CONFIG, prediction="edm", timestep_density="log_normal", sigma_data=1.0, sigma_max=40.0),
}
FLOW = replace(CONFIG, prediction="flow")
CAPTION = "a small cyan triangle above a large yellow cross"
STEPS, GUIDANCE = 10, 3.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("export"))


def exported(cache: Path, folder: Path, diffusion: DiffusionConfig) -> ExportConfig:
    """A run that was trained so, and its folder for diffusers."""
    (folder / "cache").symlink_to(cache)
    config = ExportConfig(run=make_run(folder, diffusion=diffusion).run, dest=str(folder / "sd"))
    assert export.main(config) == 0
    return config


def ours(config: ExportConfig, noise: torch.Tensor, states: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    trained = load_trained(config.run)
    given, null = (Conditioning(one.expand(len(noise), -1, -1)) for one in (states, empty))
    denoiser = trained.denoiser(empty[0]).to(noise.dtype)
    diffusion = trained.info.config.diffusion
    return sample(denoiser, diffusion, noise, given, null, sampler="ddim", steps=STEPS, guidance=GUIDANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", RUNS)
def test_stable_diffusions_pipeline_makes_the_same_image(name: str, cache: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    config = exported(cache, tmp_path, RUNS[name])
    pipeline = StableDiffusionPipeline.from_pretrained(config.dest, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == scheduler_config(RUNS[name])["_class_name"]
    states, empty = pipeline.encode_prompt(CAPTION, "cpu", 1, True, negative_prompt="")
    noise = initial_noise(7, torch.arange(1), (4, 8, 8))
    arguments = {"height": 64, "width": 64, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise}
    latents = ours(config, noise, states, empty)
    image = load_encoders(load_trained(config.run).contract)[0].decode(latents) / 2 + 0.5
    assert (pipeline(CAPTION, **arguments, output_type="pt").images - image.clamp(0, 1)).abs().max() <= 2 / 255
    if PROCESSES[RUNS[name].prediction] == "discrete":
        # Their table is a product of float32s, 1e-5 off ours, which the cosine's last steps show in the fourth digit.
        pipeline.scheduler.alphas_cumprod = Schedule(RUNS[name]).alpha_bar
        pipeline.scheduler.final_alpha_cumprod = Schedule(RUNS[name]).alpha_bar[0] if name != "zero_snr" else 1.0
    theirs = pipeline(CAPTION, **arguments, output_type="latent").images
    if name != "x0-cosine":
        assert (theirs - latents).norm() < 1e-5 * latents.norm()
    # And in float64: where the cosine ends, one rounding of float32 in the noise moves x0's latents by 1.4e-5.
    pipeline.unet.double()
    pipeline.text_encoder.double()
    theirs = pipeline(
        prompt_embeds=states.double(),
        negative_prompt_embeds=empty.double(),
        **(arguments | {"latents": noise.double()}),
        output_type="latent",
    ).images
    latents = ours(config, noise.double(), states.double(), empty.double())
    assert theirs.dtype == latents.dtype == torch.float64
    assert (theirs - latents).norm() < 1e-6 * latents.norm()


@torch.no_grad()
def test_rectified_flow_is_exported_without_a_pipeline_and_says_so(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from diffusers import StableDiffusionPipeline

    config = exported(cache, tmp_path, FLOW)
    assert "StableDiffusionPipeline cannot run prediction=flow" in capsys.readouterr().out
    dest = Path(config.dest)
    assert not (dest / "model_index.json").exists()
    readme = (dest / "README.md").read_text()
    assert "StableDiffusionPipeline cannot run this model" in readme
    assert "load all of it" not in readme

    tower = load_encoders(load_trained(config.run).contract)[1]
    assert tower is not None
    states, empty = tower.encode(tower.tokenize([CAPTION])), tower.encode(tower.tokenize([""]))
    noise = initial_noise(7, torch.arange(1), (4, 8, 8))
    scope: dict[str, Any] = {"folder": config.dest, "noise": noise, "text": states, "empty": empty}
    scope |= {"steps": STEPS, "guidance": GUIDANCE}
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    exec(code[1], scope)
    latents = ours(config, noise, states, empty)
    assert (scope["x"] - latents).norm() < 1e-4 * latents.norm()
    assert scope["images"].shape == (1, 3, 64, 64)

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    parts = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
    }
    loaded = {name: kind.from_pretrained(config.dest, subfolder=name) for name, kind in parts.items()}
    pipeline: Any = StableDiffusionPipeline(
        **loaded, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    with pytest.raises(AttributeError, match="init_noise_sigma"):  # else write a model_index.json, and no note
        pipeline(CAPTION, height=64, width=64, num_inference_steps=2, latents=noise)


def test_every_objective_says_whether_the_pipeline_runs_it() -> None:
    assert [name for name, config in {**RUNS, "flow": FLOW}.items() if not pipeline_runs(config)] == ["flow"]


def test_a_file_of_weights_alone_comes_with_what_it_does_not_say(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "cache").symlink_to(cache)
    run = make_run(tmp_path, diffusion=RUNS["zero_snr"]).run
    export.main(ExportConfig(run=run, dest=str(tmp_path / "m.safetensors"), format="compvis"))
    printed = capsys.readouterr().out
    assert "must be told prediction=v, schedule=scaled_linear" in printed
    assert "zero_terminal_snr=True" in printed
    assert export.compvis_note(CONFIG) == ""
    assert "sigma_data=1.0" in export.compvis_note(RUNS["edm"])


def test_exported_schedulers_have_the_documented_settings() -> None:
    zero = scheduler_config(RUNS["zero_snr"])
    assert (zero["rescale_betas_zero_snr"], zero["timestep_spacing"], zero["set_alpha_to_one"]) == (
        True,
        "trailing",
        True,
    )
    cosine = scheduler_config(RUNS["x0-cosine"])
    assert (cosine["beta_schedule"], cosine["prediction_type"]) == ("squaredcos_cap_v2", "sample")
    plain = scheduler_config(CONFIG)
    assert (plain["timestep_spacing"], plain["set_alpha_to_one"], plain["steps_offset"]) == ("leading", False, 1)
