"""The verbs that use what was trained, and the demo of the whole: eval, sample, export, demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.model import EncodersConfig, FeaturesName, SamplerConfig, SamplerName
from pipeline.config.train import DataConfig


@dataclass(frozen=True, kw_only=True)
class EvalRunConfig:
    """latentmill eval: a checkpoint's FID, CLIP score and attribute accuracy, each with a card."""

    run: str = ""
    """Run directory; "" with from_card = the one that the card lies in."""
    from_card: str = ""
    """Card of an evaluation whose figures are made again and compared (also `--from-card CARD`)."""
    features: Literal["", FeaturesName] = ""
    """Feature network of the reference; "" = the run's own."""
    features_weights: str = ""
    """Its weights; "" = the run's own."""
    data: DataConfig = field(default_factory=DataConfig)
    """data.val: captions to sample; "" = the run's own."""
    images: int = 1000
    """Images sampled."""
    guidance: tuple[float, ...] = (3.0,)
    """Guidance scales; one evaluation each. Several draw the curve of FID against CLIP score into the run's report."""
    sampler: tuple[SamplerName, ...] = ("dpmpp_2m",)
    """Samplers; every one with every number of steps and every guidance scale."""
    steps: tuple[int, ...] = (20,)
    """Numbers of denoising steps."""
    guidance_low: float = 0.0
    """As sampler.guidance_low of train."""
    guidance_high: float = 0.0
    """As sampler.guidance_high of train."""
    rescale: float = 0.0
    """As sampler.rescale of train."""
    batch: int = 64
    """Images per batch; does not change the images."""
    reference: str = ""
    """Reference statistics; "" = the run's own."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default the run's own, else those of the training cache's contract."""
    at: int = 0
    """Sample count of the checkpoint; 0 = the newest."""
    weights: Literal["ema", "raw"] = "ema"
    """ema or raw."""
    ema: float = 0.0
    """Which average: 0 = the run's own; from 1 on, one of its ema.half_lives; below 1, a power-function average of this
    relative width, made from the snapshots of ema.widths (docs/how_to/train_for_weeks.md)."""
    seed: int = 0
    """Seed of the initial noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    pending: bool = False
    """Instead of all that: the evaluations that training with eval.where=job has left to be made, as it would have made
    them (at= one of them)."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """latentmill sample: images from a checkpoint."""

    run: str
    """Run directory."""
    prompt: tuple[str, ...] = ()
    """One caption or several; a caption is text as it stands."""
    n: int = 4
    """Images per caption."""
    dest: str = "samples.png"
    """Picture to write: a grid with one row per caption."""
    at: int = 0
    """Sample count of the checkpoint; 0 = the newest."""
    weights: Literal["ema", "raw"] = "ema"
    """ema or raw."""
    ema: float = 0.0
    """Which average: 0 = the run's own; from 1 on, one of its ema.half_lives; below 1, a power-function average of this
    relative width, made from the snapshots of ema.widths (docs/how_to/train_for_weeks.md)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How."""
    guidance: float = 0.0
    """Shorthand for sampler.guidance; 0 = that."""
    negative: str = ""
    """What guidance leads away from, in place of the empty caption."""
    size: tuple[str, ...] = ()
    """Sizes in pixels, as [64x64,96x64] (width x height): one for all captions or one for each; [] = the cache's."""
    seed: int = 0
    """Seed of the initial noise."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default the run's own, else those of the training cache's contract."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """latentmill export: weights that other software loads."""

    run: str
    """Run directory."""
    dest: str
    """Folder (diffusers), or .safetensors or .ckpt file (compvis) to write."""
    format: Literal["diffusers", "compvis"] = "diffusers"
    """diffusers: a folder that StableDiffusionPipeline loads, with UNet, autoencoder, text encoder, tokenizer and
    scheduler; compvis: the same in one file, under the names of Stable Diffusion's own releases."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default the run's own, else those of the training cache's contract."""
    at: int = 0
    """Sample count of the checkpoint; 0 = the newest."""
    weights: Literal["ema", "raw"] = "ema"
    """ema or raw."""
    ema: float = 0.0
    """Which average: 0 = the run's own; from 1 on, one of its ema.half_lives; below 1, a power-function average of this
    relative width, made from the snapshots of ema.widths (docs/how_to/train_for_weeks.md)."""
    sampler: SamplerName = "ddim"
    """diffusers: whose scheduler, with the same levels and steps, goes into the folder; refused where diffusers has
    none that is the same."""
    check: bool = True
    """Load what was written and compare: with diffusers and transformers, outputs to 1e-4; one file, every tensor."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """latentmill demo: the whole loop on captioned shapes, on this machine."""

    dest: str = "runs/demo"
    """Folder for everything the demo makes."""
    images: int = 10_000
    """Training images; a tenth as many captions are drawn for evaluations, and a fifth as many pictures for FID."""
    recipe: str = "demo"
    """The experiment that is trained (conf/experiment): demo, or shapes for an hour's training."""
    samples: int = 0
    """Training samples; 0 = the experiment's own figure."""
    processes: int = 2
    """Training ranks."""
    seed: int = 0
    """Seed."""
