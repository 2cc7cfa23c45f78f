"""What every run that trains has: data, optimizer, averages, engine, commits, tracking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.model import FeaturesName
from pipeline.config.values.bounds import Between, Ge, Gt, OrZero, Seed

WIDEST = 0.28
"""Upper end of the relative widths of power-function averages: a plain mean has 1 / sqrt(12)."""

Weights = Annotated[tuple[float, ...], Gt(0, "numbers above 0 are wanted; leave out a cache that is not to be read")]
JumpFactor = Annotated[float, OrZero(Gt(1), "a factor above 1 is wanted (0 = not looked at)")]
ZeroIsOff = Annotated[float, Ge(0, "0 or more is wanted (0 = off)")]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The cached datasets that a run reads."""

    train: str = ""
    """Cache to train on: a folder, or a URL in a bucket (s3://, gs://, az://), that `latentmill encode` wrote."""
    mix: tuple[str, ...] = ()
    """Further caches that are mixed in, made by the same encoders. Their latents may differ in size; each global batch
    then comes from one cache."""
    weights: Weights = ()
    """Shares of the samples that come from data.train and from each cache of data.mix, in any unit ([0.7,0.2,0.1]); []
    = in proportion to their numbers of records. Each cache has epochs of its own, with every record once in each."""
    columns: tuple[str, ...] = ()
    """Columns that `latentmill columns` made for data.train, for caches of data.mix or for data.val, and that are read
    as part of their records: each belongs to the cache whose digest it names (docs/how_to/join_columns.md)."""
    val: str = ""
    """Cache whose captions evaluations sample; never trained on. "" turns sampled evaluation off."""
    tail: Literal["drop", "wrap"] = "drop"
    """Records that do not fill the last global batch of an epoch. drop: they are left out, and counted. wrap: the batch
    is filled up with records from the beginning of the epoch."""
    memory_gb: Annotated[float, Gt(0)] = 4.0
    """Upper bound in GB on the verified records that each rank keeps in memory; a large dataset needs about 3 over all
    ranks."""
    cache: str = ""
    """For datasets in a bucket: folder on a local disk where the ranks of a machine together keep fetched records for
    later epochs; "" = none."""
    cache_gb: Annotated[float, Gt(0)] = 100.0
    """Upper bound in GB on the size of that folder."""
    workers: Annotated[int, Ge(1)] = 4
    """Threads per rank that fetch and verify records ahead of the training loop, and so the number of simultaneous
    reads from a bucket."""
    prefetch: Annotated[int, Ge(0)] = 4
    """Batches per rank that are kept ready ahead of the training loop."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule; every duration is in samples."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW. muon: Muon (Jordan et al. 2024) for the matrices inside the network and AdamW for the rest, with
    one learning rate for both (Muon's updates are scaled to the size of AdamW's)."""
    lr: Annotated[float, Gt(0)] = 1e-4
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], Between(0, 1, "[)", "numbers from 0 to below 1 are wanted")] = (0.9, 0.999)
    """AdamW's betas: decay rates of its averages of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[float, Between(0, 1, "[)")] = 0.95
    """Muon's Nesterov momentum."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay, applied to matrices and convolution kernels only."""
    warmup: Annotated[int, Ge(0)] = 10_000
    """Samples over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling as a cosine to 0 at the run's last sample."""
    decay_samples: Annotated[int, Ge(0)] = 0
    """Samples at which the cosine reaches 0; 0 = `samples`. A run that goes on with another end of its decay says which
    learning rate that makes of which, and keeps the change in run.json."""
    clip: Annotated[float, Ge(0, "0 (off) or more is wanted")] = 1.0
    """Global gradient norm to which larger gradients are scaled down; 0 = no clipping."""
    batch: Annotated[int, Ge(1)] = 64
    """Global batch: samples per optimizer step, over all ranks."""
    micro_batch: Annotated[int, Ge(0)] = 0
    """Samples per forward pass and rank; 0 = a rank's whole share of the batch, without gradient accumulation."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights."""

    half_life: Annotated[float, Gt(0)] = 100_000.0
    """Half-life of the average in samples."""
    warmup: Annotated[float, Gt(0)] = 0.05
    """At sample n the half-life is at most warmup x n (Karras et al. 2022), so that early averages follow quickly."""
    half_lives: tuple[Annotated[float, Ge(1)], ...] = ()
    """Half-lives in samples of further averages that are kept; each takes 4 bytes per parameter, divided over the
    ranks."""
    widths: tuple[Annotated[float, Between(0, WIDEST, "()")], ...] = ()
    """Relative widths of power-function averages (Karras et al. 2024) that are kept, such as [0.05,0.10]. From their
    snapshots an average of any width can be made after training: `latentmill export ema=0.07`."""
    snapshots: int = 0
    """Samples between the snapshots of these averages. Each is written with the first commit at or after a multiple and
    is never removed (averages/)."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """The distributed engine (conf/deepspeed/*.yaml)."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed: DeepSpeed. torch: plain PyTorch in one process, the reference that every ZeRO stage is tested
    against."""
    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage."""
    offload: bool = False
    """Keep optimizer state in CPU memory."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Processes on this machine. Under torchrun, srun or accelerate the ranks that they started are used instead."""

    processes: Annotated[int, Ge(1)] = 1
    """Ranks that the verb itself starts on this machine."""
    threads: Annotated[int, Ge(0)] = 0
    """CPU threads per rank; 0 = cores / ranks."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the training state is committed (saved), and which commits are kept."""

    every: Annotated[int, Ge(1)] = 100_000
    """Samples between commits. One is always made at the end, and on SIGTERM or SIGUSR1."""
    keep: Annotated[int, Ge(1)] = 2
    """Number of newest checkpoints that are kept. None is removed unless the newest is complete."""
    keep_every: Annotated[int, Ge(0)] = 0
    """Also keep the first checkpoint at or after every multiple of this many samples; 0 = none."""
    best: str = ""
    """Also keep the evaluated checkpoint that is best by this figure of its evaluation: fid, kid, cmmd, clip_score, or
    one of the task's own (docs/how_to/evaluate.md); task = the figure that the task means by best; "" = none."""
    background: bool = True
    """true: write and upload while training continues, from a copy in memory (16 bytes per parameter, divided over the
    ranks). false: training waits, and on a CPU nothing is copied."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do about a step whose loss or gradient jumps, before the optimizer applies it
    (docs/how_to/train_for_weeks.md)."""

    action: Literal["off", "skip", "stop"] = "off"
    """off: nothing. skip: drop the gradient; the samples count as seen and are named. stop: end the run and name the
    samples."""
    loss: JumpFactor = 2.0
    """The loss jumps when that of the global batch is this many times its median over the last `window` steps; 0 = do
    not look at the loss."""
    grad_norm: JumpFactor = 5.0
    """The gradient jumps when its norm is this many times its median over the same steps; 0 = do not look at it."""
    window: Annotated[int, Ge(8)] = 128
    """Number of accepted steps over which the medians are taken; before there are that many, nothing counts as a
    jump."""
    most: Annotated[int, Ge(1)] = 8
    """Number of steps that may be skipped in a row; one more jump ends the run."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation inside training, whatever is trained."""

    every: Annotated[int, Ge(0)] = 0
    """Samples between evaluations; 0 = only before and after training. No evaluations when data.val is empty."""
    images: Annotated[int, Ge(1)] = 512
    """Images that each evaluation measures."""
    final_images: Annotated[int, Ge(0)] = 0
    """Images that the last evaluation measures; 0 = as many as `images`."""
    reference: str = ""
    """Statistics of real images for FID, a file written by `latentmill reference`; "" = no FID."""
    features: FeaturesName = "democlip"
    """Feature network of the reference: democlip (the image tower of the shipped CLIP), inception (FID as defined),
    inception_pytorch, inception_clean, clip_b32, clip_l14, clip_l14_336, dinov2_s14 or dinov2_l14."""
    features_weights: str = ""
    """Weights of the feature network: a file or URL, followed by #sha256=... to check its hash; "" = as published."""
    perceptual: str = "none"
    """Weights of a perceptual distance, where pictures are compared with true ones. st-LPIPS: st-alex or st-vgg of the
    package stlpips-pytorch (pip install 'latentmill[perceptual]'), or a file or URL of its weights. LPIPS:
    lpips-vgg:FILE or lpips-vgg:URL. #sha256=... after a file or URL checks its hash; none = no such figure."""
    where: Literal["train", "job"] = "train"
    """train: on all ranks, between training steps. job: in a separate process on a snapshot of the EMA weights, which
    training does not wait for (docs/how_to/evaluate_beside_training.md)."""
    cluster: str = ""
    """With where=job: name of a file in conf/cluster, whose Slurm runs each evaluation; "" = processes of lower
    priority on this machine, one at a time."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, and when they raise an alert."""

    to: tuple[Literal["wandb", "tensorboard"], ...] = ("wandb",)
    """Trackers that get the metrics: [wandb], [tensorboard], [wandb,tensorboard], or [] for none. tensorboard: event
    files in tensorboard/ of the run directory (pip install 'latentmill[tensorboard]')."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when logged in to wandb, else offline. off: wandb is not used, whatever tracking.to says."""
    project: str = ""
    """Project of wandb; "" = that of WANDB_PROJECT, else latentmill."""
    group: str = ""
    """Group of wandb; "" = that of WANDB_RUN_GROUP, else for a sweep its name."""
    every: int = 0
    """Samples between logged training metrics; 0 = every 20 optimizer steps."""
    spike: ZeroIsOff = 3.0
    """Alert when the loss or the largest gradient norm of a logged row is this many times its median over the 50 rows
    before; 0 = off."""
    stall_s: ZeroIsOff = 120.0
    """Alert when no step has ended for this many seconds, not counting evaluations and checkpoints; 0 = off."""
    peak_tflops: ZeroIsOff = 0.0
    """Peak TFLOP/s of one device, for model FLOPs utilization; 0 = the 16-bit peak of the GPU where it is known, else
    the utilization is not logged."""
    profile: str = ""
    """Optimizer steps that PyTorch's profiler records on rank 0, the first and the last, counted from the run's
    beginning (100..104); their trace goes into profiles/ of the run. "" = none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run that trains a network on a cache, whatever the network is."""

    verb = ""  # that trains it; no key
    run: str
    """Run directory, for the configuration, metrics, ledger, checkpoints and evaluations."""
    data: DataConfig = field(default_factory=DataConfig)
    """The datasets to train and evaluate on."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Averages of the weights."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """The distributed engine."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes on this machine."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the training state is committed, and what is kept."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What to do when the loss or the gradient jumps."""
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation during training."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Trackers and alerts."""
    samples: Annotated[int, Ge(1)] = 100_000
    """Samples after which the run ends, rounded up to a multiple of optim.batch."""
    seed: Seed = 0
    """Seed of everything random in the run."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue from the newest commit if there is one. must: fail if there is none. never: fail if there is
    one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32. bf16: with fp32 master weights, which need ZeRO stage 1 or more. auto: bf16 on GPUs that have it, else
    fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto = cuda where there is a GPU, else cpu."""
    deterministic: bool = False
    """Use deterministic kernels, so that runs on equal GPUs are bit-equal (on CPUs they always are)."""
    watchdog_s: Annotated[float, Ge(0, "a number of seconds is wanted (0 = no watchdog)")] = 900.0
    """A rank that finishes no step for this many seconds (not counting evaluations and commits) prints where it is and
    is ended, so that the job can be started again; 0 = never."""
    step_limit_s: ZeroIsOff = 0.0
    """The same, in place of watchdog_s, from the second step of a process on: the first, in which networks are compiled
    and ranks connect, takes longest. A collective may then take a minute more, where it is no evaluation's or commit's;
    0 = watchdog_s for every step."""
    gc_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps between collections of Python's garbage, which all ranks then make at the same steps: the first
    after each commit or evaluation, every so many from there, and none in between; 0 = whenever Python makes them, on
    each rank at another time, for which the others wait."""
