"""latentmill autoencoder: the first stage (Rombach et al. 2021, section 3.1), its losses, and how it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.run import EvaluationConfig, OptimConfig, RunConfig
from pipeline.config.values.bounds import Between, Ge


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig:
    """The architecture of an autoencoder (conf/autoencoder/*.yaml), which diffusers' AutoencoderKL or VQModel hold
    exactly."""

    name: str = "kl_small"
    """Name shown in reports."""
    regularizer: Literal["kl", "vq"] = "kl"
    """kl: latents have a mean and a variance, and are drawn to a standard normal. vq: the decoder reads the nearest
    entries of a learned codebook (van den Oord et al. 2017)."""
    channels: Annotated[int, Ge(1)] = 32
    """Width of the first level."""
    multipliers: tuple[Annotated[int, Ge(1)], ...] = (1, 1, 2, 4)
    """Width of each level as a multiple of `channels`. Each level after the first halves the resolution, so that
    f = 2^(levels - 1)."""
    blocks: Annotated[int, Ge(1)] = 1
    """Residual blocks of each level of the encoder; the decoder has one more."""
    latent_channels: Annotated[int, Between(1, 1024)] = 4
    """Channels of the latent; with vq also the width of a code."""
    attention: tuple[Annotated[int, Ge(1)], ...] = ()
    """Pixels per position, along a side, of the levels that have attention."""
    middle_attention: bool = True
    """Whether the middle blocks have attention."""
    norm_groups: Annotated[int, Ge(1)] = 32
    """Groups of every GroupNorm."""
    codes: Annotated[int, Between(2, 1 << 20)] = 8192
    """vq: entries of the codebook."""

    @property
    def downsampling(self) -> int:
        """f: pixels per latent position, along a side."""
        return int(2 ** (len(self.multipliers) - 1))


@dataclass(frozen=True, kw_only=True)
class FirstStageLossConfig:
    """What an autoencoder is trained to minimize. Every term is per pixel value, of which an image has 3 H W."""

    l1: Annotated[float, Ge(0)] = 1.0
    """Weight of the mean absolute error of a pixel value, which is from -1 to 1."""
    l2: Annotated[float, Ge(0)] = 0.0
    """Weight of the mean squared error of a pixel value."""
    perceptual: str = "none"
    """Weights of the perceptual distance, as eval.perceptual: st-alex, st-vgg, a file or URL of st-LPIPS, or
    lpips-vgg:FILE (or URL), the paper's; none = no such term."""
    perceptual_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the perceptual distance."""
    kl: Annotated[float, Ge(0)] = 1e-6
    """kl: weight of an image's divergence from the standard normal in nats, divided by 3 H W. Weights of losses that
    sum over pixels and over latents alike, such as Rombach et al.'s 1e-6, are the same number here."""
    codebook: Annotated[float, Ge(0)] = 1.0
    """vq: weight of the squared distance of codes to the latents that chose them, which moves the codes."""
    commitment: Annotated[float, Ge(0)] = 0.25
    """vq: weight of the same distance as it moves the latents."""
    restart: Annotated[int, Ge(0)] = 0
    """vq: a code that no latent has chosen in this many samples starts again at a latent of the batch; 0 = never."""


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """The patch discriminator (Isola et al. 2017; Esser et al. 2021), which has a hinge loss."""

    weight: Annotated[float, Ge(0)] = 0.0
    """Weight of the generator's loss, times the ratio of gradients at the last layer (Esser et al. 2021, equation 7); 0
    = no discriminator."""
    after: Annotated[int, Ge(0)] = 0
    """Samples after which the autoencoder has the generator's loss."""
    warmup: Annotated[int, Ge(0)] = 0
    """Samples before that over which the discriminator alone is trained."""
    ramp: Annotated[int, Ge(0)] = 0
    """Samples over which the weight then rises linearly from 0."""
    channels: Annotated[int, Ge(1)] = 64
    """Width of its first layer."""
    layers: Annotated[int, Between(1, 8)] = 3
    """Layers that halve the resolution."""


@dataclass(frozen=True, kw_only=True)
class FirstStageEvalConfig(EvaluationConfig):
    """Evaluation of an autoencoder inside training, and the defaults of `latentmill eval`."""

    batch: Annotated[int, Ge(1)] = 32
    """Images per batch and rank."""
    pairs: Annotated[int, Ge(0)] = 16
    """Pairs of a picture and its reconstruction that are kept, the worst first."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(RunConfig):
    """latentmill autoencoder: train a first stage on a cache of pixels (encode stored=pixels)."""

    verb = "autoencoder"

    autoencoder: FirstStageConfig = field(default_factory=FirstStageConfig)
    """The autoencoder."""
    loss: FirstStageLossConfig = field(default_factory=FirstStageLossConfig)
    """What it minimizes."""
    gan: GanConfig = field(default_factory=GanConfig)
    """The discriminator."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(betas=(0.5, 0.9), weight_decay=0.0))
    """The optimizer and its schedule."""
    eval: FirstStageEvalConfig = field(default_factory=FirstStageEvalConfig)
    """Evaluation during training."""
    crop: Annotated[int, Ge(0)] = 0
    """Side in pixels of the square that training cuts out of each picture, at a place drawn for each sample; 0 = the
    whole picture."""
    flip: bool = False
    """Whether training flips every second sample left to right, drawn for each sample."""
    init: str = ""
    """Weights that the autoencoder begins with: an autoencoder's run, or a folder that encoders.vae takes; "" = random
    weights."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Which weights of a run to take."""
