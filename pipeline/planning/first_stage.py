"""What an autoencoder and a training step with its discriminator cost, by arithmetic; imports no torch.

Parts have the names of modules of models/first_stage/trainable.py, so that the memory model (memory.py) and tests find
them there. A step goes through the autoencoder, then through the discriminator for the autoencoder's loss ("judge",
whose weights have no gradient), then through it for its own loss, with pictures and reconstructions together.

The losses' own arithmetic is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from pipeline.config import AutoencoderConfig, FirstStageConfig, GanConfig
from pipeline.errors import ShapeError
from pipeline.planning.cost import Cost, Kind, Layer, Part, Piece
from pipeline.planning.fit import Fit
from pipeline.planning.memory import Precision, peak_bytes, state_bytes
from pipeline.planning.perceptual import Backbone, backbone_of, distance_parts, weights_bytes

WIDEST = 8
"""Width of a discriminator's widest layers, as a multiple of the first one's."""


@dataclass(frozen=True, kw_only=True)
class Special(Layer):
    """A layer whose backward pass is not that of weights and input."""

    backward: int = 0
    """FLOPs of its backward pass."""

    @property
    def backward_flops(self) -> int:
        return self.backward


def autoencoder_cost(config: FirstStageConfig, batch: int, height: int, width: int) -> Cost:
    """The autoencoder of `config` on pictures (batch, 3, height, width). Raises ShapeError for sides that are no
    multiples of f."""
    f = config.downsampling
    if height % f or width % f:
        raise ShapeError(f"pictures of {height}x{width}: height and width must be multiples of {f}")
    return Cost(tuple(_Walk(config, batch, height, width).network()), _given(batch, height, width))


def step_cost(
    config: FirstStageConfig,
    gan: GanConfig,
    batch: int,
    height: int,
    width: int,
    *,
    perceptual: Backbone | None = None,
    generator: bool = True,
    discriminator: bool = True,
) -> Cost:
    """A training step of the autoencoder, and of the discriminator if gan.weight > 0.

    perceptual: backbone of the perceptual distance. generator: whether the autoencoder's loss has the discriminator's
    judgement, whose weight is found from gradients at the last layer: each loss is walked through once, and the last
    convolution's weight has two gradients more. discriminator: whether that is trained.
    """
    cost = autoencoder_cost(config, batch, height, width)
    parts = list(cost.parts)
    if perceptual:
        parts += distance_parts(perceptual, batch, height, width)
    if gan.weight > 0:
        if generator:
            parts += _discriminator(gan, batch, height, width, trained=False)
            last = cost.parts[-1].layers[-1]
            twice = Special(name="conv", kind="conv", flops=0, backward=2 * last.flops)
            parts.append(Part("weight", (Piece(row="none", layers=(twice,)),)))
        trained = list(_discriminator(gan, 2 * batch, height, width, trained=True))
        if not discriminator:
            trained = [Part(part.name, tuple(_idle(piece) for piece in part.pieces)) for part in trained]
        parts += trained
    return Cost(tuple(parts), cost.inputs)


@cache
def step_flops(
    config: FirstStageConfig,
    gan: GanConfig,
    height: int,
    width: int,
    *,
    perceptual: Backbone | None = None,
    generator: bool,
    discriminator: bool,
) -> int:
    """FLOPs of a training step for one picture of this size, as training counts them
    (training/objectives/first_stage.py)."""
    cost = step_cost(
        config, gan, 1, height, width, perceptual=perceptual, generator=generator, discriminator=discriminator
    )
    return sum(cost.training_flops().values())


def fit_autoencoder(config: AutoencoderConfig, height: int, width: int, world: int, precision: Precision) -> Fit:
    """What each of `world` ranks needs for a training step on pictures of this size, discriminator included."""
    share = config.optim.batch // world
    micro = config.optim.micro_batch or share
    backbone = backbone_of(config.loss.perceptual)
    cost = step_cost(config.autoencoder, config.gan, micro, height, width, perceptual=backbone)
    stage = config.deepspeed.stage if config.deepspeed.engine == "deepspeed" else 0
    state = state_bytes(cost.parameters, precision, stage, world)
    averaged = autoencoder_cost(config.autoencoder, 1, height, width).parameters
    average = state_bytes(averaged, precision, stage, world).average
    peak = peak_bytes(cost, precision, stage=stage, ranks=world, micro_batches=max(1, share // micro), average=False)
    beside = (1 + len(config.ema.half_lives) + len(config.ema.widths)) * average
    beside += weights_bytes(backbone) if backbone else 0
    beside -= state.masters + state.optimizer if config.deepspeed.offload else 0
    return Fit(cost.parameters, state.stepping - state.average + beside, peak + beside, recomputed=0)


def _given(batch: int, height: int, width: int) -> int:
    """Numbers that the losses hold through the backward pass: pictures, reconstructions and their difference."""
    return 3 * batch * 3 * height * width


@dataclass(frozen=True)
class _Walk:
    """Goes through an autoencoder in the order in which it runs."""

    config: FirstStageConfig
    batch: int
    height: int  # of a picture
    width: int

    def network(self) -> Iterator[Part]:
        config, latent = self.config, self.config.latent_channels
        moments = 2 * latent if config.regularizer == "kl" else latent
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        rows = [self._positions(level) for level in range(len(widths))]

        yield _conv_part("model.encoder.conv_in", rows[0], 9, 3, widths[0], input_gradient=False)
        width = widths[0]
        for level, level_width in enumerate(widths):
            name = f"model.encoder.down_blocks.{level}"
            for i in range(config.blocks):
                yield from self._block(name, i, rows[level], level, width, level_width)
                width = level_width
            if level < len(widths) - 1:
                conv = conv_layer("conv", rows[level + 1], 9, width, width)
                padded = self._positions(level, margin=1) * width
                piece = Piece(row="pad_down", layers=(conv,), x=padded, h=rows[level + 1] * width)
                yield Part(f"{name}.downsamplers.0", (piece,))
        yield from self._middle("model.encoder", rows[-1], width)
        yield self._out("model.encoder.conv_out", rows[-1], width, moments)
        yield _conv_part("model.quant_conv", rows[-1], 1, moments, moments)
        if config.regularizer == "vq":
            size = config.codes * latent
            distances = Special(name="distances", kind="linear", flops=2 * rows[-1] * size, parameters=size)
            yield Part("model.quantize", (Piece(row="none", layers=(distances,)),))
        yield _conv_part("model.post_quant_conv", rows[-1], 1, latent, latent)
        yield _conv_part("model.decoder.conv_in", rows[-1], 9, latent, width)
        yield from self._middle("model.decoder", rows[-1], width)
        for i, (level, level_width) in enumerate(reversed(list(enumerate(widths)))):
            name = f"model.decoder.up_blocks.{i}"
            for j in range(config.blocks + 1):
                yield from self._block(name, j, rows[level], level, width, level_width)
                width = level_width
            if level > 0:
                yield Part(f"{name}.upsamplers.0", (self._upsample(level, width),))
        yield self._out("model.decoder.conv_out", rows[0], width, 3)

    def _positions(self, level: int, margin: int = 0) -> int:
        """Positions of the batch's images at a level, with rows and columns beyond them."""
        return self.batch * (self.height // 2**level + margin) * (self.width // 2**level + margin)

    def _upsample(self, level: int, width: int) -> Piece:
        """Nearest neighbours and a 3x3 convolution, which run as a 2x2 convolution to four times the channels."""
        folded = 4 * width * 4 * width
        weights = 9 * width**2 + width
        conv = Layer(
            name="conv",
            kind="conv",
            flops=2 * self._positions(level, margin=1) * folded,
            parameters=weights,
            inputs=4 * width,
            outputs=4 * width,
        )
        kept = self._positions(level) * width + folded
        return Piece(row="folded_up", layers=(conv,), x=kept, h=4 * self._positions(level) * width)

    def _middle(self, prefix: str, rows: int, width: int) -> Iterator[Part]:
        yield _res(f"{prefix}.mid_block.resnets.0", rows, width, width)
        if self.config.middle_attention:
            yield self._attention(f"{prefix}.mid_block.attentions.0", rows, width)
        yield _res(f"{prefix}.mid_block.resnets.1", rows, width, width)

    def _block(self, prefix: str, i: int, rows: int, level: int, in_width: int, width: int) -> Iterator[Part]:
        yield _res(f"{prefix}.resnets.{i}", rows, in_width, width)
        if 2**level in self.config.attention:
            yield self._attention(f"{prefix}.attentions.{i}", rows, width)

    def _attention(self, name: str, rows: int, width: int) -> Part:
        """Attention of a picture's positions to each other, in one head."""
        names = ("to_q", "to_k", "to_v", "to_out.0")
        q, k, v, out = (_layer(one, "linear", rows, width, width) for one in names)
        keys = rows // self.batch
        products = Layer(name="products", kind="attention", flops=4 * rows * keys * width, inputs=keys, outputs=width)
        size = rows * width
        layers = (q, k, v, products, out)
        return Part(name, (Piece(row="pixel", layers=layers, norms=2 * width, x=size, h=size, rows=rows, heads=rows),))

    def _out(self, name: str, rows: int, width: int, channels: int) -> Part:
        """The last norm and convolution of a half."""
        conv = conv_layer("conv", rows, 9, width, channels)
        return Part(name, (Piece(row="out", layers=(conv,), norms=2 * width, x=rows * width, h=rows * channels),))


def _res(name: str, rows: int, in_width: int, width: int) -> Part:
    layers = [conv_layer("conv1", rows, 9, in_width, width), conv_layer("conv2", rows, 9, width, width)]
    if in_width != width:
        layers.append(conv_layer("conv_shortcut", rows, 1, in_width, width))
    norms = 2 * (in_width + width)
    return Part(name, (Piece(row="res", layers=tuple(layers), norms=norms, x=rows * in_width, h=rows * width),))


def _conv_part(name: str, rows: int, taps: int, in_width: int, width: int, *, input_gradient: bool = True) -> Part:
    """A convolution by itself."""
    conv = conv_layer("", rows, taps, in_width, width, input_gradient=input_gradient)
    return Part(name, (Piece(row="conv_in", layers=(conv,), x=rows * in_width, h=rows * width),))


def _discriminator(gan: GanConfig, batch: int, height: int, width: int, *, trained: bool) -> Iterator[Part]:
    """A pass of the patch discriminator. trained: whether its weights have gradients, and pictures have none."""
    prefix = "discriminator" if trained else "judge"
    widths = [3, *(gan.channels * min(2**layer, WIDEST) for layer in range(gan.layers + 1)), 1]
    for i, (in_width, out_width) in enumerate(pairwise(widths)):
        before, halves, last = batch * height * width, i < gan.layers, i == gan.layers + 1
        height, width = (height // 2, width // 2) if halves else (height - 1, width - 1)
        rows = batch * height * width
        conv = conv_layer("conv", rows, 16, in_width, out_width, input_gradient=i > 0)
        normed = 0 < i <= gan.layers
        if not trained:
            conv = Special(
                name="conv",
                kind="conv",
                flops=conv.flops,
                backward=conv.flops,
                inputs=conv.inputs,
                outputs=conv.outputs,
            )
        row = "judge" if normed else "judge_end"
        norms = 2 * out_width if normed and trained else 0
        piece = Piece(row=row, layers=(conv,), norms=norms, x=before * in_width, h=rows * out_width)
        yield Part(f"{prefix}.conv_out" if last else f"{prefix}.convs.{i}", (piece,))


def _idle(piece: Piece) -> Piece:
    """A piece that has its parameters and does not run."""
    layers = tuple(Special(name=one.name, kind=one.kind, flops=0, parameters=one.parameters) for one in piece.layers)
    return Piece(row="none", layers=layers, norms=piece.norms)


def conv_layer(name: str, rows: int, taps: int, in_width: int, width: int, *, input_gradient: bool = True) -> Layer:
    """A convolution with a bias. rows: positions of its output in the batch. taps: positions of its kernel."""
    return _layer(name, "conv", rows, taps * in_width, width, input_gradient)


def _layer(name: str, kind: Kind, rows: int, inputs: int, width: int, input_gradient: bool = True) -> Layer:
    """A layer whose every output is a sum of `inputs` products, and a bias."""
    weights = inputs * width
    flops = 2 * rows * weights
    return Layer(
        name=name,
        kind=kind,
        flops=flops,
        input_gradient=input_gradient,
        parameters=weights + width,
        inputs=inputs,
        outputs=width,
    )
