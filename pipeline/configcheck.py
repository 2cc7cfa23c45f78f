"""Contradictions between fields of a configuration, each refused with one line that says how to mend it."""

from __future__ import annotations

import math
import re
from typing import Any

from pipeline import config as c
from pipeline.errors import ConfigError
from pipeline.rules import parse_rules
from pipeline.sbatch import limit_seconds

WIDEST = 0.28
"""Relative widths of power-function averages lie below: a plain mean has 1 / sqrt(12)."""


def check(config: Any) -> None:
    """Check one verb's configuration. Raises ConfigError for the first contradiction."""
    CHECKS[type(config)](config)


def check_train(config: c.TrainConfig) -> None:
    """latentmill train."""
    _some_text("run", config.run, "a folder or s3:// URL for the run")
    _some_text("data.train", config.data.train, "the cache that `latentmill encode` wrote")
    check_mix("data.", config.data.train, config.data.mix, config.data.weights)
    _at_least(1, samples=config.samples)
    _at_least(0, seed=config.seed)
    _require(
        config.init == "" or config.init.rstrip("/") != config.run.rstrip("/"),
        f"init={config.init} is the run itself: leave init out to go on with it, or give another run=",
    )
    check_model(config.model, config.task)
    _require(
        config.model.activation_gb >= 0, f"model.activation_gb={config.model.activation_gb:g}: 0 or more is wanted"
    )
    check_optim(config.optim, config.launch.processes)
    _fraction("task.drop", config.task.drop)
    check_diffusion(config.diffusion)
    check_ema(config.ema)
    _at_least(1, **{"launch.processes": config.launch.processes, "data.workers": config.data.workers})
    _at_least(0, **{"launch.threads": config.launch.threads, "data.prefetch": config.data.prefetch})
    check_checkpoint(config)
    check_guard(config.guard)
    for name in ("spike", "stall_s", "peak_tflops"):
        value = getattr(config.tracking, name)
        _require(value >= 0, f"tracking.{name}={value:g}: 0 or more is wanted (0 = off)")
    _require(
        config.eval.cluster == "" or config.eval.where == "job",
        f"eval.cluster={config.eval.cluster} is for eval.where=job: add that, or leave eval.cluster out",
    )
    _require(config.data.memory_gb > 0, f"data.memory_gb={config.data.memory_gb:g}: a number above 0 is wanted")
    _require(config.data.cache_gb > 0, f"data.cache_gb={config.data.cache_gb:g}: a number above 0 is wanted")
    engine = config.deepspeed
    _require(
        engine.engine != "torch" or config.launch.processes == 1,
        f"deepspeed.engine=torch runs on one process: launch.processes=1 (it is {config.launch.processes})",
    )
    _require(
        config.precision != "bf16" or engine.stage >= 1 or engine.engine == "torch",
        "precision=bf16 needs ZeRO stage >= 1 (deepspeed=zero1, zero2 or zero3): stage 0 loses fp32 master weights",
    )
    _require(
        not config.compile or engine.stage <= 2 or engine.engine == "torch",
        "compile=true goes with ZeRO stage 2 at most: stage 3 gathers weights inside of what would be compiled",
    )
    _require(
        not engine.offload or (engine.stage >= 1 and engine.engine == "deepspeed"),
        "deepspeed.offload=true needs ZeRO stage >= 1 (deepspeed=zero1, zero2 or zero3)",
    )
    check_evaluation(config)


def check_checkpoint(config: c.TrainConfig) -> None:
    """Commits, and the watchdog that lets them be gone on with."""
    settings = config.checkpoint
    _at_least(1, **{"checkpoint.every": settings.every, "checkpoint.keep": settings.keep})
    _at_least(0, **{"checkpoint.keep_every": settings.keep_every})
    _require(
        settings.best == "" or config.data.val != "",
        f"checkpoint.best={settings.best} goes by evaluations, and there are none: data.val=CACHE names the captions",
    )
    _require(
        settings.best in ("", "clip_score", "attribute_accuracy") or config.eval.reference != "",
        f"checkpoint.best={settings.best} wants statistics of real images: eval.reference=FILE (latentmill reference)",
    )
    _require(
        config.watchdog_s >= 0, f"watchdog_s={config.watchdog_s:g}: a number of seconds is wanted (0 = no watchdog)"
    )


def check_ema(config: c.EmaConfig) -> None:
    """The averages that a run keeps."""
    _require(config.half_life > 0, f"ema.half_life={config.half_life:g}: a number above 0 is wanted")
    _require(config.warmup > 0, f"ema.warmup={config.warmup:g}: a number above 0 is wanted")
    for value in config.half_lives:
        _require(value >= 1, f"ema.half_lives: {value:g} is no number of samples: 1 or more is wanted")
    for value in config.widths:
        _require(
            0 < value < WIDEST, f"ema.widths: {value:g} is no relative width: above 0 and below {WIDEST} is wanted"
        )
    for name, values in (("half_lives", config.half_lives), ("widths", config.widths)):
        labels = [f"{value:g}" for value in values]
        _require(len(set(labels)) == len(labels), f"ema.{name} names one twice: {', '.join(labels)}")
    _require(
        bool(config.widths) == bool(config.snapshots > 0),
        f"ema.widths={list(config.widths)} with ema.snapshots={config.snapshots}: give both, such as "
        "ema.widths=[0.05,0.10] and ema.snapshots=1000000, or neither",
    )


def check_average(weights: str, ema: float) -> None:
    """Which of a run's averages a verb takes."""
    _require(weights == "ema" or ema == 0, f"weights={weights} with ema={ema:g}: leave one of them out")
    _require(
        ema == 0 or 0 < ema < WIDEST or ema >= 1,
        f"ema={ema:g} is neither a relative width (above 0 and below {WIDEST}) nor a half-life in samples (1 or more)",
    )


def check_guard(config: c.GuardConfig) -> None:
    """The guard against jumps of the loss."""
    _at_least(8, **{"guard.window": config.window})
    _at_least(1, **{"guard.most": config.most})
    for name in ("loss", "grad_norm"):
        factor = getattr(config, name)
        _require(factor == 0 or factor > 1, f"guard.{name}={factor:g}: a factor above 1 is wanted (0 = not looked at)")


def check_evaluation(config: c.TrainConfig) -> None:
    """Evaluation inside training."""
    settings = config.eval
    _at_least(1, **{"eval.images": settings.images})
    _at_least(
        0, **{"eval.every": settings.every, "eval.final_images": settings.final_images, "eval.grid": settings.grid}
    )
    _at_least(0, **{"eval.loss_images": settings.loss_images, "eval.loss_every": settings.loss_every})
    check_sampler(settings.sampler, config.diffusion.timesteps, "eval.sampler.")
    _require(
        settings.reference == "" or config.data.val != "",
        "eval.reference is given but data.val is not: data.val=CACHE names the captions to sample",
    )
    _require(
        config.data.val == "" or config.data.val not in (config.data.train, *config.data.mix),
        f"data.val={config.data.val} is the training cache; captions must be ones that training never sees",
    )


def check_mix(prefix: str, first: str, mix: tuple[str, ...], weights: tuple[float, ...]) -> None:
    """Caches that are mixed, and their weights. prefix: of the keys, in messages."""
    urls, shown = [first.rstrip("/"), *(url.rstrip("/") for url in mix)], f"{prefix}weights={list(weights)}"
    _require(all(url.strip() for url in mix), f"{prefix}mix={list(mix)}: the name of a cache is empty")
    twice = sorted({url for url in urls if urls.count(url) > 1})
    _require(not twice, f"{prefix}mix: {', '.join(twice)} is given twice; give it once, with a larger weight")
    _require(
        not weights or bool(mix),
        f"{shown} without {prefix}mix: name the caches to mix in, {prefix}mix=[CACHE], or leave the weights out",
    )
    _require(
        len(weights) in (0, len(urls)),
        f"{shown}: {len(urls)} weights are wanted, the first cache's and one for each of {prefix}mix",
    )
    _require(
        all(math.isfinite(weight) and weight > 0 for weight in weights),
        f"{shown}: numbers above 0 are wanted; leave out a cache that is not to be read",
    )


def check_model(model: c.ModelConfig, task: c.TaskConfig) -> None:
    """The UNet's widths, levels and heads."""
    _at_least(
        1, **{f"model.{name}": getattr(model, name) for name in ("channels", "blocks", "in_channels", "out_channels")}
    )
    _at_least(1, **{"model.norm_groups": model.norm_groups})
    _at_least(0, **{"model.context_width": model.context_width, "model.vector_width": model.vector_width})
    _at_least(0, **{"model.vector_time_ids": model.vector_time_ids})
    _require(
        model.vector_time_ids * 256 <= model.vector_width,
        f"model.vector_time_ids={model.vector_time_ids}: they are 256 channels each, more than model.vector_width="
        f"{model.vector_width}",
    )
    _require(len(model.multipliers) > 0, "model.multipliers=[]: one number per level is wanted, such as [1,2,4]")
    _at_least(1, **{"model.multipliers": min(model.multipliers)})
    _fraction("model.dropout", model.dropout)
    _require(
        (model.heads > 0) != (model.head_width > 0),
        f"model.heads={model.heads} and model.head_width={model.head_width}: give one of them and set the other to 0",
    )
    _require(
        task.name != "text" or model.context_width > 0,
        "task=text needs cross-attention: model.context_width must be the text width of the cache (it is 0)",
    )
    factors = [2**level for level in range(len(model.multipliers))]
    check_depth(model, factors)
    for level, (factor, multiplier) in enumerate(zip(factors, model.multipliers)):
        width = model.channels * multiplier
        name = f"level {level} of the UNet has {width} channels (model.channels={model.channels} x {multiplier})"
        _require(width % model.norm_groups == 0, f"{name}: not a multiple of model.norm_groups={model.norm_groups}")
        if factor not in model.attention and factor != factors[-1]:  # the middle block always attends
            continue
        _require(width % (model.heads or model.head_width) == 0, f"{name}: not a multiple of its heads or head_width")


def check_depth(model: c.ModelConfig, factors: list[int]) -> None:
    """Transformer blocks of every level that attends; the last number is the middle's too."""
    depth = model.transformer_depth
    if isinstance(depth, int):
        return _at_least(1, **{"model.transformer_depth": depth})
    shown = f"model.transformer_depth={list(depth)}"
    _require(len(depth) == len(factors), f"{shown}: one number for each of the {len(factors)} model.multipliers")
    for level, (factor, blocks) in enumerate(zip(factors, depth)):
        attends = factor in model.attention or factor == factors[-1]
        _require(blocks >= attends, f"{shown}: level {level} attends, so 1 or more is wanted for it")


def check_diffusion(diffusion: c.DiffusionConfig) -> None:
    """Noise levels, objective, and what cannot go together in them."""
    prediction, density = diffusion.prediction, diffusion.timestep_density
    _at_least(1, **{"diffusion.timesteps": diffusion.timesteps})
    _require(
        0 < diffusion.beta_start <= diffusion.beta_end < 1,
        f"diffusion.beta_start={diffusion.beta_start:g}, beta_end={diffusion.beta_end:g}: 0 < start <= end < 1",
    )
    for name in ("min_snr_gamma", "offset_noise"):
        value = getattr(diffusion, name)
        _require(0 <= value < math.inf, f"diffusion.{name}={value:g}: 0 (off) or more is wanted")
    for name in ("timestep_std", "sigma_data", "rho"):
        value = getattr(diffusion, name)
        _require(0 < value < math.inf, f"diffusion.{name}={value:g}: a number above 0 is wanted")
    _require(
        abs(diffusion.timestep_mean) + 7 * diffusion.timestep_std <= 80,
        f"diffusion.timestep_mean={diffusion.timestep_mean:g}, timestep_std={diffusion.timestep_std:g}: seven standard "
        "deviations from the mean must lie within +-80",
    )
    _require(
        0 < diffusion.sigma_min < diffusion.sigma_max < math.inf,
        f"diffusion.sigma_min={diffusion.sigma_min:g}, sigma_max={diffusion.sigma_max:g}: 0 < min < max",
    )
    _require(
        (density == "log_normal") == (prediction == "edm"),
        f"diffusion.timestep_density={density} with prediction={prediction}: edm draws sigmas, so it takes log_normal "
        "(diffusion=edm sets it), and the others draw timesteps: uniform or logit_normal",
    )
    discrete = prediction not in ("flow", "edm")
    if diffusion.zero_terminal_snr:
        _require(
            discrete,
            f"diffusion.zero_terminal_snr=true rescales betas, and prediction={prediction} has none: leave it out",
        )
        _require(
            prediction != "epsilon",
            "diffusion.zero_terminal_snr=true with prediction=epsilon: where x_t is noise alone, its noise says "
            "nothing of x_0; set diffusion.prediction=v (diffusion=zero_snr does), or zero_terminal_snr=false",
        )
        _require(diffusion.timesteps > 1, "diffusion.zero_terminal_snr=true needs diffusion.timesteps of 2 or more")
    if diffusion.min_snr_gamma:
        _require(
            discrete,
            f"diffusion.min_snr_gamma is for epsilon, v and x0; prediction={prediction} weighs noise levels by how "
            "often they are drawn: set min_snr_gamma=0, and timestep_mean and timestep_std",
        )
        _require(diffusion.loss == "l2", "diffusion.min_snr_gamma weighs squared errors: set diffusion.loss=l2")
        _require(
            not diffusion.zero_terminal_snr,
            "diffusion.min_snr_gamma gives a level without signal the weight 0, so the one where sampling begins would "
            "never be learnt: set min_snr_gamma=0, or zero_terminal_snr=false",
        )


def check_optim(optim: c.OptimConfig, processes: int) -> None:
    """The optimizer; the batch against the ranks that this machine starts (under torchrun see check_world)."""
    _require(optim.lr > 0, f"optim.lr={optim.lr:g}: a number above 0 is wanted")
    _require(optim.eps > 0, f"optim.eps={optim.eps:g}: a number above 0 is wanted")
    for beta in optim.betas:
        _require(0 <= beta < 1, f"optim.betas={list(optim.betas)}: numbers from 0 to below 1 are wanted")
    _require(0 <= optim.momentum < 1, f"optim.momentum={optim.momentum:g}: a number from 0 to below 1 is wanted")
    _at_least(0, **{"optim.warmup": optim.warmup, "optim.micro_batch": optim.micro_batch})
    _require(optim.weight_decay >= 0, f"optim.weight_decay={optim.weight_decay:g}: 0 or more is wanted")
    _require(optim.clip >= 0, f"optim.clip={optim.clip:g}: 0 (off) or more is wanted")
    _at_least(1, **{"optim.batch": optim.batch})
    check_world(optim, processes)


def check_world(optim: c.OptimConfig, world: int) -> None:
    """The global batch against the number of ranks: call it again when torchrun or srun says how many there are."""
    _require(
        optim.batch % world == 0,
        f"optim.batch={optim.batch} does not divide among {world} ranks; the nearest that does is "
        f"{max(1, round(optim.batch / world)) * world}",
    )
    share = optim.batch // world
    _require(
        optim.micro_batch == 0 or share % optim.micro_batch == 0,
        f"optim.micro_batch={optim.micro_batch} does not divide the {share} samples of a rank "
        f"(optim.batch={optim.batch} / {world} ranks)",
    )


def check_sampler(sampler: c.SamplerConfig, timesteps: int, prefix: str) -> None:
    """Steps, guidance and batch of a sampler."""
    _at_least(1, **{f"{prefix}steps": sampler.steps, f"{prefix}batch": sampler.batch})
    _require(sampler.steps <= timesteps, f"{prefix}steps={sampler.steps}: at most diffusion.timesteps={timesteps}")
    check_guidance((sampler.guidance,), sampler.guidance_low, sampler.guidance_high, sampler.rescale, prefix)


def check_guidance(scales: tuple[float, ...], low: float, high: float, rescale: float, prefix: str = "") -> None:
    """Guidance scales, and what else is said of guidance."""
    for scale in scales:
        _require(scale >= 0, f"{prefix}guidance={scale:g}: 0 or more is wanted (1 = none)")
    _at_least(0, **{f"{prefix}guidance_low": low, f"{prefix}guidance_high": high})  # type: ignore[arg-type]
    _require(
        not high or low < high,
        f"{prefix}guidance_low={low:g}, guidance_high={high:g}: low < high, or 0 for no bound",
    )
    _fraction(f"{prefix}rescale", rescale)
    given = [name for name, value in (("guidance_low", low), ("guidance_high", high), ("rescale", rescale)) if value]
    _require(
        not given or any(scale != 1 for scale in scales),
        f"{prefix}{' and '.join(given)} without guidance: {prefix}guidance=1 is none; give a scale, or leave them out",
    )


def check_synth(config: c.SynthConfig) -> None:
    """latentmill synth."""
    _some_text("dest", config.dest, "a folder or s3:// URL for the shards")
    _at_least(1, images=config.images, shard_size=config.shard_size)
    _at_least(0, seed=config.seed)


def check_fetch(config: c.FetchConfig) -> None:
    """latentmill fetch."""
    _some_text("dest", config.dest, "a folder or s3:// URL for the encoders")


def check_encode(config: c.EncodeConfig) -> None:
    """latentmill encode."""
    _some_text("source", config.source, "the input shards, such as 'shapes/{00000..00009}.tar'")
    _some_text("dest", config.dest, "a folder or s3:// URL for the cache")
    _require(len(config.resolution) > 0, "resolution=[]: one side in pixels or more is wanted, such as [256,512]")
    _require(
        len(set(config.resolution)) == len(config.resolution),
        f"resolution={list(config.resolution)}: one of them is given twice",
    )
    _at_least(1, resolution=min(config.resolution), batch=config.batch)
    _at_least(0, workers=config.workers, buckets=config.buckets, seed=config.seed)
    _at_least(0, **{"launch.threads": config.launch.threads})
    _require(config.bucket_aspect >= 1, f"bucket_aspect={config.bucket_aspect:g}: 1 or more is wanted")
    _require(config.claim_seconds > 0, f"claim_seconds={config.claim_seconds:g}: a number above 0 is wanted")
    _require(not (config.finalize and config.dry_run), "finalize=true and dry_run=true: choose one")
    filters = config.filters
    _at_least(0, **{f"filters.{name}": getattr(filters, name) for name in ("min_side", "min_caption", "max_caption")})
    _require(
        filters.max_aspect == 0 or filters.max_aspect >= 1,
        f"filters.max_aspect={filters.max_aspect:g}: 1 or more is wanted, or 0 for any",
    )
    parse_rules(filters.keep)
    _at_least(1, **{"launch.processes": config.launch.processes, "encoders.text_length": config.encoders.text_length})
    _at_least(0, **{"encoders.text_pad": config.encoders.text_pad})
    _fraction("max_rejects", config.max_rejects)
    for name in ("member_bytes", "members", "pixels", "caption_bytes"):
        _at_least(1, **{f"limits.{name}": getattr(config.limits, name)})
    _caption_key(config.caption_key)
    _require(
        len(set(config.conditions)) == len(config.conditions),
        f"conditions=[{','.join(config.conditions)}]: one of them is given twice",
    )


def check_index(config: c.IndexConfig) -> None:
    """latentmill index."""
    _some_text("dataset", config.dataset, "the folder or s3:// URL below which the tars lie")
    _some_text("source", config.source, "the tars, such as 'DATASET/*.tar'")
    for name, value in {"moments_member": config.moments_member, "text_member": config.text_member}.items():
        _require(
            re.fullmatch(r"([^/]*\.)?npy", value) is not None,
            f"{name}={value}: a .npy file is wanted, as named after the key (moments.npy); pickles are never opened",
        )
    _require(config.moments_member != config.text_member, f"text_member={config.text_member} is moments_member")
    _caption_key(config.caption_key)
    _at_least(1, channels=config.channels, downsampling=config.downsampling)
    _require(config.scale > 0, f"scale={config.scale:g}: a number above 0 is wanted")
    _fraction("max_rejects", config.max_rejects)
    for name in ("member_bytes", "members", "caption_bytes"):
        _at_least(1, **{f"limits.{name}": getattr(config.limits, name)})


def check_verify(config: c.VerifyConfig) -> None:
    """latentmill verify."""
    _some_text("dataset", config.dataset, "the cache")
    _at_least(0, samples=config.samples)


def check_reference(config: c.ReferenceConfig) -> None:
    """latentmill reference."""
    _some_text("dataset", config.dataset, "a cache")
    _at_least(0, images=config.images)


def check_data(config: c.DataVerbConfig) -> None:
    """latentmill data."""
    _require(config.dataset + config.run != "", "dataset is missing: give dataset=CACHE, or run=RUN for a run's own")
    if config.dataset:
        check_mix("", config.dataset, config.mix, () if config.run else config.weights)
    _at_least(1, world=config.world, nodes=config.nodes, batches=config.batches)
    _at_least(0, batch=config.batch)
    _at_least(-1, at=config.at, seed=config.seed)
    _require(config.world % config.nodes == 0, f"world={config.world} does not divide among nodes={config.nodes}")
    _require(config.images_per_s >= 0, f"images_per_s={config.images_per_s:g}: 0 or more is wanted")


def check_eval(config: c.EvalRunConfig) -> None:
    """latentmill eval."""
    check_average(config.weights, config.ema)
    if config.from_card == "":
        _some_text("run", config.run, "a run directory")
    for name, example in (("guidance", "[1,2,3]"), ("sampler", "[ddim,dpmpp_2m]"), ("steps", "[10,20]")):
        values = getattr(config, name)
        _require(len(values) > 0, f"{name}=[]: one or more is wanted, such as {example}")
        _require(len(set(values)) == len(values), f"{name}=[{','.join(map(str, values))}]: one is given twice")
    _at_least(2, images=config.images)
    _at_least(1, steps=min(config.steps), batch=config.batch)
    _at_least(0, at=config.at, seed=config.seed)
    check_guidance(config.guidance, config.guidance_low, config.guidance_high, config.rescale)


def check_sample(config: c.SampleConfig) -> None:
    """latentmill sample."""
    check_average(config.weights, config.ema)
    _some_text("run", config.run, "a run directory")
    _some_text("dest", config.dest, "the picture to write")
    _at_least(1, n=config.n)
    _at_least(0, at=config.at, seed=config.seed)
    _require(config.guidance >= 0, f"guidance={config.guidance:g}: 0 or more is wanted (1 = none)")
    check_sampler(config.sampler, 1000, "sampler.")
    guidance = config.guidance or config.sampler.guidance
    _require(
        config.negative == "" or guidance != 1,
        "negative is given but guidance=1 leads away from nothing: give a guidance scale, or leave negative out",
    )
    for size in config.size:
        _require(
            re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) is not None,
            f"size={size}: width and height in pixels are wanted, as 512x768",
        )
    _require(
        len(config.size) in (0, 1, max(len(config.prompt), 1)),
        f"size: {len(config.size)} sizes for {max(len(config.prompt), 1)} captions; one, or one for each",
    )


def check_export(config: c.ExportConfig) -> None:
    """latentmill export."""
    check_average(config.weights, config.ema)
    _some_text("run", config.run, "a run directory")
    _some_text("dest", config.dest, "a folder, or for format=compvis a .safetensors or .ckpt file")
    _at_least(0, at=config.at)
    _require(
        config.format != "compvis" or config.dest.endswith((".safetensors", ".ckpt")),
        f"dest={config.dest}: format=compvis writes one file whose name ends in .safetensors or .ckpt",
    )
    _require(
        config.format != "compvis" or config.sampler == "ddim",
        f"sampler={config.sampler}: a file of format=compvis holds no scheduler; leave sampler out",
    )


def check_demo(config: c.DemoConfig) -> None:
    """latentmill demo."""
    _some_text("dest", config.dest, "a folder")
    _require("://" not in config.dest, f"dest={config.dest}: the demo works in a folder of this machine")
    _at_least(1, images=config.images, processes=config.processes)
    _at_least(0, samples=config.samples, seed=config.seed)


def check_submit(config: c.SubmitConfig) -> None:
    """latentmill submit."""
    cluster = config.cluster
    for name in ("nodes", "tasks", "processes", "cpus"):
        _at_least(1, **{f"cluster.{name}": getattr(cluster, name)})
    for name in ("concurrent", "gpus", "signal"):
        _at_least(0, **{f"cluster.{name}": getattr(cluster, name)})
    memory = cluster.gpu_memory_gb
    _require(memory >= 0, f"cluster.gpu_memory_gb={memory:g}: 0 (not known) or more is wanted")
    if cluster.time:
        seconds = limit_seconds(cluster.time)
        _require(
            seconds is not None,
            f"cluster.time={cluster.time}: a limit such as 90 (minutes), 04:00:00 or 2-12:00:00 is wanted",
        )
        _require(
            cluster.signal < (seconds or 0),
            f"cluster.signal={cluster.signal}: that many seconds before the end of cluster.time={cluster.time}",
        )
    _require(
        re.fullmatch(r"(\d+[KMGTkmgt]?)?", cluster.mem) is not None,
        f"cluster.mem={cluster.mem}: a number with K, M, G or T is wanted, such as 64G",
    )
    _some_text("cluster.logs", cluster.logs, "a folder that the compute nodes see")
    _require("://" not in cluster.logs, f"cluster.logs={cluster.logs}: Slurm writes logs to a folder, not to a URL")
    _require("\\" not in cluster.logs, f"cluster.logs={cluster.logs}: Slurm takes no backslash in a log's path")
    for option in cluster.options:
        _require(
            re.fullmatch(r"--[a-z][a-z-]+(=.*)?", option) is not None,
            f"cluster.options={option}: a long option of sbatch is wanted, such as --qos=high",
        )


CHECKS: dict[type, Any] = {
    c.SynthConfig: check_synth,
    c.FetchConfig: check_fetch,
    c.EncodeConfig: check_encode,
    c.IndexConfig: check_index,
    c.VerifyConfig: check_verify,
    c.ReferenceConfig: check_reference,
    c.TrainConfig: check_train,
    c.DataVerbConfig: check_data,
    c.EvalRunConfig: check_eval,
    c.SampleConfig: check_sample,
    c.ExportConfig: check_export,
    c.DemoConfig: check_demo,
    c.SubmitConfig: check_submit,
}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        _require(value >= least, f"{name}={value}: {least} or more is wanted")


def _caption_key(value: str) -> None:
    _require(
        value == "txt" or (value.startswith("json:") and len(value) > 5),
        f"caption_key={value}: txt, or json:KEY for a key of the .json member",
    )


def _fraction(name: str, value: float) -> None:
    _require(0 <= value <= 1, f"{name}={value:g}: a number from 0 to 1 is wanted")


def _some_text(name: str, value: str, what: str) -> None:
    _require(value.strip() != "", f"{name} is missing: give {name}=... ({what})")
