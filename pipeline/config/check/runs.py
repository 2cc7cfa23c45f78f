"""Contradictions in the configuration of a run that trains a network, whichever it is."""

from __future__ import annotations

from pipeline import config as c
from pipeline.config.check.classifier import check_classifier
from pipeline.config.check.first_stage import check_first_stage
from pipeline.config.check.groups import (
    check_checkpoint,
    check_columns,
    check_diffusion,
    check_ema,
    check_evaluation,
    check_mix,
    check_model,
    check_task,
    check_world,
)
from pipeline.config.values.bounds import require
from pipeline.config.values.captions import require_choice
from pipeline.config.values.places import place
from pipeline.config.values.steps import profiled_steps


def check_run(config: c.RunConfig) -> None:
    """What every run that trains has."""
    check_mix("data.", config.data.train, config.data.mix, config.data.weights)
    check_columns("data.columns", config.data.columns)
    check_world(config.optim, config.launch.processes)
    require(
        not config.optim.decay_samples or config.optim.decay == "cosine",
        f"optim.decay_samples={config.optim.decay_samples} with optim.decay={config.optim.decay}: it ends a decay, so "
        "set optim.decay=cosine, or leave it out",
    )
    check_ema(config.ema)
    require(
        config.eval.cluster == "" or config.eval.where == "job",
        f"eval.cluster={config.eval.cluster} is for eval.where=job: add that, or leave eval.cluster out",
    )
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
        not engine.offload or (engine.stage >= 1 and engine.engine == "deepspeed"),
        "deepspeed.offload=true needs ZeRO stage >= 1 (deepspeed=zero1, zero2 or zero3)",
    )
    profiled, steps = profiled_steps(config.tracking.profile), -(-config.samples // config.optim.batch)
    require(
        profiled is None or profiled[0] <= steps,
        f"tracking.profile={config.tracking.profile}: the run ends with step {steps}, so name earlier ones",
    )
    limit, longest = config.step_limit_s, config.watchdog_s
    require(
        limit <= longest or longest == 0,
        f"step_limit_s={limit:g} with watchdog_s={longest:g}: it is the time of steps after the first, so give no more "
        "than that of the first, watchdog_s",
    )


def _not_itself(init: str, run: str) -> None:
    """Weights to begin with are not the run's own."""
    require(
        init == "" or place(init) != place(run),
        f"init={init} is the run itself: leave init out to go on with it, or give another run=",
    )


def check_train(config: c.TrainConfig) -> None:
    """latentmill train."""
    check_run(config)
    _not_itself(config.init, config.run)
    check_model(config.model)
    check_task(config.task, config.model)
    check_diffusion(config.diffusion)
    check_checkpoint(config)
    engine = config.deepspeed
    require(
        not config.compile or engine.stage <= 2 or engine.engine == "torch",
        "compile=true goes with ZeRO stage 2 at most: stage 3 gathers weights inside of what would be compiled",
    )
    require_choice(config.eval.caption, "eval.caption")
    (check_evaluation if config.task.draws else check_classifier)(config)


def check_autoencoder(config: c.AutoencoderConfig) -> None:
    """latentmill autoencoder."""
    check_run(config)
    require(
        config.data.columns == (),
        f"data.columns={list(config.data.columns)}: an autoencoder reads pixels alone, so leave it out",
    )
    _not_itself(config.init, config.run)
    check_first_stage(config)
