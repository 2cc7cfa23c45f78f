"""Runs on a VQModel, and on pixels, in other software's format: pipelines and loops of diffusers quantise as we do and
know the latents' scale, and what no folder can hold is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange.test_task_exports import (
    GUIDANCE,
    PLAIN,
    SMALL,
    STEPS,
    assert_alike,
    by_readme,
    conditions,
    drawn,
    exported,
    given,
    seeded,
)

from made.task_run import make_task_run, noise
from pipeline import export
from pipeline.conditions.facts import ClassFacts, Conditions, LabelFacts
from pipeline.config import (
    ClassTask,
    ExportConfig,
    InpaintTask,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
    UnconditionalTask,
)
from pipeline.errors import ConfigError
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.first_stage import VQStage
from pipeline.models.weights import read_file


def test_ldm_pipeline_draws_unconditional_pictures_with_a_vq_model(tmp_path: Path) -> None:
    from diffusers import LDMPipeline

    made = make_task_run(tmp_path, UnconditionalTask(), conditions(), channels=3, kind="vq")
    folder = exported(made, tmp_path)
    assert json.loads((folder / "vqvae" / "config.json").read_text())["scaling_factor"] == 0.8
    assert json.loads((folder / "model_index.json").read_text())["vqvae"] == ["diffusers", "VQModel"]
    pipeline = LDMPipeline.from_pretrained(folder)
    assert type(pipeline.vqvae).__name__ == "VQModel"
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(2, *made.contract.latent_shape, generator=seeded(4))
    theirs = pipeline(batch_size=2, generator=seeded(4), num_inference_steps=STEPS, output_type="np").images
    assert_alike(theirs, drawn(made, x, {}, 1.0))


def test_ldm_super_resolution_pipeline_draws_our_pictures_with_a_vq_model(tmp_path: Path) -> None:
    """It undoes no scale, so the folder's VQModel has latents, and a codebook, of scale 1."""
    from diffusers import LDMSuperResolutionPipeline

    made = make_task_run(tmp_path, SuperresTask(), conditions(lowres=SMALL), channels=3, kind="vq")
    pipeline = LDMSuperResolutionPipeline.from_pretrained(exported(made, tmp_path))
    assert pipeline.vqvae.config.scaling_factor == 1.0
    assert isinstance(made.first_stage, VQStage)
    torch.testing.assert_close(pipeline.vqvae.quantize.embedding.weight.data, made.first_stage.codebook * 0.8)
    pipeline.set_progress_bar_config(disable=True)
    asked, batch = given(made)
    x = torch.randn(2, *made.contract.latent_shape, generator=seeded(4))
    small = asked["small"].float() / 127.5 - 1
    theirs = pipeline(small, generator=seeded(4), num_inference_steps=STEPS, output_type="np").images
    assert_alike(theirs, drawn(made, x, batch, 1.0))


LOOPS: dict[str, tuple[TaskConfig, Conditions, dict[str, Any]]] = {
    "class": (ClassTask(), conditions(classes=ClassFacts(count=5)), {}),
    "semantic": (SemanticTask(), conditions(labels=LabelFacts(count=5, grid=4)), {}),
    "inpaint": (InpaintTask(), conditions(mask=PLAIN), {}),
    "inpaint-text": (InpaintTask(text=True, drop=0.1), conditions(mask=PLAIN), {"text": True, "channels": 4}),
    "text": (TextTask(), conditions(), {"text": True, "storage": "trimmed"}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_of_readme_draws_our_pictures_with_a_vq_model(name: str, tmp_path: Path) -> None:
    task, facts, changes = LOOPS[name]
    made = make_task_run(tmp_path, task, facts, **{"channels": 3, **changes}, kind="vq")
    folder = exported(made, tmp_path)
    assert not (folder / "model_index.json").exists() and "AutoencoderKL" not in _code(folder)
    asked, batch = given(made)
    x, guidance = noise(made), GUIDANCE if task.droppable else 1.0
    names = by_readme(folder, x, asked, guidance)
    assert type(names["vae"]).__name__ == "VQModel"
    assert_alike((names["pictures"].permute(0, 2, 3, 1).numpy() + 1) / 2, drawn(made, x, batch, guidance))


def _code(folder: Path) -> str:
    return (folder / "README.md").read_text().partition("```python")[2]


def test_a_vq_model_goes_to_compvis_under_their_names(tmp_path: Path) -> None:
    made = make_task_run(tmp_path, UnconditionalTask(), conditions(), channels=3, kind="vq")
    dest = tmp_path / "model.safetensors"
    assert export.main(ExportConfig(run=made.config.run, dest=str(dest), format="compvis")) == 0
    state = read_file(dest)[0]
    assert isinstance(made.first_stage, VQStage)
    assert torch.equal(state["first_stage_model.quantize.embedding.weight"], made.first_stage.codebook)
    assert float(state["scale_factor"]) == pytest.approx(0.8)
    vae = {name: tensor for name, tensor in state.items() if name.startswith(compvis_vae.PREFIX)}
    back, own = compvis_vae.from_compvis(vae), made.first_stage.model.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


def test_a_model_of_pixels_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = make_task_run(tmp_path, UnconditionalTask(), conditions(), channels=3, kind="pixels")
    with pytest.raises(ConfigError, match=r"draws pixels, without an autoencoder .* format=compvis") as told:
        exported(made, tmp_path)
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()
    dest = tmp_path / "model.safetensors"
    assert export.main(ExportConfig(run=made.config.run, dest=str(dest), format="compvis")) == 0
    names = read_file(dest)[0]
    assert any(name.startswith("model.diffusion_model.") for name in names)
    assert not any(name.startswith("first_stage_model.") for name in names)
