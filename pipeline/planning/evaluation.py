"""The memory of an evaluation inside training, or of `latentmill eval`: what lies there, and what a batch takes.

An evaluation gathers the averaged weights in float32, beside which a network that predicts in bf16 is a copy, and
loads the autoencoder, the text tower with its image tower and the network of features; inside training the training
state stays as well. A batch of images is denoised, then decoded, then looked at, one after the other, so that the
largest of these counts. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import AutoencoderConfig, FeaturesName, FirstStageConfig, RunConfig, SamplerConfig, TrainConfig
from pipeline.data.format.contract import Contract
from pipeline.errors import ConfigError
from pipeline.planning.cost import unet_cost
from pipeline.planning.first_stage import autoencoder_cost, step_cost
from pipeline.planning.fit import cost_of
from pipeline.planning.inference import FP32, StageShape, decode_bytes, denoise_bytes, encode_bytes
from pipeline.planning.memory import BYTES, Precision, state_bytes
from pipeline.planning.perceptual import backbone_of, weights_bytes
from pipeline.planning.plan.networks import FEATURES, Encoders

LATENTS = 5
"""Tensors of the latents' size that a sampler holds beside a prediction: noise, image, x_0 and those of earlier
steps."""
VISION = {  # of an image tower: side of its pictures, width, tokens
    "democlip": (64, 96, 65),
    "clip_b32": (224, 768, 50),
    "clip_l14": (224, 1024, 257),
    "clip_l14_336": (336, 1024, 577),
    "dinov2_s14": (224, 384, 257),
    "dinov2_l14": (224, 1024, 257),
}
INCEPTION_SIDE, INCEPTION_NUMBERS = 299, 147 * 147 * (64 + 64 + 32)
"""Side of the pictures that Inception sees, and the numbers of a picture around its largest layer: a convolution's
input, its output, and the norm's."""
TOWER_TENSORS = 11
"""Tensors of the tokens' size at the peak of a transformer's block: its input, tokens after attention, their norm, and
values of four widths before and after the activation."""


@dataclass(frozen=True)
class Evaluating:
    """Bytes that one rank needs for an evaluation.

    training: of the training state that stays. networks: weights of everything that is loaded. held: what of a batch
    stays while it is worked on. phases: most bytes of activations while a batch is denoised, decoded and looked at.
    batch: the key of its images per batch.
    """

    training: int
    networks: int
    held: int
    phases: Mapping[str, int]
    batch: str = "eval.sampler.batch"

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return self.training + self.networks + self.held + self.phases[self.largest]

    @property
    def beside(self) -> int:
        """Most bytes at once, without the training state."""
        return self.peak - self.training

    def words(self) -> str:
        """The figures in one line, for people."""
        inside = f" beside {self.training / 1e9:.3g} GB of training" if self.training else ""
        return (
            f"an evaluation takes {self.beside / 1e9:.3g} GB at its peak{inside}: {self.networks / 1e9:.3g} GB of "
            f"weights, and {self.phases[self.largest] / 1e9:.3g} GB while a batch is {self.largest}"
        )


def drawn_in(asked: str, gpus: bool) -> Precision:
    """Precision in which images are drawn. asked: eval.precision of a run, or precision of `latentmill eval`; auto is
    bf16 on GPUs (those that have it)."""
    return "bf16" if asked == "bf16" or (asked == "auto" and gpus) else "fp32"


def evaluation_in_training(
    config: RunConfig,
    contract: Contract,
    encoders: Encoders | None,
    *,
    precision: Precision,
    world: int,
    sides: tuple[int, int] = (0, 0),
    drawn: Precision = "fp32",
) -> Evaluating | None:
    """What a rank needs for the evaluations of a run, inside training (eval.where=train) or in a process beside it;
    None of a run that has none.

    contract: of the training cache. encoders: that decode its latents; None where nothing is decoded. precision, world:
    of training. sides: (height, width) of the pictures that an autoencoder is trained on; it is evaluated on whole
    ones. drawn: precision in which images are drawn.
    """
    if not config.data.val:
        return None
    if isinstance(config, AutoencoderConfig):
        width, height = max(contract.buckets, key=lambda size: size[0] * size[1])
        needed = _of_autoencoder(config, height, width)
    else:
        assert isinstance(config, TrainConfig), "no other verb trains"
        if config.task.draws:
            features = config.eval.features if config.eval.reference else None
            needed = sampling_bytes(
                config,
                contract,
                encoders,
                config.eval.sampler,
                features,
                config.eval.perceptual,
                precision=drawn,
                gathered=config.eval.where == "train",
            )
        else:
            needed = _of_classifier(config, contract, world)
    if config.eval.where == "job":
        return needed
    return replace(needed, training=resident_bytes(config, contract, precision, world, sides))


def resident_bytes(
    config: RunConfig, contract: Contract, precision: Precision, world: int, sides: tuple[int, int] = (0, 0)
) -> int:
    """Bytes of a rank's training state between steps, with the frozen weights of an autoencoder's perceptual distance.
    sides: (height, width) of an autoencoder's pictures."""
    stage = config.deepspeed.stage if config.deepspeed.engine == "deepspeed" else 0
    frozen = 0
    if isinstance(config, AutoencoderConfig):
        parameters = step_cost(config.autoencoder, config.gan, 1, *sides).parameters
        averaged = autoencoder_cost(config.autoencoder, 1, *_least(config.autoencoder)).parameters
        if backbone := backbone_of(config.loss.perceptual):
            frozen = weights_bytes(backbone)
    else:
        assert isinstance(config, TrainConfig), "no other verb trains"
        parameters = averaged = cost_of(config, contract, 1).parameters
    state = state_bytes(parameters, precision, stage, world)
    average = state_bytes(averaged, precision, stage, world).average
    averages = (1 + len(config.ema.half_lives) + len(config.ema.widths)) * average
    offloaded = state.masters + state.optimizer if config.deepspeed.offload else 0
    return state.resident - state.average + averages + frozen - offloaded


def sampling_bytes(
    config: TrainConfig,
    contract: Contract,
    encoders: Encoders | None,
    sampler: SamplerConfig,
    features: FeaturesName | None,
    perceptual: str = "none",
    *,
    precision: Precision = "fp32",
    gathered: bool = False,
) -> Evaluating:
    """What sampling and judging a batch of images takes, without any training state.

    features: None = no FID. precision: of the denoiser's weights and activations; samplers, decoder and what judges
    compute in float32. gathered: whether the average stays on the device in float32, beside a copy in bf16, as inside
    training.
    """
    batch, (channels, height, width) = sampler.batch, contract.latent_shape
    element = BYTES[precision]
    rows = batch * (1 if sampler.guidance == 1 else 2)
    tokens, whole = config.task.tokens(contract), cost_of(config, contract, 1)
    model = replace(config.model, in_channels=config.model.in_channels + config.task.channels(contract))
    context = FP32 * batch * tokens * model.context_width
    latents = FP32 * batch * channels * height * width
    cost = unet_cost(model, rows, height, width, tokens)
    # Keys and values of the context are kept for all steps; denoise_bytes counts those of one block.
    cross = [element * 2 * piece.c for part in cost.parts for piece in part.pieces if piece.row == "cross"]
    kept = sum(cross) - max(cross, default=0)
    guided = rows > batch
    denoised = denoise_bytes(model, rows, height, width, tokens, element) + kept + LATENTS * latents
    phases = {"denoised": denoised + guided * context}
    networks = element * whole.parameters
    if gathered and element != FP32:
        networks += FP32 * whole.parameters
    if encoders is not None and encoders.stage is not None:
        shape = shape_of(encoders.stage)
        networks += FP32 * autoencoder_cost(encoders.stage, 1, *_least(encoders.stage)).parameters
        # decode_bytes adds the pictures, which a decoder makes after its peak, when larger tensors are gone.
        pictures = 2 * FP32 * 3 * batch * height * width * contract.downsampling**2
        phases["decoded"] = decode_bytes(shape, batch, height, width) - pictures + 2 * latents
    side_pixels = contract.downsampling * height, contract.downsampling * width
    if encoders is not None and encoders.tower_config:
        networks += tower_bytes(encoders.tower_config)
        phases["scored by CLIP"] = vision_bytes(encoders.tower_config, batch)
    if features is not None:
        networks += round(FP32 * 1e6 * FEATURES[features][1])
        phases["looked at for FID"] = features_bytes(features, batch, *side_pixels)
    if backbone := backbone_of(perceptual):
        networks += weights_bytes(backbone)
    # The batch as it was read, its conditioning and the null one.
    held = context // 2 + context * (1 + guided) if context else 0
    return Evaluating(0, networks, held, phases)


def shape_of(config: FirstStageConfig) -> StageShape:
    """What an autoencoder is made of, for the memory of its predictions."""
    return StageShape(
        widths=tuple(config.channels * multiplier for multiplier in config.multipliers),
        blocks=config.blocks,
        latent_channels=config.latent_channels,
        middle_attention=config.middle_attention,
        attention=tuple(2**level in config.attention for level in range(len(config.multipliers))),
    )


def tower_bytes(described: Mapping[str, Any]) -> int:
    """Bytes of the weights of a text tower with its image tower, as open_clip describes them."""
    text, vision = described.get("text_cfg") or {}, described.get("vision_cfg") or {}
    width, words = int(text.get("width", 512)), int(text.get("vocab_size", 49_408))
    count = int(text.get("layers", 12)) * 12 * width**2 + (words + int(text.get("context_length", 77))) * width
    layers, image_width = vision.get("layers", 12), int(vision.get("width", 768))
    patch = int(vision.get("patch_size") or 16)
    depth = layers if isinstance(layers, int) else 12  # a list is that of a ResNet, which is not larger
    count += depth * 12 * image_width**2 + 3 * patch**2 * image_width
    return FP32 * count


def vision_bytes(described: Mapping[str, Any], batch: int) -> int:
    """Most bytes of activations while an image tower, as open_clip describes it, looks at a batch of pictures."""
    vision = described.get("vision_cfg") or {}
    side, width, patch = (
        int(vision.get("image_size", 224)),
        int(vision.get("width", 768)),
        int(vision.get("patch_size") or 16),
    )
    return _transformer(batch, side, width, (side // patch) ** 2 + 1)


def features_bytes(name: FeaturesName, batch: int, height: int, width: int) -> int:
    """Most bytes of activations while a network of features looks at a batch of pictures of height x width."""
    if name in VISION:
        return _transformer(batch, *VISION[name])
    pictures = (FP32 + 1) * 3 * height * width  # as they come, and in float32 until the network has ended
    return batch * (pictures + FP32 * (3 * INCEPTION_SIDE**2 + INCEPTION_NUMBERS))


def _transformer(batch: int, side: int, width: int, tokens: int) -> int:
    return batch * (FP32 * (TOWER_TENSORS * tokens * width + 2 * 3 * side**2) + 3 * side**2)


def _of_autoencoder(config: AutoencoderConfig, height: int, width: int) -> Evaluating:
    """Reconstructing a batch of pictures, and looking at both."""
    stage, batch = config.autoencoder, config.eval.batch
    f = stage.downsampling
    h, w = math.ceil(height / f), math.ceil(width / f)
    shape = shape_of(stage)
    networks = FP32 * autoencoder_cost(stage, 1, *_least(stage)).parameters
    pictures = FP32 * 3 * batch * height * width
    phases = {
        "encoded": encode_bytes(shape, batch, h, w) + pictures,
        "decoded": decode_bytes(shape, batch, h, w) + pictures,
    }
    if config.eval.reference:
        networks += round(FP32 * 1e6 * FEATURES[config.eval.features][1])
        phases["looked at for FID"] = features_bytes(config.eval.features, batch, height, width)
    if backbone := backbone_of(config.eval.perceptual):
        networks += weights_bytes(backbone)
    return Evaluating(0, networks, pictures, phases, batch="eval.batch")


def _of_classifier(config: TrainConfig, contract: Contract, world: int) -> Evaluating:
    """Classifying a batch of noisy latents: what a block of the network holds of them."""
    batch = config.optim.micro_batch or max(1, config.optim.batch // world)
    cost = cost_of(config, contract, batch)
    largest = max(sum(piece.x + 4 * piece.h for piece in part.pieces) for part in cost.parts)
    phases = {"classified": FP32 * (largest + cost.inputs)}
    return Evaluating(0, FP32 * cost.parameters, 0, phases, batch="optim.micro_batch")


def _least(config: FirstStageConfig) -> tuple[int, int]:
    """The smallest picture that an autoencoder takes."""
    return config.downsampling, config.downsampling


def require_evaluation(needed: Evaluating, gigabytes: float) -> None:
    """Raise ConfigError when an evaluation needs more memory than a GPU with `gigabytes` GB (1e9 bytes) has."""
    if needed.peak > gigabytes * 1e9:
        remedy = "set eval.where=job, whose process holds no training state" if needed.training else "take a larger GPU"
        raise ConfigError(
            f"{needed.words()}, and cluster.gpu_memory_gb={gigabytes:g}: lower {needed.batch}, or {remedy}"
        )
