"""Keys of `latentmill train` that a classifier's run has no use for, each refused with one line."""

from __future__ import annotations

from pipeline import config as c
from pipeline.config.check.groups import check_data_val
from pipeline.config.tasks.found import require_perceived
from pipeline.config.values.bounds import require


def check_classifier(config: c.TrainConfig) -> None:
    """What says how a denoiser learns or draws. eval.sampler's sampler and steps, and eval.grid, are passed over: the
    packaged choices of `eval` set them."""
    task, diffusion, settings = f"task={config.task.name}", config.diffusion, config.eval
    require(config.init == "", f"init={config.init} with {task}: it begins with random weights; leave init out")
    require(
        diffusion.loss == "l2" and diffusion.min_snr_gamma == 0,
        f"diffusion.loss={diffusion.loss} and diffusion.min_snr_gamma={diffusion.min_snr_gamma:g} are of a denoiser's "
        f"loss, and {task} minimizes cross-entropy: set diffusion.loss=l2 diffusion.min_snr_gamma=0, which change no "
        "noise",
    )
    default = c.SamplerConfig()
    for key in ("guidance", "guidance_low", "guidance_high", "rescale"):
        value = getattr(settings.sampler, key)
        require(
            value == getattr(default, key),
            f"eval.sampler.{key}={value:g} with {task}: it draws no pictures that could be guided; leave it out",
        )
    require(
        settings.reference == "",
        f"eval.reference={settings.reference} with {task}: it draws no pictures, so it has no FID; leave it out",
    )
    require_perceived(config.task, settings.perceptual, "eval.perceptual")
    check_data_val(config)
