"""Contradictions between fields of a run's groups (model, diffusion, optim, ...), each refused with one line that says
how to resolve it. check/verbs.py calls these functions, verb by verb. Bounds of single fields are beside the fields."""

from __future__ import annotations

import math

from pipeline import config as c
from pipeline.config.run import WIDEST
from pipeline.config.tasks.figures import LPIPS, OF_FEATURES, RFID, SHORTCUT, ST_LPIPS, perceived
from pipeline.config.tasks.found import figures_of_run, require_perceived
from pipeline.config.tasks.kinds import CaptionedTask
from pipeline.config.values.bounds import require
from pipeline.config.values.places import place


def check_checkpoint(config: c.RunConfig) -> None:
    """The figure by which the best checkpoint is kept."""
    settings = config.checkpoint
    names = [SHORTCUT, *(figure.name for figure in figures_of_run(config))]
    what = "an autoencoder"
    if isinstance(config, c.TrainConfig):
        what = f"task={config.task.name}"
    else:
        assert isinstance(config, c.AutoencoderConfig), "a run of another kind"
        what = f"autoencoder.regularizer={config.autoencoder.regularizer}"
    require(
        settings.best in ("", *names),
        f"checkpoint.best={settings.best} is no figure of {what}: choose one of {', '.join(names)}",
    )
    require(
        settings.best == "" or config.data.val != "",
        f"checkpoint.best={settings.best} goes by evaluations, and there are none: data.val=CACHE names what they "
        f"{'sample for' if config.verb == 'train' else 'reconstruct'}",
    )
    require(
        settings.best not in [figure.name for figure in (*OF_FEATURES, RFID)] or config.eval.reference != "",
        f"checkpoint.best={settings.best} wants statistics of real images: eval.reference=FILE (latentmill reference)",
    )
    for figure, weights in ((ST_LPIPS, "st-alex, st-vgg or FILE"), (LPIPS, "lpips-vgg:FILE")):
        given = config.eval.perceptual != "none" and perceived(config.eval.perceptual) == figure
        require(
            settings.best != figure.name or given,
            f"checkpoint.best={settings.best} wants the weights of that distance: eval.perceptual={weights}",
        )


def check_ema(config: c.EmaConfig) -> None:
    """The averages that a run keeps: none twice, and widths together with snapshots."""
    for name, values in (("half_lives", config.half_lives), ("widths", config.widths)):
        labels = [f"{value:g}" for value in values]
        require(len(set(labels)) == len(labels), f"ema.{name} names one twice: {', '.join(labels)}")
    require(
        bool(config.widths) == bool(config.snapshots > 0),
        f"ema.widths={list(config.widths)} with ema.snapshots={config.snapshots}: give both, such as "
        "ema.widths=[0.05,0.10] and ema.snapshots=1000000, or neither",
    )


def check_average(weights: str, ema: float) -> None:
    """Which weights of a run a verb takes: raw, or one of its averages."""
    require(weights == "ema" or ema == 0, f"weights={weights} with ema={ema:g}: leave one of them out")
    require(
        ema == 0 or 0 < ema < WIDEST or ema >= 1,
        f"ema={ema:g} is neither a relative width (above 0 and below {WIDEST}) nor a half-life in samples (1 or more)",
    )


def check_evaluation(config: c.TrainConfig) -> None:
    """Evaluation during training."""
    settings = config.eval
    check_sampler(settings.sampler, config.diffusion.timesteps, "eval.sampler.")
    require(
        settings.reference == "" or config.data.val != "",
        "eval.reference is given but data.val is not: data.val=CACHE names the captions to sample",
    )
    check_data_val(config)
    require_perceived(config.task, settings.perceptual, "eval.perceptual")
    if config.data.val:
        check_guided(config.task, settings.sampler.guidance, "eval.sampler.guidance")


def check_data_val(config: c.RunConfig) -> None:
    """Evaluations measure what training never sees."""
    require(
        config.data.val == "" or place(config.data.val) not in map(place, (config.data.train, *config.data.mix)),
        f"data.val={config.data.val} is the training cache; captions must be ones that training never sees"
        if config.verb == "train"
        else f"data.val={config.data.val} is the training cache; give pictures that training never sees",
    )


def check_mix(prefix: str, first: str, mix: tuple[str, ...], weights: tuple[float, ...]) -> None:
    """Caches that are mixed, and their weights. prefix: what precedes the keys in messages, such as "data."."""
    urls, shown = [place(url) for url in (first, *mix)], f"{prefix}weights={list(weights)}"
    require(all(url.strip() for url in mix), f"{prefix}mix={list(mix)}: the name of a cache is empty")
    twice = sorted({url.rstrip("/") for url, where in zip((first, *mix), urls) if urls.count(where) > 1})
    require(not twice, f"{prefix}mix: {', '.join(twice)} is given twice; give it once, with a larger weight")
    require(
        not weights or bool(mix),
        f"{shown} without {prefix}mix: name the caches to mix in, {prefix}mix=[CACHE], or leave the weights out",
    )
    require(
        len(weights) in (0, len(urls)),
        f"{shown}: {len(urls)} weights are wanted, the first cache's and one for each of {prefix}mix",
    )


def check_columns(key: str, urls: tuple[str, ...]) -> None:
    """Places of columns. key: that names them."""
    places = [place(url) for url in urls]
    require(all(url.strip() for url in urls), f"{key}={list(urls)}: the name of columns is empty")
    require(len(set(places)) == len(places), f"{key}={list(urls)}: one of them is given twice")


def check_task(task: c.TaskConfig, model: c.ModelConfig) -> None:
    """What the task gives against what the UNet takes, before any process starts."""
    name = f"task={task.name}"
    for gives, key, width, what in (
        (task.makes_context, "context_width", model.context_width, "tokens to attend to"),
        (task.makes_vector, "vector_width", model.vector_width, "a vector beside the timestep"),
    ):
        require(
            not gives or width > 0,
            f"{name} gives the UNet {what}, and model.{key}=0 takes none: set model.{key}"
            + (", for text to the width of the cache's states" if task.takes_text else ""),
        )
        require(
            gives or width == 0,
            f"{name} gives the UNet no {what.removeprefix('a ')}, and model.{key}={width} waits for it: set "
            f"model.{key}=0",
        )
    require(
        task.droppable or task.drop == 0,
        f"task.drop={task.drop:g} with {name}: there is nothing that it could do without"
        + (" (task.text=true drops captions)" if isinstance(task, CaptionedTask) else "")
        + "; set task.drop=0",
    )
    for misfit in task.misfits(model):
        require(False, misfit)


def check_guided(task: c.TaskConfig, guidance: float, key: str) -> None:
    """Guidance wants a model that was trained with its condition and without. key: the scale's in messages."""
    require(
        guidance == 1 or not task.members or (task.droppable and task.drop > 0),
        f"{key}={guidance:g} guides away from what the model gives without its condition, and task={task.name} with "
        f"task.drop={task.drop:g} never learns that: set {key}=1"
        + (", or train with task.drop=0.1" if task.droppable else ""),
    )


def check_model(model: c.ModelConfig) -> None:
    """The UNet's widths, levels and heads."""
    require(
        model.vector_time_ids * 256 <= model.vector_width,
        f"model.vector_time_ids={model.vector_time_ids}: they are 256 channels each, more than model.vector_width="
        f"{model.vector_width}",
    )
    require(len(model.multipliers) > 0, "model.multipliers=[]: one number per level is wanted, such as [1,2,4]")
    require(
        (model.heads > 0) != (model.head_width > 0),
        f"model.heads={model.heads} and model.head_width={model.head_width}: give one of them and set the other to 0",
    )
    factors = [2**level for level in range(len(model.multipliers))]
    check_depth(model, factors)
    for level, (factor, multiplier) in enumerate(zip(factors, model.multipliers)):
        width = model.channels * multiplier
        name = f"level {level} of the UNet has {width} channels (model.channels={model.channels} x {multiplier})"
        require(width % model.norm_groups == 0, f"{name}: not a multiple of model.norm_groups={model.norm_groups}")
        if factor not in model.attention and factor != factors[-1]:  # the middle block always attends
            continue
        require(width % (model.heads or model.head_width) == 0, f"{name}: not a multiple of its heads or head_width")


def check_depth(model: c.ModelConfig, factors: list[int]) -> None:
    """A list of transformer blocks per level: every level with attention needs some. The last is the middle's too.

    factors: the downsampling factor of each level."""
    depth = model.transformer_depth
    if isinstance(depth, int):
        return
    shown = f"model.transformer_depth={list(depth)}"
    require(len(depth) == len(factors), f"{shown}: one number for each of the {len(factors)} model.multipliers")
    for level, (factor, blocks) in enumerate(zip(factors, depth)):
        attends = factor in model.attention or factor == factors[-1]
        require(blocks >= attends, f"{shown}: level {level} attends, so 1 or more is wanted for it")


def check_diffusion(diffusion: c.DiffusionConfig) -> None:
    """Settings of noise levels and objective that exclude each other."""
    prediction, density = diffusion.prediction, diffusion.timestep_density
    require(
        0 < diffusion.beta_start <= diffusion.beta_end < 1,
        f"diffusion.beta_start={diffusion.beta_start:g}, beta_end={diffusion.beta_end:g}: 0 < start <= end < 1",
    )
    require(
        abs(diffusion.timestep_mean) + 7 * diffusion.timestep_std <= 80,
        f"diffusion.timestep_mean={diffusion.timestep_mean:g}, timestep_std={diffusion.timestep_std:g}: seven standard "
        "deviations from the mean must lie within +-80",
    )
    require(
        0 < diffusion.sigma_min < diffusion.sigma_max < math.inf,
        f"diffusion.sigma_min={diffusion.sigma_min:g}, sigma_max={diffusion.sigma_max:g}: 0 < min < max",
    )
    require(
        (density == "log_normal") == (prediction == "edm"),
        f"diffusion.timestep_density={density} with prediction={prediction}: edm draws sigmas, so it takes log_normal "
        "(diffusion=edm sets it), and the others draw timesteps: uniform or logit_normal",
    )
    discrete = prediction not in ("flow", "edm")
    if diffusion.zero_terminal_snr:
        require(
            discrete,
            f"diffusion.zero_terminal_snr=true rescales betas, and prediction={prediction} has none: leave it out",
        )
        require(
            prediction != "epsilon",
            "diffusion.zero_terminal_snr=true with prediction=epsilon: where x_t is noise alone, its noise says "
            "nothing of x_0; set diffusion.prediction=v (diffusion=zero_snr does), or zero_terminal_snr=false",
        )
        require(diffusion.timesteps > 1, "diffusion.zero_terminal_snr=true needs diffusion.timesteps of 2 or more")
    if diffusion.min_snr_gamma:
        require(
            discrete,
            f"diffusion.min_snr_gamma is for epsilon, v and x0; prediction={prediction} weighs noise levels by how "
            "often they are drawn: set min_snr_gamma=0, and timestep_mean and timestep_std",
        )
        require(diffusion.loss == "l2", "diffusion.min_snr_gamma weighs squared errors: set diffusion.loss=l2")
        require(
            not diffusion.zero_terminal_snr,
            "diffusion.min_snr_gamma gives a level without signal the weight 0, so the one where sampling begins would "
            "never be learnt: set min_snr_gamma=0, or zero_terminal_snr=false",
        )


def check_world(optim: c.OptimConfig, world: int, key: str = "optim.batch", ranks: str = "") -> None:
    """The global batch against the number of ranks. Call it again where torchrun or srun decides how many there are.
    key: the batch's in messages. ranks: what is said of the ranks, such as the key that gives their number."""
    require(
        optim.batch % world == 0,
        f"{key}={optim.batch} does not divide among {world} ranks{ranks}; the nearest that does is "
        f"{max(1, round(optim.batch / world)) * world}",
    )
    share = optim.batch // world
    require(
        optim.micro_batch == 0 or share % optim.micro_batch == 0,
        f"optim.micro_batch={optim.micro_batch} does not divide the {share} samples of a rank "
        f"(optim.batch={optim.batch} / {world} ranks)",
    )


def check_sampler(sampler: c.SamplerConfig, timesteps: int, prefix: str) -> None:
    """Steps and guidance of a sampler. prefix: what precedes the keys in messages."""
    require(sampler.steps <= timesteps, f"{prefix}steps={sampler.steps}: at most diffusion.timesteps={timesteps}")
    check_guidance((sampler.guidance,), sampler.guidance_low, sampler.guidance_high, sampler.rescale, prefix)


def check_start(strength: float | None, steps: int) -> None:
    """The share of the denoising steps that are taken where sampling begins from an image; None for all, from noise."""
    require(
        strength is None or int(steps * strength) >= 1,
        f"strength={strength} of {steps} denoising steps is no step: give more steps, or a strength of at least "
        f"{math.ceil(1000 / steps) / 1000:g}",
    )


def check_guidance(scales: tuple[float, ...], low: float, high: float, rescale: float, prefix: str = "") -> None:
    """Guidance scales against the other settings of guidance. prefix: what precedes the keys in messages."""
    require(
        not high or low < high,
        f"{prefix}guidance_low={low:g}, guidance_high={high:g}: low < high, or 0 for no bound",
    )
    others = [name for name, value in (("guidance_low", low), ("guidance_high", high), ("rescale", rescale)) if value]
    require(
        not others or any(scale != 1 for scale in scales),
        f"{prefix}{' and '.join(others)} without guidance: {prefix}guidance=1 is none; give a scale, or leave them out",
    )
