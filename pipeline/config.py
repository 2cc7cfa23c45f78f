"""Every knob of every verb, as frozen dataclasses with a docstring per field.

`configload.load(verb, overrides)` composes the packaged YAML with Hydra, merges it into the verb's dataclass, refuses
unknown keys and wrong types, and then checks across fields (configcheck.py). Defaults live here; YAML holds only what
differs. A `Literal` lists the choices there are; a plain `str` is free text. Imports no torch, so that a login node can
submit a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SamplerName = Literal["ddim", "dpmpp_2m", "euler", "heun", "unipc"]
"""The samplers that there are (diffusion/sampler.py)."""

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
"""The feature networks that there are (evaluation/features.py)."""

# --------------------------------------------------------------------------------------------------------------------
# Shared groups


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
    again, the ones that free most first (docs/unet-cost.md). 0 = no bound."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Noise levels and objective (conf/diffusion/*.yaml; formulas and sources: docs/objective.md)."""

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
    samples; docs/promises.md, 1)."""
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
class DataConfig:
    """Cached datasets that a run reads."""

    train: str = ""
    """Cache to train on: a folder or s3:// URL that `latentmill encode` wrote."""
    mix: tuple[str, ...] = ()
    """Further caches that are mixed in, made by the same encoders; sizes of latents may differ, and then each global
    batch is of one cache."""
    weights: tuple[float, ...] = ()
    """Shares of the samples that are of data.train and of each of data.mix, in any unit ([0.7,0.2,0.1]); [] = in
    proportion to their numbers of records. Each cache turns over at its own pace, every record once in its epoch."""
    val: str = ""
    """Cache whose captions are sampled in evaluations; never trained on. "" turns sampled evaluation off."""
    tail: Literal["drop", "wrap"] = "drop"
    """What happens to records that do not fill an epoch's last global batch: drop (counted) or wrap."""
    memory_gb: float = 4.0
    """Bound in GB on verified records kept in memory by each rank; a large dataset wants about 3 over all ranks."""
    cache: str = ""
    """Folder on a local disk where fetched records are kept for later epochs, by all ranks of a machine; "" keeps none.
    For datasets in a bucket."""
    cache_gb: float = 100.0
    """Bound in GB on that folder."""
    workers: int = 4
    """Threads that fetch and verify ahead of the loop, per rank: reads from a bucket that are under way at once."""
    prefetch: int = 4
    """Batches kept ready ahead of the loop, per rank."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule; every length is in samples."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; muon: Muon (Jordan et al. 2024) for the matrices inside the network, AdamW for the rest, one learning rate
    for both (its updates are scaled to AdamW's size)."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov's)."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and kernels only."""
    warmup: int = 10_000
    """Samples over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or cosine to 0 at the run's last sample."""
    clip: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    batch: int = 64
    """Global batch in samples: what one optimizer step sees over all ranks."""
    micro_batch: int = 0
    """Samples per forward pass and rank; 0 takes the largest that the batch allows (no accumulation)."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights."""

    half_life: float = 100_000.0
    """Half-life in samples."""
    warmup: float = 0.05
    """At sample n a half-life is at most warmup x n (Karras et al. 2022), so early averages follow quickly."""
    half_lives: tuple[float, ...] = ()
    """Further averages that are kept beside it, by their half-lives in samples: 4 bytes a parameter / ranks each."""
    widths: tuple[float, ...] = ()
    """Power-function averages (Karras et al. 2024) of these relative widths, such as [0.05,0.10], from whose snapshots
    an average of any width is made when training is over: `latentmill export ema=0.07`."""
    snapshots: int = 0
    """Samples between snapshots of them, which stay (averages/): with the first commit at or after each multiple."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """The distributed engine (conf/deepspeed/*.yaml)."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or torch: plain PyTorch on one process, the oracle that every ZeRO stage is compared with."""
    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage 0 to 3."""
    offload: bool = False
    """Keep optimizer state in CPU memory."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Processes on this machine; under torchrun, srun or accelerate the environment's world is used instead."""

    processes: int = 1
    """Ranks that the verb starts on this machine itself."""
    threads: int = 0
    """CPU threads per rank; 0 = cores / ranks."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When training state is committed, and which commits are kept."""

    every: int = 100_000
    """Samples between commits; one is always made at the end and on SIGTERM / SIGUSR1."""
    keep: int = 2
    """Newest committed checkpoints kept; none is removed unless the newest is whole."""
    keep_every: int = 0
    """Also keep the first checkpoint at or after every multiple of so many samples; 0 = none."""
    best: Literal["", "fid", "kid", "cmmd", "clip_score", "attribute_accuracy"] = ""
    """Also keep the evaluated checkpoint that is best by this figure of its evaluation; "" = none."""
    background: bool = True
    """Write and upload while training goes on, from a copy in memory (16 bytes a parameter / ranks); false: training
    waits, and nothing is copied on a CPU."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done about a step whose loss or gradient jumps, before the optimizer takes it (docs/training.md)."""

    action: Literal["off", "skip", "stop"] = "off"
    """off; skip: drop the gradient, the samples count as seen and are named; stop: end the run, with them named."""
    loss: float = 2.0
    """A jump: the global batch's loss is this many times its median of the last `window` steps; 0 = not looked at."""
    grad_norm: float = 5.0
    """A jump: the gradient's norm is this many times its median; 0 = not looked at."""
    window: int = 128
    """Accepted steps that medians are taken over; until there are as many, nothing is a jump."""
    most: int = 8
    """Steps skipped in a row, after which the run ends instead."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are sampled."""

    sampler: SamplerName = "dpmpp_2m"
    """ddim, dpmpp_2m, euler, heun (two predictions a step) or unipc (docs/sampling.md)."""
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


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation inside training, and the defaults of `latentmill eval`."""

    every: int = 0
    """Samples between evaluations; 0 = only before and after training. Off altogether when data.val is empty."""
    images: int = 512
    """Images sampled per evaluation."""
    final_images: int = 0
    """Images of the last evaluation; 0 = as `images`."""
    loss_images: int = 512
    """Records of data.val whose loss is measured beside, always with the same noise; 0 = none."""
    loss_every: int = 0
    """Samples between measurements of that loss; 0 = with every commit."""
    reference: str = ""
    """Statistics of real images for FID, as written by `latentmill reference`; "" skips FID."""
    features: FeaturesName = "democlip"
    """Feature network of the reference: democlip (the shipped CLIP's image tower), inception (FID as defined),
    inception_pytorch, inception_clean, clip_b32, clip_l14, clip_l14_336, dinov2_s14 or dinov2_l14."""
    features_weights: str = ""
    """Its weights: a file or URL, #sha256=... after it to hold it to a hash; "" = where they were published."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the evaluated images are sampled."""
    grid: int = 16
    """Captions, the same at every evaluation, whose samples are kept as a picture."""
    where: Literal["train", "job"] = "train"
    """train: on all ranks, which wait for it; job: in a process of its own on a snapshot of the EMA weights, which
    training does not wait for (docs/evaluation-jobs.md)."""
    cluster: str = ""
    """where=job: a file of conf/cluster whose Slurm runs each evaluation; "" = processes of lower priority on this
    machine, one at a time."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when logged in, else offline; online; offline; off."""
    project: str = "latentmill"
    """wandb project."""
    group: str = ""
    """wandb group (a sweep's name)."""
    every: int = 0
    """Samples between logged training metrics; 0 = every 20 optimizer steps."""
    spike: float = 3.0
    """Alert when a row's loss or largest gradient norm is this many times its median of the 50 rows before; 0 = off."""
    stall_s: float = 120.0
    """Alert when no step has ended for so many seconds, evaluations and checkpoints aside; 0 = off."""
    peak_tflops: float = 0.0
    """Of one device, for model FLOPs utilization; 0 = the 16-bit peak of a GPU that is known, else none is logged."""


# --------------------------------------------------------------------------------------------------------------------
# Verbs


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """latentmill synth: write captioned-shapes shards in img2dataset's layout."""

    dest: str
    """Folder or s3:// URL for the shards."""
    images: int = 10_000
    """Number of images."""
    seed: int = 0
    """Seed of the world; image i depends on (seed, i, split) alone."""
    split: Literal["train", "val", "heldout", "all"] = "train"
    """train; val: as train, with captions that train never uses; heldout: every image shows a combination of size,
    colour and shape that train and val never show; all: no restriction."""
    shard_size: int = 1000
    """Images per tar."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Bounds that hold before a hostile source is decoded (docs/promises.md, 7)."""

    member_bytes: int = 64 * 1024 * 1024
    """Largest member of an input tar."""
    members: int = 2_000_000
    """Most members of one input tar."""
    pixels: int = 64_000_000
    """Most pixels of one image, read from its header before decoding."""
    caption_bytes: int = 65_536
    """Longest caption in bytes."""


@dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    """Samples that are whole but not wanted: each is rejected, and counted under `filter:...`. Part of the contract."""

    min_side: int = 0
    """Smallest shorter side of an image in pixels; 0 = any."""
    max_aspect: float = 0.0
    """Largest ratio of an image's longer side to its shorter; 0 = any."""
    min_caption: int = 0
    """Fewest characters of a caption."""
    max_caption: int = 0
    """Most characters of a caption; 0 = any number."""
    keep: tuple[str, ...] = ()
    """Rules on columns of the json, all of which must hold: KEY OP VALUE with >=, <=, >, <, == or !=
    ("[similarity>=0.28,punsafe<0.1,NSFW==UNLIKELY]"). A sample without the column counts as a defect."""
    duplicates: Literal["keep", "image", "pair"] = "keep"
    """keep; image: of samples whose image files are equal byte for byte only the first is kept; pair: of those whose
    captions are equal as well. Within a shard at once, across shards as a list of excluded records in the manifest."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """latentmill encode: image-text shards in, cached latents and text states out."""

    source: str
    """Input shards: brace and glob patterns, local or s3:// ('shapes/{00000..00009}.tar')."""
    dest: str
    """Folder or s3:// URL of the cache."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """Autoencoder and text tower."""
    resolution: tuple[int, ...] = (64,)
    """Side in pixels of the square crop that is encoded; a multiple of the autoencoder's downsampling factor. Several
    ([256,512]) are encoded in one pass, into one dataset each: dest/256 and dest/512."""
    crop: Literal["centre", "random"] = "centre"
    """Resize with antialiasing until the crop is covered, then take its middle (centre), or a place that depends on the
    sample's key and `seed` alone (random)."""
    buckets: int = 0
    """0: square crops. N: aspect-ratio buckets as SDXL's, sides multiples of N pixels (64 is usual), with the area of
    the square at most; each output shard holds one bucket."""
    bucket_aspect: float = 2.0
    """Largest ratio of a bucket's longer side to its shorter."""
    flip: bool = False
    """Also store every image flipped left to right, as a record of its own. "left of" becomes wrong in captions."""
    seed: int = 0
    """Of random crops. Part of the contract."""
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    """Samples that are not wanted."""
    caption_key: str = "txt"
    """Where captions are: txt (the .txt member) or json:KEY (a key of the .json member)."""
    conditions: tuple[Literal["boxes", "labels", "lowres", "mask"], ...] = ()
    """The task's members to store as cond.*: any of boxes, labels, lowres, mask."""
    text_storage: Literal["full", "trimmed", "tokens"] = "full"
    """What is stored of a caption. full: the states of every position, as Stable Diffusion is trained. trimmed: those
    up to its end token; the model then attends to nothing else. tokens: ids only; the trainer runs the text tower."""
    batch: int = 64
    """Images per encoder batch; batches never cross input shards. Part of the contract."""
    workers: int = 0
    """Decoding workers per process; 0 = the machine's cores / processes, at least 1."""
    decode_in: Literal["processes", "threads"] = "processes"
    """Worker processes, or threads of this process (starts sooner; slower with many cores)."""
    max_rejects: float = 0.1
    """Largest share of defective samples (what filters reject does not count); beyond it the stage fails."""
    claim_seconds: float = 120.0
    """A worker that has not renewed its claim on an input shard for this long is taken for dead."""
    finalize: bool = False
    """Encode nothing: check that every input shard is done, count, and write the manifest and the dataset card."""
    dry_run: bool = False
    """Encode nothing: try a few samples, and print what the whole would take in time, storage and objects."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Bounds on what a source may contain."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda. Its kind is part of the contract."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """latentmill index: make a dataset of plain WebDataset tars of latents that lie there already, or of a cache that
    lost its manifest or indexes. The tars are never changed."""

    dataset: str
    """Folder or s3:// URL below which the tars lie; indexes and manifest are written there."""
    source: str
    """The tars: brace and glob patterns ('DATASET/*.tar')."""
    encoders: EncodersConfig | None = None
    """The encoders that made the latents; without them they are unknown, which evaluations refuse."""
    moments_member: str = "moments.npy"
    """File of a record with the moments (2C, h, w), posterior mean then log-variance, unscaled: its name after the
    key and a dot; .npy of float16 or float32."""
    text_member: str = "text.npy"
    """File with the text states (L, D), as moments_member."""
    caption_key: str = "json:caption"
    """Where captions are: txt (the .txt member) or json:KEY (a key of the .json member)."""
    channels: int = 4
    """Channels C of a latent; with encoders, theirs."""
    downsampling: int = 8
    """Pixels per latent position along a side; with encoders, theirs."""
    scale: float = 0.18215
    """A latent is (z - shift) * scale for a posterior sample z; with encoders, theirs. This is Stable Diffusion's."""
    shift: float = 0.0
    """See scale."""
    max_rejects: float = 0.0
    """Largest share of records that may be left out because they are incomplete or of another shape."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Bounds on what the tars may contain."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """latentmill verify: prove a cache."""

    dataset: str
    """The cache."""
    source: str = ""
    """Where its input shards are, to decode latents and compare them with the images; "" = the manifest's own record
    of the pattern when it can be reached, else only the cache is checked."""
    samples: int = 64
    """Records decoded and compared with their images."""
    min_psnr: float = 20.0
    """Smallest median PSNR in dB between decoded latents and source images."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default those of the cache's contract."""
    report: str = ""
    """HTML page to write; "" = none."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """latentmill reference: feature statistics of real images, for FID, with their floors."""

    dataset: str
    """A cache whose source images are the reference (same resolution and crop)."""
    source: str = ""
    """Where its input shards are; "" = the manifest's own record of the pattern."""
    dest: str = ""
    """File to write (.safetensors); "" = reference-FEATURES.safetensors inside the cache."""
    encoders: EncodersConfig | None = None
    """Encoders to load; by default those of the cache's contract."""
    features: FeaturesName = "democlip"
    """Feature network, as eval.features of train."""
    features_weights: str = ""
    """Its weights, as eval.features_weights of train."""
    images: int = 0
    """Images used; 0 = all."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """latentmill train: a latent diffusion model on a cache."""

    run: str
    """Run directory: configuration, metrics, ledger, checkpoints, evaluations."""
    data: DataConfig = field(default_factory=DataConfig)
    """Datasets."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The UNet."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Conditioning."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Schedule and objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Averaged weights."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Engine."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Local processes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Commits."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Jumps of the loss."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation while training."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """wandb."""
    encoders: EncodersConfig | None = None
    """Where evaluations load the encoders from; by default those of the training cache's contract."""
    init: str = ""
    """What the UNet begins with: a run (folder or s3:// URL), a diffusers folder, or a CompVis .safetensors or .ckpt;
    "" = random weights. A fact of the run: a resume takes its own checkpoint."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Of a run or a CompVis file that holds both: ema or raw."""
    samples: int = 100_000
    """The run ends when this many samples have been seen; a multiple of optim.batch is rounded up to."""
    seed: int = 0
    """Seed of everything random."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on if there is a commit; must: fail if there is none; never: fail if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32; bf16 (fp32 master weights, ZeRO stage >= 1); auto = bf16 on GPUs that have it, else fp32."""
    compile: bool = False
    """torch.compile every block of the UNet, anew for each size of latents: minutes before the first step. On a CPU it
    wants a C++ compiler. ZeRO stage 2 at most."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    deterministic: bool = False
    """Deterministic kernels: bit-equal runs on equal GPUs (always so on CPUs)."""
    watchdog_s: float = 900.0
    """A rank that finishes no step for so many seconds (evaluations and commits aside) shows where it stands and is
    ended, so that the job can come back; 0 = never."""


@dataclass(frozen=True, kw_only=True)
class DataVerbConfig:
    """latentmill data: what ranks and nodes would read: the next batches, bytes, read amplification, bandwidth, memory.
    Asks the dataset's manifest alone."""

    dataset: str = ""
    """The cache; "" = that of `run`."""
    mix: tuple[str, ...] = ()
    """Further caches, as data.mix of train; [] = those of `run`, if it has any."""
    weights: tuple[float, ...] = ()
    """As data.weights of train; [] = the run's, else in proportion to numbers of records."""
    run: str = ""
    """Run directory whose dataset, batch, seed, tail, rate and newest commit hold where they are not given."""
    at: int = -1
    """Number of the sample from which on; a multiple of the batch. -1 = the run's newest commit, else 0."""
    world: int = 8
    """Ranks; they must divide the batch."""
    nodes: int = 1
    """Machines that the ranks are on, equally many on each."""
    batch: int = 0
    """Global batch; 0 = the run's, else 64."""
    seed: int = -1
    """Seed of the order; -1 = the run's, else 0."""
    tail: Literal["", "drop", "wrap"] = ""
    """As data.tail of train; "" = the run's, else drop."""
    batches: int = 16
    """Coming batches that are looked at."""
    images_per_s: float = 0.0
    """Images per second of all ranks together, for the bandwidth; 0 = what the run measured, else none is told."""


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
    relative width, made from the snapshots of ema.widths (docs/training.md)."""
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
    relative width, made from the snapshots of ema.widths (docs/training.md)."""
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
    relative width, made from the snapshots of ema.widths (docs/training.md)."""
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


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """latentmill fetch: bring the weights of the encoders into a folder or bucket once, as safetensors with a manifest
    of their hashes, for nodes without internet. What is there already is not brought again."""

    dest: str
    """Folder or s3:// URL, empty or from an earlier fetch of the same encoders; later encoders.weights=DEST."""
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    """The autoencoder and the text tower to bring."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How jobs run on a Slurm cluster, and what things are called there (conf/cluster/*.yaml)."""

    partition: str = ""
    """Partition; "" = the cluster's default."""
    account: str = ""
    """Account that is charged; "" = your default."""
    time: str = "04:00:00"
    """Time limit of each task, as minutes, HH:MM:SS, D-HH or D-HH:MM:SS; "" = the partition's default."""
    nodes: int = 1
    """Nodes of a training job, all its ranks together being nodes x processes. `nodes=8` says the same."""
    tasks: int = 8
    """Tasks of the array that shares encode's work."""
    concurrent: int = 0
    """Most tasks at a time; 0 = all."""
    processes: int = 1
    """Processes of each task of encode's, on one node; ranks on each node of a training job."""
    gpus: int = 1
    """GPUs per process; 0 = none."""
    gpu_type: str = ""
    """Kind of GPU as the cluster names it (a100); "" = any."""
    gpu_memory_gb: float = 0.0
    """GB of one GPU, against which a training step is held before it is submitted; 0 = not known."""
    cpus: int = 8
    """Cores per process."""
    mem: str = ""
    """Memory of a task or node, all its processes together, such as 64G; "" = the cluster's default."""
    logs: str = "slurm-logs"
    """Folder for the jobs' logs, which the compute nodes must see."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command ("module load cuda/12.4"). Jobs inherit the submitting shell's environment too:
    credentials belong there, never here."""
    python: str = ""
    """Python that runs the tasks; "" = the one that runs submit."""
    signal: int = 120
    """Seconds before the time limit at which processes are told to stop (SIGTERM, and in training SIGUSR1; Slurm may do
    so up to 60 s sooner): what a commit takes, and more; 0 = not."""
    requeue: bool = True
    """Whether a task that was stopped so, was preempted or lost its node goes back to the queue."""
    check_nodes: bool = True
    """Whether a training job asks its nodes for GPUs, disk, clock and reach of the data before its ranks start; a bad
    one is kept out of it (with requeue=false the job fails)."""
    finalize: bool = True
    """Whether a job without a GPU follows encode's array and writes the manifest, or says which shards are missing."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, for every job ("--qos=high")."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """latentmill submit: run a verb on Slurm. `latentmill submit train nodes=8 KEY=VALUE ...` prints the job script,
    checks it, has Slurm check it, and submits it; so do `submit encode` and `submit eval`. `then` between verbs makes a
    chain, in which each waits for the success of the one before. Keys under `cluster` say how, for the verbs that
    follow too; every other key is the verb's own (`latentmill train --help`). --dry-run submits nothing."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster; your own description of one goes into $LATENTMILL_CONF/cluster/NAME.yaml."""


# --------------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "synth": SynthConfig,
    "fetch": FetchConfig,
    "encode": EncodeConfig,
    "index": IndexConfig,
    "verify": VerifyConfig,
    "reference": ReferenceConfig,
    "train": TrainConfig,
    "data": DataVerbConfig,
    "eval": EvalRunConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
    "demo": DemoConfig,
    "submit": SubmitConfig,
}
"""The configuration of each verb that has one."""
