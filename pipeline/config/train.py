"""latentmill train, and how it evaluates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.model import DiffusionConfig, EncodersConfig, ModelConfig, SamplerConfig
from pipeline.config.run import EvaluationConfig, RunConfig
from pipeline.config.tasks.base import TaskConfig
from pipeline.config.tasks.kinds import TextTask
from pipeline.config.values.bounds import Ge


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EvaluationConfig):
    """Evaluation inside training, and the defaults of `latentmill eval`."""

    loss_images: Annotated[int, Ge(0)] = 512
    """Records of data.val on which the validation loss is measured, always with the same noise; 0 = none."""
    loss_every: Annotated[int, Ge(0)] = 0
    """Samples between measurements of the validation loss; 0 = with every commit."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the evaluated images are sampled."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision in which the denoiser predicts in evaluations, whatever that of training is; feature networks, CLIP and
    judges compute in fp32. auto: bf16 on GPUs that have it, else fp32."""
    tf32: bool = False
    """Let denoiser and decoder round products of fp32 numbers to TF32 in evaluations on GPUs."""
    grid: Annotated[int, Ge(0)] = 16
    """Number of captions whose samples each evaluation keeps as a picture, always the same captions."""
    caption: str = "1"
    """Which of the captions of a record evaluations take, where data.val holds several: its number, from 1, and of a
    record that has fewer the last; or drawn, by weight as in training, the same one at every evaluation."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """latentmill train: train a latent diffusion model, or a classifier of its noisy latents, on a cache."""

    verb = "train"

    model: ModelConfig = field(default_factory=ModelConfig)
    """The UNet; a classifier is its encoder half."""
    task: TaskConfig = field(default_factory=TextTask)
    """Conditioning."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Noise schedule and objective."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation during training."""
    encoders: EncodersConfig | None = None
    """Encoders that evaluations load; by default those of the training cache's contract."""
    init: str = ""
    """Weights that the UNet begins with: a run (folder or URL), a diffusers folder, or a CompVis .safetensors or
    .ckpt; "" = random weights. Recorded with the run; a resume begins with the run's own checkpoint."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Which weights of `init` to take, where a run or a CompVis file has both."""
    compile: bool = False
    """Compile every block of the UNet with torch.compile, once for each size of latents: this takes minutes before the
    first step. On a CPU it needs a C++ compiler, and convolutions in fp32 round more (models/kernels/winograd.py). With
    ZeRO stage 2 at most."""
