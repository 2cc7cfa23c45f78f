"""What the UNet and its encoder half share (models/classifier.py): blocks, levels, weights to begin with, and what a
backward pass computes again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig
from pipeline.diffusion.conditioning import ContextCache
from pipeline.models.kernels import winograd
from pipeline.models.kernels.convolution import Conv3x3
from pipeline.models.unet.layers import Downsample, PixelAttention, ResBlock, Transformer, Upsample
from pipeline.planning.dimensions import depths_of, heads_of
from pipeline.planning.memory import Precision

Shared = tuple[Tensor, Tensor | None, Tensor | None, ContextCache | None]
"""What every block is given beside x: the timestep's embedding (B, E) after SiLU, the context (B, L, D), its mask, and
its cache."""


class Network(nn.Module, ABC):
    """A network of blocks. A subclass builds `norm_out`, its last norm, and names its last layers in LAST."""

    LAST: ClassVar[tuple[str, ...]] = ()
    """Layers of the network whose weights begin at zero, so that its first output is 0."""
    config: ModelConfig
    norm_out: nn.GroupNorm
    compiled = False

    @abstractmethod
    def recomputed_in(self, batch: int, height: int, width: int, length: int, precision: Precision) -> Collection[str]:
        """Names of the blocks that config.activation_gb has computed again, for latents (batch, C, height, width) and a
        context of `length` tokens. Raises ConfigError where the activations exceed it even so."""

    def runner(self, x: Tensor, shared: Shared) -> Callable[[Block, Tensor], Tensor]:
        """What runs a block on its input, in a way that the backward pass may compute it again. x: the network's
        input (B, C, H, W)."""
        recomputed = self._recomputed(x, shared[1])

        def run(block: Block, h: Tensor) -> Tensor:
            if block.name in recomputed:
                return checkpoint(block, h, *shared, use_reentrant=False)
            return block(h, *shared)

        return run

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
        branch and of the network is zero, so every block starts as the identity and the first output is 0.
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
            for last in self.LAST if module is self else LAST_LAYERS.get(type(module), ()):
                for parameter in module.get_submodule(last).parameters():
                    nn.init.zeros_(parameter)

    def _recomputed(self, x: Tensor, context: Tensor | None) -> Collection[str]:
        """Names of the blocks to recompute in the backward pass for this input."""
        if not torch.is_grad_enabled():
            return ()
        if self.config.checkpointing:
            return {module.name for module in self.modules() if isinstance(module, Block)}
        if not self.config.activation_gb:
            return ()
        precision: Precision = "fp32" if self.norm_out.weight.dtype == torch.float32 else "bf16"
        height, width = x.shape[2:]
        return self.recomputed_in(len(x), height, width, 0 if context is None else context.shape[1], precision)


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


def encoder_levels(config: ModelConfig) -> tuple[list[Level], list[int]]:
    """The levels of the encoder, and the width of everything that it can hand on: the first convolution's output, each
    block's, and each halved image."""
    widths, depths = [config.channels * multiplier for multiplier in config.multipliers], depths_of(config)
    levels, skips = list[Level](), [widths[0]]
    for level, level_width in enumerate(widths):
        depth = depths[level] if 2**level in config.attention else 0
        blocks = []
        for i in range(config.blocks):
            blocks.append(Block(f"encoder.{level}.blocks.{i}", config, skips[-1], level_width, depth))
            skips.append(level_width)
        last = level == len(widths) - 1
        levels.append(Level(blocks, None if last else resample(config, level_width, "down")))
        if not last:
            skips.append(level_width)
    return levels, skips


def middle_blocks(config: ModelConfig) -> list[Block]:
    """The blocks between encoder and decoder: one with attention, one without."""
    width = config.channels * config.multipliers[-1]
    return [Block(f"middle.{i}", config, width, width, depth) for i, depth in enumerate((depths_of(config)[-1], 0))]


def encoded(
    levels: Sequence[Level], h: Tensor, embedding: Tensor, run: Callable[[Block, Tensor], Tensor]
) -> list[Tensor]:
    """Everything that the encoder hands on, from h (B, C, H, W), the first convolution's output, to the last block's
    output."""
    skips = [h]
    for level in levels:
        for block in level.blocks:
            skips.append(run(block, skips[-1]))
        if level.resample is not None:
            skips.append(level.resampled(skips[-1], embedding))
    return skips


def resample(config: ModelConfig, width: int, way: Literal["down", "up"]) -> Downsample | Upsample | ResBlock:
    """What halves or doubles the resolution."""
    if not config.resblock_updown:
        return Downsample(width) if way == "down" else Upsample(width)
    facts = (config.norm_groups, config.dropout, config.scale_shift_norm)
    return ResBlock(width, width, 4 * config.channels, *facts, resample=way)


SIZES = 32
"""Sizes of latents, with or without gradients, that blocks are compiled for at most."""

LAST_LAYERS: dict[type, tuple[str, ...]] = {
    ResBlock: ("conv2",),
    Transformer: ("project_out",),
    PixelAttention: ("attend.out",),
}
"""The last layer of each module's residual branch, which starts at zero."""
