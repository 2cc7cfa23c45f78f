"""latentmill train, and the groups of a run: data, optimizer, averages, engine, commits, evaluation, tracking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.model import DiffusionConfig, EncodersConfig, FeaturesName, ModelConfig, SamplerConfig, TaskConfig


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
    """What is done about a step whose loss or gradient jumps, before the optimizer takes it
    (docs/how_to/train_for_weeks.md)."""

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
    training does not wait for (docs/how_to/evaluate_beside_training.md)."""
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
    wants a C++ compiler, and in fp32 convolutions round more (models/kernels/winograd.py). ZeRO stage 2 at most."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    deterministic: bool = False
    """Deterministic kernels: bit-equal runs on equal GPUs (always so on CPUs)."""
    watchdog_s: float = 900.0
    """A rank that finishes no step for so many seconds (evaluations and commits aside) shows where it stands and is
    ended, so that the job can come back; 0 = never."""
