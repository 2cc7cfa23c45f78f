"""What a text run draws from an image, and what diffusers' StableDiffusionImg2ImgPipeline draws with its export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from made.run import make_cache, make_run
from pipeline import export, sample
from pipeline.config import ExportConfig, SampleConfig, SamplerConfig
from pipeline.diffusion.sampling import initial_noise
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from preprocess.shapes.drawing import render, scene

declare_torchvision_ops()

CAPTION = "a large red circle left of a small blue square"
IMAGES, STEPS, GUIDANCE, SEED = 3, 10, 3.0, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, an image, and the run's exports by sampler."""
    folder = tmp_path_factory.mktemp("img2img")
    make_cache(folder)
    make_run(folder)
    Image.fromarray(render(scene(5, 3, "val"))).save(folder / "photo.png")
    return folder


def exported(folder: Path, sampler: Any) -> str:
    dest = folder / sampler
    if not dest.exists():
        export.main(ExportConfig(run=str(folder / "run"), dest=str(dest), sampler=sampler))
    return str(dest)


def ours(folder: Path, sampler: Any, **changes: Any) -> np.ndarray:
    config = SampleConfig(
        run=str(folder / "run"),
        prompt=(CAPTION,),
        image=(str(folder / "photo.png"),),
        n=IMAGES,
        sampler=SamplerConfig(sampler=sampler, steps=STEPS, guidance=GUIDANCE),
        seed=SEED,
        device="cpu",
        strength=0.5,
    )
    return sample.sample_rows(replace(config, **changes))[0].images


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc"])
def test_the_exported_pipeline_draws_the_same_pictures_from_an_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """The same caption, image and noise, at three strengths. Theirs draws from the image's posterior, ours takes its
    mean, so theirs is made to, too."""
    from diffusers import StableDiffusionImg2ImgPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    noise = initial_noise(SEED, torch.arange(IMAGES), (4, 8, 8))
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise.reshape(shape))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(exported(folder, sampler), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    drawn = {}
    for strength in (0.25, 0.6, 1.0):
        drawn[strength] = ours(folder, sampler, strength=strength)
        theirs = pipeline(
            CAPTION,
            image=Image.open(folder / "photo.png"),
            strength=strength,
            num_images_per_prompt=IMAGES,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="np",
        ).images
        difference = float(np.abs(drawn[strength] / 255 - theirs).max())
        print(f"largest difference over pixels: {255 * difference:.2f}/255 ({sampler}, strength {strength:g})")
        assert difference <= 2 / 255
    levels = drawn[0.6].astype(int)
    assert np.abs(levels - drawn[0.25]).max() > 8, "pictures that no strength changes agree whatever is wrong"
    assert levels.std() > 10, "pictures of one grey agree whatever is wrong"
    assert np.abs(levels[0] - levels[1]).mean() > 2, "and so do pictures of no noise"
    Image.fromarray(render(scene(5, 4, "val"))).save(folder / "other.png")
    other = ours(folder, sampler, strength=0.6, image=(str(folder / "other.png"),))
    assert np.abs(levels - other).max() > 8, "and those that do not begin from the image"
