"""A run as one file in CompVis' names: what is in it, and that diffusers' StableDiffusionPipeline loads it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from made.run import make_cache, make_run
from pipeline import export
from pipeline.config import DiffusionConfig, EncodersConfig, ExportConfig
from pipeline.errors import ConfigError
from pipeline.inference.trained import load_encoders, load_trained
from pipeline.interchange import compvis
from pipeline.interchange import unet as convert
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.storage.urls import open_storage

declare_torchvision_ops()

LAYERS = ("last", "penultimate")  # what Stable Diffusion 1 and 2 read of their text towers


@pytest.fixture(scope="module", params=LAYERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its diffusers folder in sd/, and its single files model.safetensors and model.ckpt (of raw weights)."""
    folder = tmp_path_factory.mktemp(f"export-{request.param}")
    make_cache(folder, encoders=EncodersConfig(seed=1, text_layer=request.param))
    config = ExportConfig(run=make_run(folder).run, dest=str(folder / "sd"), weights="raw")
    assert export.main(config) == 0
    for name in ("model.safetensors", "model.ckpt"):
        assert export.main(replace(config, format="compvis", dest=str(folder / name))) == 0
    return folder


@pytest.fixture
def quiet() -> Iterator[None]:
    """diffusers warns of its own calls of the hub's client."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def layer_of(folder: Path) -> str:
    text = load_trained(str(folder / "run")).contract.text
    assert text is not None
    return text.layer


def picture(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    return pipeline("a small green cross", latents=noise, **settings).images


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_diffusers_loads_the_file_and_draws_the_same_picture(folder: Path, name: str, quiet: None) -> None:
    """Without a hub: its configurations are those of the folder."""
    from diffusers import StableDiffusionPipeline

    expected = picture(StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None))
    loaded = StableDiffusionPipeline.from_single_file(
        str(folder / name), config=str(folder / "sd"), local_files_only=True, safety_checker=None
    )
    assert expected.std() > 0.05
    assert np.abs(picture(loaded) - expected).max() <= 1e-4


def test_the_file_holds_every_part_under_compvis_names(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    trained = load_trained(str(folder / "run"), which="raw")
    unet = trained.denoiser(torch.zeros(32, 128)).unet
    back = convert.from_compvis(state, unet.config)
    assert all(torch.equal(back[name], tensor) for name, tensor in unet.state_dict().items())
    first_stage, tower = load_encoders(trained.contract)
    assert isinstance(first_stage, NetworkStage)
    vae = compvis_vae.from_compvis({n: t for n, t in state.items() if n.startswith("first_stage_model.")})
    expected = first_stage.model.state_dict()
    assert vae.keys() == expected.keys()
    assert all(torch.equal(vae[name], tensor) for name, tensor in expected.items())
    text = {name: tensor for name, tensor in state.items() if name.startswith("cond_stage_model.")}
    assert tower is not None
    if layer_of(folder) == "last":
        top = "cond_stage_model.transformer.text_model."
        assert torch.equal(text[f"{top}final_layer_norm.weight"], tower.model.ln_final.weight)
        assert f"{top}encoder.layers.2.self_attn.q_proj.weight" in text
    else:
        top = "cond_stage_model.model."
        assert torch.equal(text[f"{top}ln_final.weight"], tower.model.ln_final.weight)
        assert f"{top}transformer.resblocks.2.attn.in_proj_weight" in text  # the block that is not read, too
        assert {f"{top}text_projection", f"{top}positional_embedding", f"{top}token_embedding.weight"} <= text.keys()
    assert all(name.startswith(top) for name in text)
    assert {name.partition(".")[0] for name in state} == {
        *("model", "first_stage_model", "cond_stage_model", "scale_factor"),
        *compvis.process_tables(DiffusionConfig()),
    }
    assert float(state["scale_factor"]) == pytest.approx(first_stage.scale)


def test_both_kinds_of_file_hold_the_same_and_a_ckpt_is_tensors_alone(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    whole = torch.load(folder / "model.ckpt", weights_only=True)
    assert whole["state_dict"].keys() == state.keys()
    assert all(torch.equal(whole["state_dict"][name], tensor) for name, tensor in state.items())
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == "epsilon"
    facts = json.loads(metadata["latentmill"])
    assert (facts["prediction"], facts["n"], facts["weights"]) == ("epsilon", 128, "raw")
    assert json.loads(whole["latentmill"]) == facts


def test_tables_are_those_of_diffusers_scheduler() -> None:
    from diffusers import DDPMScheduler

    config = DiffusionConfig()
    theirs: Any = DDPMScheduler(1000, config.beta_start, config.beta_end, "scaled_linear")
    tables: dict[str, Tensor] = compvis.process_tables(config)
    torch.testing.assert_close(tables["betas"], theirs.betas, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(tables["alphas_cumprod"], theirs.alphas_cumprod, rtol=1e-4, atol=1e-8)
    assert len(tables) == 12 and all(table.shape == (1000,) for table in tables.values())
    for t in (1, 500, 999):
        assert float(tables["posterior_variance"][t]) == pytest.approx(float(theirs._get_variance(t)), rel=1e-3)
        x0, x = torch.randn(1, 3), torch.randn(1, 3)
        # Both coefficients: the mean of q(x_{t-1} | x_t, x_0), from a scheduler that predicts x_0 and adds nothing.
        step: Any = DDPMScheduler(
            1000, config.beta_start, config.beta_end, "scaled_linear", prediction_type="sample", clip_sample=False
        )
        step._get_variance = lambda *args, **kwargs: torch.zeros(())
        mean = tables["posterior_mean_coef1"][t] * x0 + tables["posterior_mean_coef2"][t] * x
        torch.testing.assert_close(step.step(x0, t, x).prev_sample, mean, rtol=1e-3, atol=1e-4)
    assert float(tables["alphas_cumprod_prev"][0]) == 1.0
    a = tables["alphas_cumprod"][700]
    for name, value in {
        "sqrt_alphas_cumprod": a**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - a) ** 0.5,
        "log_one_minus_alphas_cumprod": (1 - a).log(),
        "sqrt_recip_alphas_cumprod": a**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / a - 1) ** 0.5,
        "posterior_log_variance_clipped": tables["posterior_variance"][700].log(),
    }.items():
        torch.testing.assert_close(tables[name][700], value, rtol=1e-4, atol=1e-6)


def test_a_process_without_betas_has_no_tables() -> None:
    for prediction in ("flow", "edm"):
        assert compvis.process_tables(DiffusionConfig(prediction=prediction)) == {}  # type: ignore[arg-type]
    assert len(compvis.process_tables(DiffusionConfig(prediction="x0", schedule="cosine"))) == 12


def test_a_file_that_would_not_read_back_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = compvis.write

    def damaged(path: Path, suffix: str, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        name = "model.diffusion_model.out.2.bias"
        written(path, suffix, {**state, name: state[name] + 1}, facts)

    monkeypatch.setattr(compvis, "write", damaged)
    dest = tmp_path / "out" / "model.safetensors"
    with pytest.raises(export.ExportDiffers, match=r"out\.2\.bias"):
        export.main(ExportConfig(run=str(folder / "run"), dest=str(dest), format="compvis"))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_does_not_know_its_encoders_gives_the_unet_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = open_storage(str(tmp_path / "run"))
    for info in open_storage(str(folder / "run")).list():
        run.put(info.key, open_storage(str(folder / "run")).get(info.key))
    facts = json.loads(run.get("run.json"))
    facts["contract"] |= {"vae_sha256": "", "text_sha256": ""}
    run.put("run.json", json.dumps(facts).encode())
    dest = str(tmp_path / "model.safetensors")
    assert export.main(ExportConfig(run=str(tmp_path / "run"), dest=dest, format="compvis")) == 0
    assert "UNet alone" in capsys.readouterr().out
    names = {name.partition(".")[0] for name in load_file(dest)}
    assert names == {"model", *compvis.process_tables(DiffusionConfig())}


def test_what_compvis_layout_cannot_say_is_refused(folder: Path, tmp_path: Path) -> None:
    run = str(folder / "run")
    with pytest.raises(ConfigError, match=r"\.safetensors or \.ckpt"):
        export.main(ExportConfig(run=run, dest=str(tmp_path / "model.bin"), format="compvis"))
    trained = load_trained(run)
    shifted = replace(trained, contract=replace(trained.contract, shift=0.1))
    denoiser = trained.denoiser(torch.zeros(32, 128))
    with pytest.raises(ConfigError, match=r"shifted by 0\.1"):
        compvis.single_file(ExportConfig(run=run, dest="x.ckpt", format="compvis"), shifted, denoiser)
