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

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.diffusion.conditioning import ContextCache
from pipeline.errors import ShapeError
from pipeline.models.kernels.fused import norm_silu
from pipeline.models.unet.layers import Embedding, timestep_features
from pipeline.models.unet.network import Block as Block
from pipeline.models.unet.network import Level, Network, Shared, encoded, encoder_levels, middle_blocks, resample
from pipeline.planning.dimensions import depths_of
from pipeline.planning.memory import Precision, recompute


class UNet(Network):
    """x (B, in_channels, H, W), timestep (B,) in [0, T), context (B, L, D), vector (B, V) -> (B, out_channels, H, W).

    H and W are multiples of `stride`. `in_channels` replaces config.in_channels if the task concatenates channels;
    `self.config` has the number that was built.
    Raises ConfigError when the widths of `config` do not divide into heads or groups.
    """

    ADAM_ONLY = ("conv_in", "conv_out", "embed_timestep", "embed_vector")
    """Modules that are not hidden layers, which Muon does not update (training/engines/optimizer.py)."""
    LAST = ("conv_out",)

    def __init__(self, config: ModelConfig, in_channels: int | None = None) -> None:
        super().__init__()
        self.config = config = replace(config, in_channels=in_channels or config.in_channels)
        self.stride = 2 ** (len(config.multipliers) - 1)
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        depths = depths_of(config)
        embedding_width = 4 * config.channels

        self.embed_timestep = Embedding(config.channels, embedding_width)
        self.embed_vector = Embedding(config.vector_width, embedding_width) if config.vector_width else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        encoder, skips = encoder_levels(config)
        width, middle = widths[-1], middle_blocks(config)

        decoder: list[Level] = []
        for level, level_width in reversed(list(enumerate(widths))):
            depth = depths[level] if 2**level in config.attention else 0
            blocks = []
            for i in range(config.blocks + 1):
                name = f"decoder.{len(decoder)}.blocks.{i}"
                blocks.append(Block(name, config, width + skips.pop(), level_width, depth))
                width = level_width
            decoder.append(Level(blocks, None if level == 0 else resample(config, width, "up")))

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
        shared: Shared = (embedding, None if context is None else context.to(dtype), mask, context_cache)
        run = self.runner(x_BCHW, shared)

        x = x_BCHW.to(dtype)
        if x.is_cuda or self.compiled:  # on a CPU PyTorch's own norms are slower in this layout
            x = x.contiguous(memory_format=torch.channels_last)
        skips = encoded(self.encoder, self.conv_in(x), embedding, run)
        h = skips[-1]
        for block in self.middle:
            h = run(block, h)
        for level in self.decoder:
            for block in level.blocks:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
            if level.resample is not None:
                h = level.resampled(h, embedding)
        return self.conv_out(norm_silu(self.norm_out, h))

    def recomputed_in(self, batch: int, height: int, width: int, length: int, precision: Precision) -> Collection[str]:
        budget = round(self.config.activation_gb * 1e9)
        return recompute(self.config, batch, height, width, length, budget, precision)

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
