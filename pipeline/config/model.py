"""The networks: encoders, the UNet, its noise levels and objective, its conditioning, and how images are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.config.values.bounds import Between, Ge, Gt, SeedOrNone

SamplerName = Literal["ddim", "dpmpp_2m", "euler", "heun", "unipc"]
"""The available samplers (diffusion/sampling.py)."""


FeaturesName = Literal[
    "democlip",
    "inception",
    "inception_pytorch",
    "inception_clean",
    "clip_b32",
    "clip_l14",
    "clip_l14_336",
    "dinov2_s14",
    "dinov2_l14",
]
"""The available feature networks (evaluation/features/networks.py)."""


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """The autoencoder and the text tower that turn images and captions into cached arrays (conf/encoders/*.yaml)."""

    name: str = "demo"
    """Short name, recorded in the contract: demo, sd1, sd2 or a name of your own."""
    vae: str = "demo"
    """Autoencoder: "demo" (shipped), a Hugging Face hub name, a local folder (AutoencoderKL or VQModel of diffusers) or
    safetensors file; "pixels" = none, of caches and models whose latents are the pixels (`encode stored=pixels`)."""
    vae_subfolder: str = ""
    """Folder of the autoencoder inside the hub repository or local folder ("vae" in Stable Diffusion's)."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the autoencoder computes. Part of the contract."""
    text: str = "demo"
    """Text tower in open_clip's architectures: "demo" (shipped), a name that open_clip knows such as ViT-L-14, or a
    local folder with open_clip_config.json and open_clip_model.safetensors."""
    text_pretrained: str = ""
    """open_clip's pretrained tag ("openai") or a local safetensors file (for a file of OpenAI's weights, set
    text=ViT-L-14-quickgelu). "" where `text` is demo or a folder, which contain their weights."""
    text_layer: Literal["last", "penultimate"] = "last"
    """Hidden layer whose states are stored, after the final norm: last (Stable Diffusion 1) or penultimate (Stable
    Diffusion 2)."""
    text_pad: Annotated[int, Ge(0)] = 0
    """Token id that fills the positions after the end token: 49407 in Stable Diffusion 1, 0 in Stable Diffusion 2 and
    open_clip."""
    text_length: Annotated[int, Ge(1)] = 32
    """Context length in tokens, start and end tokens included (77 for CLIP, 32 for the demo tower)."""
    seed: SeedOrNone = -1
    """-1: real weights. 0 or more: the same architectures with random weights drawn from this seed (for tests, never
    for training)."""
    weights: str = ""
    """Folder, or URL in a bucket (s3://, gs://, az://), that `latentmill fetch` filled with these encoders: they are
    loaded from there and nothing is downloaded. "" = load them from the places that `vae` and `text` name. Not part of
    the contract."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The cross-attention UNet (Rombach et al. 2021, section 3.3; conf/model/*.yaml)."""

    name: str = "tiny"
    """Name shown in reports."""
    in_channels: Annotated[int, Ge(1)] = 4
    """Channels of the noisy latent; a task that concatenates conditioning adds its own."""
    out_channels: Annotated[int, Ge(1)] = 4
    """Channels of the prediction."""
    channels: Annotated[int, Ge(1)] = 64
    """Width of the first level."""
    multipliers: tuple[Annotated[int, Ge(1)], ...] = (1, 2)
    """Width of each level as a multiple of `channels`; each level after the first halves the resolution."""
    blocks: Annotated[int, Ge(1)] = 2
    """Residual blocks per level."""
    attention: tuple[int, ...] = (1, 2)
    """Downsampling factors of the latent at which levels have attention; the middle block always has it."""
    heads: int = 4
    """Attention heads at every level; 0 when `head_width` is given."""
    head_width: int = 0
    """Channels per head; 0 when `heads` is given."""
    transformer_depth: Annotated[int, Ge(1)] | tuple[Annotated[int, Ge(0)], ...] = 1
    """Transformer blocks per attention layer: one number, or a list with a number for each level, such as [0,2,10] for
    SDXL; the last is also the middle block's."""
    context_width: Annotated[int, Ge(0)] = 128
    """Width D of the context tokens (B, L, D); 0 for a model without cross-attention."""
    linear_projection: bool = False
    """Use linear projections around transformers, as Stable Diffusion 2, instead of 1x1 convolutions."""
    vector_width: Annotated[int, Ge(0)] = 0
    """Width of a pooled conditioning vector added to the timestep embedding; 0 for none."""
    vector_time_ids: Annotated[int, Ge(0)] = 0
    """How many numbers are embedded as sinusoids, 256 channels each, at the end of that vector (SDXL: 6, for sizes and
    crop); 0 for none. The network stays the same; diffusers then names its weights otherwise ("text_time")."""
    resblock_updown: bool = False
    """Halve and double the resolution inside residual blocks (Dhariwal & Nichol 2021), as Rombach et al.'s released
    inpainting and Churches models do, in place of single convolutions."""
    scale_shift_norm: bool = False
    """Let the timestep scale and shift the second norm of each residual block (Dhariwal & Nichol 2021, "adaptive group
    normalization"), as Rombach et al.'s released Churches model does, in place of adding it before the norm."""
    norm_groups: Annotated[int, Ge(1)] = 32
    """Groups of every GroupNorm."""
    dropout: Annotated[float, Between(0, 1)] = 0.0
    """Dropout probability inside residual blocks."""
    checkpointing: bool = False
    """Recompute every block's activations in the backward pass: least memory, about a third more time."""
    activation_gb: Annotated[float, Ge(0)] = 0.0
    """Upper bound in GB on the activations that a rank keeps for the backward pass: as few blocks as necessary are
    computed again, the ones that free most first (docs/explained/memory_model.md). 0 = no bound."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Noise levels and objective (conf/diffusion/*.yaml; formulas and sources: docs/reference/objectives.md)."""

    prediction: Literal["epsilon", "v", "x0", "flow", "edm"] = "epsilon"
    """What the UNet predicts, which also decides the diffusion process. epsilon, v (Salimans & Ho 2022) and x0: the
    discrete process that `schedule` defines. flow: rectified flow (Liu et al. 2022). edm: the preconditioned process of
    Karras et al. 2022."""
    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Betas of the discrete process: scaled_linear (Stable Diffusion), linear (Ho et al. 2020) or cosine (Nichol &
    Dhariwal 2021, which has no beta_start and beta_end)."""
    timesteps: Annotated[int, Ge(1)] = 1000
    """Number T of discrete noise levels. With flow the network is given T times the time; edm does not use it."""
    beta_start: float = 0.00085
    """First beta of the schedule."""
    beta_end: float = 0.012
    """Last beta of the schedule."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last level is pure noise (Lin et al. 2023); with v and x0 only."""
    timestep_sampling: Literal["uniform", "stratified"] = "uniform"
    """How the uniform number behind a sample's timestep is drawn: uniform (independently), or stratified (spread evenly
    over consecutive samples; docs/explained/promises.md, 1)."""
    timestep_density: Literal["uniform", "logit_normal", "log_normal"] = "uniform"
    """Distribution to which that number is mapped. uniform: uniform timesteps t. logit_normal: logit(t / T) is normal
    (Esser et al. 2024). log_normal, for edm alone: the logarithm of sigma is normal (Karras et al. 2022)."""
    timestep_mean: float = 0.0
    """Mean of that normal distribution."""
    timestep_std: Annotated[float, Gt(0)] = 1.0
    """Standard deviation of that normal distribution."""
    loss: Literal["l2", "l1"] = "l2"
    """Squared error (l2) or absolute error (l1)."""
    min_snr_gamma: Annotated[float, Ge(0, "0 (off) or more is wanted")] = 0.0
    """Gamma of the min-SNR loss weight, for epsilon, v and x0 (Hang et al. 2023 use 5); 0 = every weight is 1."""
    offset_noise: Annotated[float, Ge(0, "0 (off) or more is wanted")] = 0.0
    """Standard deviation of a constant that is added to each channel of a sample's noise (Guttenberg 2023 uses 0.1); 0
    = none."""
    sigma_data: Annotated[float, Gt(0)] = 0.5
    """edm: standard deviation that the preconditioning assumes of latents."""
    sigma_min: float = 0.002
    """edm: smallest noise level that samplers visit."""
    sigma_max: float = 80.0
    """edm: noise level at which samplers begin."""
    rho: Annotated[float, Gt(0)] = 7.0
    """edm: spacing of the samplers' noise levels; larger = more of them at low noise (Karras et al. 2022)."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are sampled."""

    sampler: SamplerName = "dpmpp_2m"
    """ddim, dpmpp_2m, euler, heun (two predictions a step) or unipc (docs/how_to/choose_a_sampler.md)."""
    steps: Annotated[int, Ge(1)] = 20
    """Denoising steps."""
    guidance: Annotated[float, Ge(0, "0 or more is wanted (1 = none)")] = 3.0
    """Classifier-free guidance scale; 1 = no guidance."""
    guidance_low: Annotated[float, Ge(0)] = 0.0
    """Guidance is off at noise levels sigma / alpha up to this one (Kynkaanniemi et al. 2024); 0 = no bound."""
    guidance_high: Annotated[float, Ge(0)] = 0.0
    """Guidance is off at noise levels sigma / alpha above this one; 0 = no bound."""
    rescale: Annotated[float, Between(0, 1)] = 0.0
    """How far the standard deviation of a guided prediction is pulled back to that of the conditional prediction (Lin
    et al. 2023 use 0.7); 0 = not at all, 1 = fully."""
    batch: Annotated[int, Ge(1)] = 64
    """Images per denoising batch and rank; the images do not depend on it."""

    @property
    def guidance_settings(self) -> dict[str, float]:
        """The guidance settings besides the scale that are not 0, by name."""
        settings = {name: getattr(self, name) for name in ("guidance_low", "guidance_high", "rescale")}
        return {name: value for name, value in settings.items() if value}
