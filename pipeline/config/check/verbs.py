"""Contradictions between fields of a configuration, each refused with one line that says how to mend it."""

from __future__ import annotations

import re
from typing import Any

from pipeline import config as c
from pipeline.config.check.groups import (
    check_average,
    check_checkpoint,
    check_diffusion,
    check_ema,
    check_evaluation,
    check_guard,
    check_guidance,
    check_mix,
    check_model,
    check_optim,
    check_sampler,
)
from pipeline.config.values.bounds import at_least, fraction, require, some_text
from pipeline.config.values.rules import parse_rules
from pipeline.config.values.times import limit_seconds


def check(config: Any) -> None:
    """Check one verb's configuration. Raises ConfigError for the first contradiction."""
    CHECKS[type(config)](config)


def check_train(config: c.TrainConfig) -> None:
    """latentmill train."""
    some_text("run", config.run, "a folder or s3:// URL for the run")
    some_text("data.train", config.data.train, "the cache that `latentmill encode` wrote")
    check_mix("data.", config.data.train, config.data.mix, config.data.weights)
    at_least(1, samples=config.samples)
    at_least(0, seed=config.seed)
    require(
        config.init == "" or config.init.rstrip("/") != config.run.rstrip("/"),
        f"init={config.init} is the run itself: leave init out to go on with it, or give another run=",
    )
    check_model(config.model, config.task)
    require(config.model.activation_gb >= 0, f"model.activation_gb={config.model.activation_gb:g}: 0 or more is wanted")
    check_optim(config.optim, config.launch.processes)
    fraction("task.drop", config.task.drop)
    check_diffusion(config.diffusion)
    check_ema(config.ema)
    at_least(1, **{"launch.processes": config.launch.processes, "data.workers": config.data.workers})
    at_least(0, **{"launch.threads": config.launch.threads, "data.prefetch": config.data.prefetch})
    check_checkpoint(config)
    check_guard(config.guard)
    for name in ("spike", "stall_s", "peak_tflops"):
        value = getattr(config.tracking, name)
        require(value >= 0, f"tracking.{name}={value:g}: 0 or more is wanted (0 = off)")
    require(
        config.eval.cluster == "" or config.eval.where == "job",
        f"eval.cluster={config.eval.cluster} is for eval.where=job: add that, or leave eval.cluster out",
    )
    require(config.data.memory_gb > 0, f"data.memory_gb={config.data.memory_gb:g}: a number above 0 is wanted")
    require(config.data.cache_gb > 0, f"data.cache_gb={config.data.cache_gb:g}: a number above 0 is wanted")
    engine = config.deepspeed
    require(
        engine.engine != "torch" or config.launch.processes == 1,
        f"deepspeed.engine=torch runs on one process: launch.processes=1 (it is {config.launch.processes})",
    )
    require(
        config.precision != "bf16" or engine.stage >= 1 or engine.engine == "torch",
        "precision=bf16 needs ZeRO stage >= 1 (deepspeed=zero1, zero2 or zero3): stage 0 loses fp32 master weights",
    )
    require(
        not config.compile or engine.stage <= 2 or engine.engine == "torch",
        "compile=true goes with ZeRO stage 2 at most: stage 3 gathers weights inside of what would be compiled",
    )
    require(
        not engine.offload or (engine.stage >= 1 and engine.engine == "deepspeed"),
        "deepspeed.offload=true needs ZeRO stage >= 1 (deepspeed=zero1, zero2 or zero3)",
    )
    check_evaluation(config)


def check_synth(config: c.SynthConfig) -> None:
    """latentmill synth."""
    some_text("dest", config.dest, "a folder or s3:// URL for the shards")
    at_least(1, images=config.images, shard_size=config.shard_size)
    at_least(0, seed=config.seed)


def check_fetch(config: c.FetchConfig) -> None:
    """latentmill fetch."""
    some_text("dest", config.dest, "a folder or s3:// URL for the encoders")


def check_encode(config: c.EncodeConfig) -> None:
    """latentmill encode."""
    some_text("source", config.source, "the input shards, such as 'shapes/{00000..00009}.tar'")
    some_text("dest", config.dest, "a folder or s3:// URL for the cache")
    require(len(config.resolution) > 0, "resolution=[]: one side in pixels or more is wanted, such as [256,512]")
    require(
        len(set(config.resolution)) == len(config.resolution),
        f"resolution={list(config.resolution)}: one of them is given twice",
    )
    at_least(1, resolution=min(config.resolution), batch=config.batch)
    at_least(0, workers=config.workers, buckets=config.buckets, seed=config.seed)
    at_least(0, **{"launch.threads": config.launch.threads})
    require(config.bucket_aspect >= 1, f"bucket_aspect={config.bucket_aspect:g}: 1 or more is wanted")
    require(config.claim_seconds > 0, f"claim_seconds={config.claim_seconds:g}: a number above 0 is wanted")
    require(not (config.finalize and config.dry_run), "finalize=true and dry_run=true: choose one")
    filters = config.filters
    at_least(0, **{f"filters.{name}": getattr(filters, name) for name in ("min_side", "min_caption", "max_caption")})
    require(
        filters.max_aspect == 0 or filters.max_aspect >= 1,
        f"filters.max_aspect={filters.max_aspect:g}: 1 or more is wanted, or 0 for any",
    )
    parse_rules(filters.keep)
    at_least(1, **{"launch.processes": config.launch.processes, "encoders.text_length": config.encoders.text_length})
    at_least(0, **{"encoders.text_pad": config.encoders.text_pad})
    fraction("max_rejects", config.max_rejects)
    for name in ("member_bytes", "members", "pixels", "caption_bytes"):
        at_least(1, **{f"limits.{name}": getattr(config.limits, name)})
    _caption_key(config.caption_key)
    require(
        len(set(config.conditions)) == len(config.conditions),
        f"conditions=[{','.join(config.conditions)}]: one of them is given twice",
    )


def check_index(config: c.IndexConfig) -> None:
    """latentmill index."""
    some_text("dataset", config.dataset, "the folder or s3:// URL below which the tars lie")
    some_text("source", config.source, "the tars, such as 'DATASET/*.tar'")
    for name, value in {"moments_member": config.moments_member, "text_member": config.text_member}.items():
        require(
            re.fullmatch(r"([^/]*\.)?npy", value) is not None,
            f"{name}={value}: a .npy file is wanted, as named after the key (moments.npy); pickles are never opened",
        )
    require(config.moments_member != config.text_member, f"text_member={config.text_member} is moments_member")
    _caption_key(config.caption_key)
    at_least(1, channels=config.channels, downsampling=config.downsampling)
    require(config.scale > 0, f"scale={config.scale:g}: a number above 0 is wanted")
    fraction("max_rejects", config.max_rejects)
    for name in ("member_bytes", "members", "caption_bytes"):
        at_least(1, **{f"limits.{name}": getattr(config.limits, name)})


def check_verify(config: c.VerifyConfig) -> None:
    """latentmill verify."""
    some_text("dataset", config.dataset, "the cache")
    at_least(0, samples=config.samples)


def check_reference(config: c.ReferenceConfig) -> None:
    """latentmill reference."""
    some_text("dataset", config.dataset, "a cache")
    at_least(0, images=config.images)


def check_data(config: c.DataVerbConfig) -> None:
    """latentmill data."""
    require(config.dataset + config.run != "", "dataset is missing: give dataset=CACHE, or run=RUN for a run's own")
    if config.dataset:
        check_mix("", config.dataset, config.mix, () if config.run else config.weights)
    at_least(1, world=config.world, nodes=config.nodes, batches=config.batches)
    at_least(0, batch=config.batch)
    at_least(-1, at=config.at, seed=config.seed)
    require(config.world % config.nodes == 0, f"world={config.world} does not divide among nodes={config.nodes}")
    require(config.images_per_s >= 0, f"images_per_s={config.images_per_s:g}: 0 or more is wanted")


def check_eval(config: c.EvalRunConfig) -> None:
    """latentmill eval."""
    check_average(config.weights, config.ema)
    if config.from_card == "":
        some_text("run", config.run, "a run directory")
    for name, example in (("guidance", "[1,2,3]"), ("sampler", "[ddim,dpmpp_2m]"), ("steps", "[10,20]")):
        values = getattr(config, name)
        require(len(values) > 0, f"{name}=[]: one or more is wanted, such as {example}")
        require(len(set(values)) == len(values), f"{name}=[{','.join(map(str, values))}]: one is given twice")
    at_least(2, images=config.images)
    at_least(1, steps=min(config.steps), batch=config.batch)
    at_least(0, at=config.at, seed=config.seed)
    check_guidance(config.guidance, config.guidance_low, config.guidance_high, config.rescale)


def check_sample(config: c.SampleConfig) -> None:
    """latentmill sample."""
    check_average(config.weights, config.ema)
    some_text("run", config.run, "a run directory")
    some_text("dest", config.dest, "the picture to write")
    at_least(1, n=config.n)
    at_least(0, at=config.at, seed=config.seed)
    require(config.guidance >= 0, f"guidance={config.guidance:g}: 0 or more is wanted (1 = none)")
    check_sampler(config.sampler, 1000, "sampler.")
    guidance = config.guidance or config.sampler.guidance
    require(
        config.negative == "" or guidance != 1,
        "negative is given but guidance=1 leads away from nothing: give a guidance scale, or leave negative out",
    )
    for size in config.size:
        require(
            re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) is not None,
            f"size={size}: width and height in pixels are wanted, as 512x768",
        )
    require(
        len(config.size) in (0, 1, max(len(config.prompt), 1)),
        f"size: {len(config.size)} sizes for {max(len(config.prompt), 1)} captions; one, or one for each",
    )


def check_export(config: c.ExportConfig) -> None:
    """latentmill export."""
    check_average(config.weights, config.ema)
    some_text("run", config.run, "a run directory")
    some_text("dest", config.dest, "a folder, or for format=compvis a .safetensors or .ckpt file")
    at_least(0, at=config.at)
    require(
        config.format != "compvis" or config.dest.endswith((".safetensors", ".ckpt")),
        f"dest={config.dest}: format=compvis writes one file whose name ends in .safetensors or .ckpt",
    )
    require(
        config.format != "compvis" or config.sampler == "ddim",
        f"sampler={config.sampler}: a file of format=compvis holds no scheduler; leave sampler out",
    )


def check_demo(config: c.DemoConfig) -> None:
    """latentmill demo."""
    some_text("dest", config.dest, "a folder")
    require("://" not in config.dest, f"dest={config.dest}: the demo works in a folder of this machine")
    at_least(1, images=config.images, processes=config.processes)
    at_least(0, samples=config.samples, seed=config.seed)


def check_submit(config: c.SubmitConfig) -> None:
    """latentmill submit."""
    cluster = config.cluster
    for name in ("nodes", "tasks", "processes", "cpus"):
        at_least(1, **{f"cluster.{name}": getattr(cluster, name)})
    for name in ("concurrent", "gpus", "signal"):
        at_least(0, **{f"cluster.{name}": getattr(cluster, name)})
    memory = cluster.gpu_memory_gb
    require(memory >= 0, f"cluster.gpu_memory_gb={memory:g}: 0 (not known) or more is wanted")
    if cluster.time:
        seconds = limit_seconds(cluster.time)
        require(
            seconds is not None,
            f"cluster.time={cluster.time}: a limit such as 90 (minutes), 04:00:00 or 2-12:00:00 is wanted",
        )
        require(
            cluster.signal < (seconds or 0),
            f"cluster.signal={cluster.signal}: that many seconds before the end of cluster.time={cluster.time}",
        )
    require(
        re.fullmatch(r"(\d+[KMGTkmgt]?)?", cluster.mem) is not None,
        f"cluster.mem={cluster.mem}: a number with K, M, G or T is wanted, such as 64G",
    )
    some_text("cluster.logs", cluster.logs, "a folder that the compute nodes see")
    require("://" not in cluster.logs, f"cluster.logs={cluster.logs}: Slurm writes logs to a folder, not to a URL")
    require("\\" not in cluster.logs, f"cluster.logs={cluster.logs}: Slurm takes no backslash in a log's path")
    for option in cluster.options:
        require(
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


def _caption_key(value: str) -> None:
    require(
        value == "txt" or (value.startswith("json:") and len(value) > 5),
        f"caption_key={value}: txt, or json:KEY for a key of the .json member",
    )
