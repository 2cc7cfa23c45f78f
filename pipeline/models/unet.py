"""The denoiser of Rombach et al. 2021 (section 3.3, figure 3): a UNet whose levels attend to the conditioning.

                 timestep (+ vector) ---> embedding, added in every residual block
                 context ---------------> keys and values of every cross-attention
    x -> conv_in -> encoder -> middle -> decoder -> conv_out -> prediction
                       |________________^
                        skips, concatenated

Levels halve the resolution on the way down and double it on the way up. With the settings of Stable Diffusion 1 and 2
it is their UNet, parameter for parameter (models/convert.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.fused import norm_silu
from pipeline.models.layers import (
    Downsample,
    Embedding,
    Known,
    PixelAttention,
    ResBlock,
    Transformer,
    Upsample,
    timestep_features,
)


class UNet(nn.Module):
    """x (B, in_channels, H, W), timestep (B,) in [0, T), context (B, L, D), vector (B, V) -> (B, out_channels, H, W).

    H and W are multiples of `stride`. `in_channels` replaces config.in_channels where the task concatenates its
    own; `self.config` holds what was built.
    Raises ConfigError when the widths of `config` do not divide into heads or groups.
    """

    ADAM_ONLY = ("conv_in", "conv_out", "embed_timestep", "embed_vector")
    """What is no hidden layer, and not Muon's (training/optimizer.py)."""

    def __init__(self, config: ModelConfig, in_channels: int | None = None) -> None:
        super().__init__()
        self.config = config = replace(config, in_channels=in_channels or config.in_channels)
        self.compiled = False
        self.stride = 2 ** (len(config.multipliers) - 1)
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        depths = depths_of(config)
        embedding_width = 4 * config.channels

        self.embed_timestep = Embedding(config.channels, embedding_width)
        self.embed_vector = Embedding(config.vector_width, embedding_width) if config.vector_width else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        encoder = []
        width, skips = widths[0], [widths[0]]
        for level, level_width in enumerate(widths):
            depth = depths[level] if 2**level in config.attention else 0
            blocks = []
            for _ in range(config.blocks):
                blocks.append(Block(config, width, level_width, depth))
                width = level_width
                skips.append(width)
            last = level == len(widths) - 1
            encoder.append(Level(blocks, None if last else Downsample(width)))
            if not last:
                skips.append(width)

        middle = [Block(config, width, width, depths[-1]), Block(config, width, width, 0)]

        decoder = []
        for level, level_width in reversed(list(enumerate(widths))):
            depth = depths[level] if 2**level in config.attention else 0
            blocks = []
            for _ in range(config.blocks + 1):
                blocks.append(Block(config, width + skips.pop(), level_width, depth))
                width = level_width
            decoder.append(Level(blocks, None if level == 0 else Upsample(width)))

        self.encoder = cast("Sequence[Level]", nn.ModuleList(encoder))
        self.middle = cast("Sequence[Block]", nn.ModuleList(middle))
        self.decoder = cast("Sequence[Level]", nn.ModuleList(decoder))
        self.norm_out = nn.GroupNorm(config.norm_groups, width)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        context_BLD: Tensor | None = None,
        context_mask_BL: Tensor | None = None,
        vector_BV: Tensor | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """The network's raw prediction, in the dtype of its weights (timesteps are read in float32).

        context_mask: bool, True where a token may be attended to; every row needs one. known: {} at the first of many
        passes with one context and the same weights, and the same dict at the others, which then do not project it
        again; without gradients. Raises ShapeError.
        """
        self._check(x_BCHW, context_BLD, vector_BV)
        dtype = self.conv_in.weight.dtype
        context, mask = context_BLD, context_mask_BL
        if context is not None and mask is not None and mask.device.type == "cpu" and not self.compiled:
            last = int(mask.any(dim=0).nonzero()[-1]) + 1  # no row attends to a token after it (a GPU would wait)
            context, mask = context[:, :last], mask[:, :last]

        embedding = self.embed_timestep(timestep_features(timestep_B, self.config.channels).to(dtype))
        if self.embed_vector is not None:
            embedding = embedding + self.embed_vector(cast(Tensor, vector_BV).to(dtype))
        embedding = F.silu(embedding)  # every residual block reads it through SiLU
        shared = (embedding, None if context is None else context.to(dtype), mask, known)

        h = self.conv_in(x_BCHW.to(dtype))
        skips = [h]
        for level in self.encoder:
            for block in level.blocks:
                h = self._run(block, h, *shared)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        for block in self.middle:
            h = self._run(block, h, *shared)
        for level in self.decoder:
            for block in level.blocks:
                h = self._run(block, torch.cat([h, skips.pop()], dim=1), *shared)
            if level.resample is not None:
                h = level.resample(h)
        return self.conv_out(norm_silu(self.norm_out, h))

    def compile_blocks(self) -> None:
        """Have torch.compile compile each block, for every shape that comes by itself. Needs a C++ compiler on a CPU.

        Blocks of one shape share what was compiled. Parameter names stay as they are.
        """
        self.compiled = True
        for part in self.modules():
            if isinstance(part, Block):
                part.compile(dynamic=False)

    def reset_parameters(self, seed: int) -> None:
        """Initial weights, the same on every machine and device for one seed.

        Uniform in +-1/sqrt(fan in) for weights and biases, norms at identity, and zero for what ends a residual branch
        or the network, so that every branch starts as the identity and the first prediction is 0.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in module.parameters(recurse=False):
                    values = torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound)
                    parameter.data.copy_(values)
            elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.reset_parameters()
        for module in self.modules():
            for last in LAST_LAYERS.get(type(module), ()):
                for parameter in module.get_submodule(last).parameters():
                    nn.init.zeros_(parameter)

    def _run(
        self,
        block: Block,
        x: Tensor,
        embedding: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        known: Known | None,
    ) -> Tensor:
        if self.config.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, embedding, context, mask, use_reentrant=False)
        return block(x, embedding, context, mask, known)

    def _check(self, x: Tensor, context: Tensor | None, vector: Tensor | None) -> None:
        """Raise ShapeError for inputs that this network cannot take."""
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ShapeError(f"the UNet takes (B, {config.in_channels}, H, W), not {tuple(x.shape)}")
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ShapeError(
                f"latents of {x.shape[2]}x{x.shape[3]} do not halve {len(config.multipliers) - 1} times: "
                f"height and width must be multiples of {self.stride}"
            )
        for what, tensor, width in (
            ("context", context, config.context_width),
            ("vector", vector, config.vector_width),
        ):
            if (tensor is not None) != (width > 0) or (tensor is not None and tensor.shape[-1] != width):
                got = "none" if tensor is None else f"width {tensor.shape[-1]}"
                raise ShapeError(f"the UNet takes a {what} of width {width} (0 = none), but was given {got}")


class Block(nn.Module):
    """A residual block and, where the level attends, the attention after it: one column of the paper's figure.

    depth: transformer blocks of the attention; 0 for none. Without a context width pixels attend to pixels alone, in
    one layer.
    """

    def __init__(self, config: ModelConfig, in_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.res = ResBlock(in_width, width, 4 * config.channels, config.norm_groups, config.dropout)
        self.attention: Transformer | PixelAttention | None = None
        if depth and config.context_width:
            heads = heads_of(config, width)
            self.attention = Transformer(width, config.context_width, heads, depth, config.norm_groups)
        elif depth:
            self.attention = PixelAttention(width, heads_of(config, width), config.norm_groups)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        known: Known | None = None,
    ) -> Tensor:
        x = self.res(x, embedding)
        return x if self.attention is None else self.attention(x, context, mask, known)


class Level(nn.Module):
    """The blocks of one resolution and the way to the next."""

    def __init__(self, blocks: list[Block], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.resample = resample


LAST_LAYERS: dict[type, tuple[str, ...]] = {
    UNet: ("conv_out",),
    ResBlock: ("conv2",),
    Transformer: ("project_out",),
    PixelAttention: ("attend.out",),
}
"""What ends a branch of each module, and starts at zero."""


def depths_of(config: ModelConfig) -> list[int]:
    """Transformer blocks of an attention layer, by level; the middle has the last level's."""
    depth, levels = config.transformer_depth, len(config.multipliers)
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    if len(depths) != levels:
        raise ConfigError(f"model.transformer_depth={depths}: one number for each of the {levels} model.multipliers")
    return depths


def heads_of(config: ModelConfig, width: int) -> int:
    """Number of attention heads in a layer of `width` channels."""
    if (config.heads > 0) == (config.head_width > 0):
        raise ConfigError("model.heads and model.head_width: give one, and 0 for the other")
    divisor = config.heads or config.head_width
    if width % divisor:
        raise ConfigError(f"attention at width {width} does not divide by {divisor} (model.heads or model.head_width)")
    return config.heads or width // config.head_width
