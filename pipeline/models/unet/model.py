"""The denoiser of Rombach et al. 2021 (section 3.3, figure 3): a UNet whose levels attend to the conditioning.

                 timestep (+ vector) ---> embedding, added in every residual block
                 context ---------------> keys and values of every cross-attention
    x -> conv_in -> encoder -> middle -> decoder -> conv_out -> prediction
                       |________________^
                        skips, concatenated

Levels halve the resolution in the encoder and double it in the decoder. With the settings of Stable Diffusion 1 or 2
this is their UNet, parameter for parameter (interchange/unet.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig
from pipeline.diffusion.conditioning import ContextCache
from pipeline.errors import ShapeError
from pipeline.models.kernels import winograd
from pipeline.models.kernels.convolution import Conv3x3
from pipeline.models.kernels.fused import norm_silu
from pipeline.models.unet.layers import (
    Downsample,
    Embedding,
    PixelAttention,
    ResBlock,
    Transformer,
    Upsample,
    timestep_features,
)
from pipeline.planning.dimensions import depths_of, heads_of
from pipeline.planning.memory import Precision, recompute


class UNet(nn.Module):
    """x (B, in_channels, H, W), timestep (B,) in [0, T), context (B, L, D), vector (B, V) -> (B, out_channels, H, W).

    H and W are multiples of `stride`. `in_channels` replaces config.in_channels if the task concatenates channels;
    `self.config` has the number that was built.
    Raises ConfigError when the widths of `config` do not divide into heads or groups.
    """

    ADAM_ONLY = ("conv_in", "conv_out", "embed_timestep", "embed_vector")
    """Modules that are not hidden layers, which Muon does not update (training/engines/optimizer.py)."""

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
            for i in range(config.blocks):
                blocks.append(Block(f"encoder.{level}.blocks.{i}", config, width, level_width, depth))
                width = level_width
                skips.append(width)
            last = level == len(widths) - 1
            encoder.append(Level(blocks, None if last else _resample(config, width, "down")))
            if not last:
                skips.append(width)

        middle = [Block(f"middle.{i}", config, width, width, depth) for i, depth in enumerate((depths[-1], 0))]

        decoder: list[Level] = []
        for level, level_width in reversed(list(enumerate(widths))):
            depth = depths[level] if 2**level in config.attention else 0
            blocks = []
            for i in range(config.blocks + 1):
                name = f"decoder.{len(decoder)}.blocks.{i}"
                blocks.append(Block(name, config, width + skips.pop(), level_width, depth))
                width = level_width
            decoder.append(Level(blocks, None if level == 0 else _resample(config, width, "up")))

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
        context_cache: ContextCache | None = None,
    ) -> Tensor:
        """The network's raw prediction, in the dtype of its weights (timesteps are embedded in float32).

        context_mask: bool, True where a token may be attended to; every row needs at least one. context_cache: for many
        passes with one context and the same weights, without gradients: {} in the first pass, and the same dict in the
        others, which then do not project the context again. Raises ShapeError.
        """
        self._check(x_BCHW, context_BLD, vector_BV)
        dtype = self.norm_out.weight.dtype
        context, mask = context_BLD, context_mask_BL
        if context is not None and mask is not None and mask.device.type == "cpu" and not self.compiled:
            last = int(mask.any(dim=0).nonzero()[-1]) + 1  # no row attends to later tokens (a GPU would wait)
            context, mask = context[:, :last], mask[:, :last]

        embedding = self.embed_timestep(timestep_features(timestep_B, self.config.channels).to(dtype))
        if self.embed_vector is not None:
            embedding = embedding + self.embed_vector(cast(Tensor, vector_BV).to(dtype))
        embedding = F.silu(embedding)  # every residual block applies SiLU to it
        shared = (embedding, None if context is None else context.to(dtype), mask, context_cache)
        recomputed = self._recomputed(x_BCHW, context)

        def run(block: Block, x: Tensor) -> Tensor:
            if block.name in recomputed:
                return checkpoint(block, x, *shared, use_reentrant=False)
            return block(x, *shared)

        x = x_BCHW.to(dtype)
        if x.is_cuda or self.compiled:  # on a CPU PyTorch's own norms are slower in this layout
            x = x.contiguous(memory_format=torch.channels_last)
        h = self.conv_in(x)
        skips = [h]
        for level in self.encoder:
            for block in level.blocks:
                h = run(block, h)
                skips.append(h)
            if level.resample is not None:
                h = level.resampled(h, embedding)
                skips.append(h)
        for block in self.middle:
            h = run(block, h)
        for level in self.decoder:
            for block in level.blocks:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
            if level.resample is not None:
                h = level.resampled(h, embedding)
        return self.conv_out(norm_silu(self.norm_out, h))

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch.compile compile each block in its first pass, and again for every new size of latents.

        Blocks of one shape share compiled code. Parameter names do not change. On a CPU, Inductor needs a C++ compiler,
        and from this call on, 3x3 convolutions in fp32 use models/kernels/winograd.py.
        """
        self.compiled = True
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        settings = torch._dynamo.config  # beyond these limits torch.compile runs blocks uncompiled
        settings.recompile_limit = max(settings.recompile_limit, SIZES * len(blocks))
        settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * SIZES * len(blocks))
        for block in blocks:
            block.compile(backend=backend, dynamic=False)
        by_tiles = self.norm_out.weight.device.type == "cpu" and winograd.available()
        for module in self.modules():
            if isinstance(module, Conv3x3):
                module.by_tiles = by_tiles

    def reset_parameters(self, seed: int) -> None:
        """Initialize the weights; one seed gives the same weights on every machine and device.

        Weights and biases are uniform in +-1/sqrt(fan in), and norms are the identity. The last layer of each residual
        branch and of the network is zero, so every block starts as the identity and the first prediction is 0.
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

    def _recomputed(self, x: Tensor, context: Tensor | None) -> Collection[str]:
        """Names of the blocks to recompute in the backward pass for this input. Raises ConfigError when the activations
        exceed config.activation_gb even if all blocks are recomputed."""
        config = self.config
        if not torch.is_grad_enabled():
            return ()
        if config.checkpointing:
            return {module.name for module in self.modules() if isinstance(module, Block)}
        if not config.activation_gb:
            return ()
        precision: Precision = "fp32" if self.norm_out.weight.dtype == torch.float32 else "bf16"
        length = 0 if context is None else context.shape[1]
        return recompute(config, len(x), *x.shape[2:], length, round(config.activation_gb * 1e9), precision)

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
        for input_name, tensor, width in (
            ("context", context, config.context_width),
            ("vector", vector, config.vector_width),
        ):
            if (tensor is not None) != (width > 0) or (tensor is not None and tensor.shape[-1] != width):
                given_width = "none" if tensor is None else f"width {tensor.shape[-1]}"
                raise ShapeError(
                    f"the UNet takes a {input_name} of width {width} (0 = none), but was given {given_width}"
                )


class Block(nn.Module):
    """A residual block and, at levels with attention, the attention after it: one column of the paper's figure.

    name: of the block in the network. depth: transformer blocks of the attention; 0 for no attention. Without a context
    width the attention is one layer of self-attention of pixels.
    """

    def __init__(self, name: str, config: ModelConfig, in_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.name = name
        self.res = ResBlock(
            in_width, width, 4 * config.channels, config.norm_groups, config.dropout, config.scale_shift_norm
        )
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
        context_cache: ContextCache | None = None,
    ) -> Tensor:
        x = self.res(x, embedding)
        return x if self.attention is None else self.attention(x, context, mask, context_cache)


class Level(nn.Module):
    """The blocks of one resolution, and the resampling to the next one."""

    def __init__(self, blocks: list[Block], resample: Downsample | Upsample | ResBlock | None) -> None:
        super().__init__()
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.resample = resample

    def resampled(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x at the next resolution."""
        assert self.resample is not None, "the last level has no next"
        return self.resample(x, embedding) if isinstance(self.resample, ResBlock) else self.resample(x)


def _resample(config: ModelConfig, width: int, way: Literal["down", "up"]) -> Downsample | Upsample | ResBlock:
    if not config.resblock_updown:
        return Downsample(width) if way == "down" else Upsample(width)
    facts = (config.norm_groups, config.dropout, config.scale_shift_norm)
    return ResBlock(width, width, 4 * config.channels, *facts, resample=way)


SIZES = 32
"""Sizes of latents, with or without gradients, that blocks are compiled for at most."""

LAST_LAYERS: dict[type, tuple[str, ...]] = {
    UNet: ("conv_out",),
    ResBlock: ("conv2",),
    Transformer: ("project_out",),
    PixelAttention: ("attend.out",),
}
"""The last layer of each module's residual branch, which starts at zero."""
