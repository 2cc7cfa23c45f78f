"""The networks: encoders, the UNet, its noise levels and objective, what conditions it, how it is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SamplerName = Literal["ddim", "dpmpp_2m", "euler", "heun", "unipc"]
"""The samplers that there are (diffusion/sampling.py)."""


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
"""The feature networks that there are (evaluation/features/networks.py)."""


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """Which autoencoder and text tower turn images and captions into what is cached (conf/encoders/*.yaml)."""

    name: str = "demo"
    """Short name, recorded in the contract: demo, sd1, sd2 or a name of your own."""
    vae: str = "demo"
    """Autoencoder: "demo" (shipped), a Hugging Face hub name, or a local folder or safetensors file (AutoencoderKL)."""
    vae_subfolder: str = ""
    """Folder of the autoencoder inside the hub repository or local folder ("vae" in Stable Diffusion's)."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the autoencoder: float32 or bfloat16. Part of the contract."""
    text: str = "demo"
    """Text tower in open_clip's architectures: "demo" (shipped), a name that open_clip knows such as ViT-L-14, or a
    local folder with open_clip_config.json and open_clip_model.safetensors."""
    text_pretrained: str = ""
    """open_clip's pretrained tag ("openai") or a local safetensors file (of OpenAI's weights: with text=
    ViT-L-14-quickgelu); "" where `text` is demo or a folder, which hold their weights."""
    text_layer: Literal["last", "penultimate"] = "last"
    """Hidden layer that is stored: last (Stable Diffusion 1) or penultimate (Stable Diffusion 2); then final norm."""
    text_pad: int = 0
    """Token id after the end token: 49407 in Stable Diffusion 1, 0 in Stable Diffusion 2 and open_clip."""
    text_length: int = 32
    """Context length in tokens, start and end included (77 for CLIP, 32 for the demo tower)."""
    seed: int = -1
    """-1: real weights. >= 0: the same architectures with random weights of this seed (tests; never for training)."""
    weights: str = ""
    """Folder or s3:// URL into which `latentmill fetch` brought these encoders: they are loaded from there, and nothing
    from the internet. "" = from where `vae` and `text` say. Not part of the contract."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The cross-attention UNet (Rombach et al. 2021, section 3.3; conf/model/*.yaml)."""

    name: str = "tiny"
    """Name shown in reports."""
    in_channels: int = 4
    """Channels of the noisy latent; a task that concatenates conditioning adds its own."""
    out_channels: int = 4
    """Channels predicted."""
    channels: int = 64
    """Width of the first level."""
    multipliers: tuple[int, ...] = (1, 2)
    """Width of each level as a multiple of `channels`; each level after the first halves the resolution."""
    blocks: int = 2
    """Residual blocks per level."""
    attention: tuple[int, ...] = (1, 2)
    """Downsampling factors of the latent at which the levels attend."""
    heads: int = 4
    """Attention heads at every level; 0 when `head_width` is given."""
    head_width: int = 0
    """Channels per head; 0 when `heads` is given."""
    transformer_depth: int | tuple[int, ...] = 1
    """Transformer blocks per attention layer; or a list, one number per level: [0,2,10], as SDXL, whose middle has the
    last."""
    context_width: int = 128
    """Width D of the context tokens (B, L, D); 0 for a model without cross-attention."""
    linear_projection: bool = False
    """Linear instead of 1x1-convolution projections around transformers (Stable Diffusion 2)."""
    vector_width: int = 0
    """Width of a pooled conditioning vector added to the timestep embedding; 0 for none."""
    vector_time_ids: int = 0
    """Numbers whose sinusoids, 256 channels each, are the vector's end (SDXL: 6, for sizes and crop); 0 for none. The
    network is the same; diffusers names its weights by it ("text_time")."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0
    """Dropout inside residual blocks, 0 to 1."""
    checkpointing: bool = False
    """Recompute each block's activations in the backward pass: least memory, about a third more time."""
    activation_gb: float = 0.0
    """Bound in GB on the activations that a rank keeps for the backward pass: as few blocks as that takes are computed
    again, the ones that free most first (docs/explained/memory_model.md). 0 = no bound."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Noise levels and objective (conf/diffusion/*.yaml; formulas and sources: docs/reference/objectives.md)."""

    prediction: Literal["epsilon", "v", "x0", "flow", "edm"] = "epsilon"
    """What the UNet predicts, and by that which process it undoes. epsilon, v (Salimans & Ho 2022) and x0: the discrete
    one that `schedule` makes; flow: rectified flow (Liu et al. 2022); edm: preconditioned, of Karras et al. 2022."""
    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Betas of the discrete process: scaled_linear (Stable Diffusion), linear (Ho et al. 2020) or cosine (Nichol &
    Dhariwal 2021, which has no beta_start and beta_end)."""
    timesteps: int = 1000
    """Number T of discrete noise levels; flow tells the network T times its time; edm does not use it."""
    beta_start: float = 0.00085
    """First beta."""
    beta_end: float = 0.012
    """Last beta."""
    zero_terminal_snr: bool = False
    """Rescale any schedule so that its last level is noise alone (Lin et al. 2023); v and x0 only."""
    timestep_sampling: Literal["uniform", "stratified"] = "uniform"
    """How a sample's uniform number is drawn: uniform (each by itself), or stratified (low-discrepancy over consecutive
    samples; docs/explained/promises.md, 1)."""
    timestep_density: Literal["uniform", "logit_normal", "log_normal"] = "uniform"
    """What that number becomes: a timestep that is uniform; one of which logit(t / T) is normal (logit_normal: Esser et
    al. 2024); or, for edm alone, a sigma of which the logarithm is (log_normal: Karras et al. 2022)."""
    timestep_mean: float = 0.0
    """Mean of that normal."""
    timestep_std: float = 1.0
    """Its standard deviation."""
    loss: Literal["l2", "l1"] = "l2"
    """l2 or l1."""
    min_snr_gamma: float = 0.0
    """Gamma of the min-SNR loss weight (Hang et al. 2023, who take 5), for epsilon, v and x0; 0 = all weights 1."""
    offset_noise: float = 0.0
    """Standard deviation of a constant added to each channel of a sample's noise (Guttenberg 2023, who takes 0.1);
    0 = none."""
    sigma_data: float = 0.5
    """edm: standard deviation of the latents that its preconditioning assumes."""
    sigma_min: float = 0.002
    """edm: smallest noise level that samplers visit."""
    sigma_max: float = 80.0
    """edm: noise level at which samplers begin."""
    rho: float = 7.0
    """edm: how much closer the samplers' levels lie where there is little noise."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What conditions the UNet (conf/task/*.yaml)."""

    name: Literal["text", "unconditional"] = "text"
    """text or unconditional."""
    drop: float = 0.1
    """Probability that a sample's conditioning becomes the null one (classifier-free guidance, Ho & Salimans)."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are sampled."""

    sampler: SamplerName = "dpmpp_2m"
    """ddim, dpmpp_2m, euler, heun (two predictions a step) or unipc (docs/how_to/choose_a_sampler.md)."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 3.0
    """Classifier-free guidance scale (1 = none)."""
    guidance_low: float = 0.0
    """Guidance is off at noise levels sigma / alpha up to this (Kynkaanniemi et al. 2024); 0 = no bound."""
    guidance_high: float = 0.0
    """Guidance is off at noise levels sigma / alpha above this; 0 = no bound."""
    rescale: float = 0.0
    """0 to 1: how far a guided prediction is brought back to the conditional one's standard deviation (Lin et al.
    2023, who take 0.7); 0 = not."""
    batch: int = 64
    """Images per denoising batch and rank; does not change the images."""

    @property
    def guidance_settings(self) -> dict[str, float]:
        """What is said of guidance besides its scale."""
        settings = {name: getattr(self, name) for name in ("guidance_low", "guidance_high", "rescale")}
        return {name: value for name, value in settings.items() if value}
