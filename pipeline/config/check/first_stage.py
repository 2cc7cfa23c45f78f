"""Contradictions between the groups of an autoencoder's run, each refused with one line that says how to resolve it."""

from __future__ import annotations

from pipeline import config as c
from pipeline.config.check.groups import check_checkpoint, check_data_val
from pipeline.config.values.bounds import require
from pipeline.config.values.distances import require_distance

MOST_LEVELS = 10
"""Levels of the deepest autoencoder that is taken."""
SMALLEST_PERCEIVED = 32
"""Sides in pixels of the smallest pictures that the perceptual distance compares."""


def check_first_stage(config: c.AutoencoderConfig) -> None:
    """Architecture, losses, discriminator and evaluation."""
    check_architecture(config.autoencoder)
    stage, loss, gan = config.autoencoder, config.loss, config.gan
    engine = config.deepspeed
    require(
        engine.stage <= 2 or engine.engine == "torch",
        "deepspeed.stage=3 cuts the weights of a discriminator that the autoencoder's loss reads whole: set "
        "deepspeed=zero2",
    )
    require_distance(loss.perceptual, "loss.perceptual")
    require(loss.l1 + loss.l2 > 0, "loss.l1=0 and loss.l2=0: nothing would be reconstructed; give one of them a weight")
    require(
        loss.restart == 0 or stage.regularizer == "vq",
        f"loss.restart={loss.restart} with autoencoder.regularizer={stage.regularizer}: it restarts entries of a "
        "codebook, so leave it out",
    )
    for name, value in (("after", gan.after), ("warmup", gan.warmup), ("ramp", gan.ramp)):
        require(
            value == 0 or gan.weight > 0,
            f"gan.{name}={value} with gan.weight=0: there is no discriminator; give gan.weight, such as 0.5",
        )
    require(
        gan.warmup <= gan.after,
        f"gan.warmup={gan.warmup} with gan.after={gan.after}: the discriminator cannot train for more samples than "
        "there are before; raise gan.after",
    )
    require(
        config.crop % stage.downsampling == 0,
        f"crop={config.crop} is not a multiple of {stage.downsampling}, by which autoencoder.multipliers (levels: "
        f"{len(stage.multipliers)}) divides a side",
    )
    if config.crop:
        require_room(config, config.crop, "crop")
    settings = config.eval
    require(
        settings.reference == "" or config.data.val != "",
        "eval.reference is given but data.val is not: data.val=CACHE names the pictures to reconstruct",
    )
    check_data_val(config)
    require_distance(settings.perceptual, "eval.perceptual")
    check_checkpoint(config)


def check_reconstruct(config: c.ReconstructConfig) -> None:
    """latentmill reconstruct."""
    require_distance(config.perceptual, "perceptual")
    require(
        config.features_weights == "" or config.reference != "",
        "features_weights is given without reference: rFID compares with statistics of real images, so give both",
    )


def check_architecture(stage: c.FirstStageConfig) -> None:
    """An autoencoder that can be built."""
    levels = len(stage.multipliers)
    require(
        levels in range(1, MOST_LEVELS + 1),
        f"autoencoder.multipliers={list(stage.multipliers)}: 1 to {MOST_LEVELS} levels are wanted",
    )
    widths = [stage.channels * factor for factor in stage.multipliers]
    for width in widths:
        require(
            width % stage.norm_groups == 0,
            f"autoencoder.norm_groups={stage.norm_groups} does not divide a level's width of {width} (channels="
            f"{stage.channels}, multipliers={list(stage.multipliers)})",
        )
    factors = [2**level for level in range(levels)]
    for factor in stage.attention:
        require(
            factor in factors,
            f"autoencoder.attention={list(stage.attention)}: no level has {factor} pixels a position; there are "
            f"{', '.join(map(str, factors))}",
        )


def require_room(config: c.AutoencoderConfig, side: int, key: str) -> None:
    """Refuse pictures whose smaller `side` in pixels is too small for the losses. key: what gives that side."""
    require(
        config.loss.perceptual == "none" or side >= SMALLEST_PERCEIVED,
        f"{key}={side} with loss.perceptual={config.loss.perceptual}: it compares pictures of {SMALLEST_PERCEIVED} "
        "pixels or more a side; set loss.perceptual=none",
    )
    least = smallest_judged(config.gan.layers)
    require(
        config.gan.weight == 0 or side >= least,
        f"{key}={side} with gan.layers={config.gan.layers}: its discriminator judges pictures of {least} pixels or "
        "more a side; lower gan.layers",
    )


def smallest_judged(layers: int) -> int:
    """Side in pixels of the smallest picture that a patch discriminator has a judgement of: 4 x 4 kernels with a margin
    of 1, of which `layers` halve the picture and two more do not."""
    side = 1 + 1 + 1  # the two last lose a position each
    for _ in range(layers):
        side *= 2
    return side
