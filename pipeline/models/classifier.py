"""The classifier of noisy latents, p(class | z_t, t) (Dhariwal & Nichol 2021, section 4): the encoder half of the UNet,
its middle blocks, and a pooling of positions.

              timestep ---> embedding, added in every residual block
    x -> conv_in -> encoder -> middle -> norm, SiLU -> pool -> logits
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import ShapeError
from pipeline.models.kernels.fused import attend, norm_silu
from pipeline.models.unet.layers import Embedding, timestep_features
from pipeline.models.unet.network import Block, Level, Network, Shared, encoded, encoder_levels, middle_blocks
from pipeline.planning.cost import Pool
from pipeline.planning.dimensions import heads_of
from pipeline.planning.memory import Precision, recompute_classifier


class Classifier(Network):
    """x (B, in_channels, H, W), the noisy latent as a denoiser is given it, and timestep (B,) -> logits (B, classes),
    in the dtype of its weights.

    H and W are multiples of `stride`, of any size. config: a model without context and vector; out_channels,
    transformer_depth and linear_projection say nothing of it. Raises ConfigError when its widths do not divide into
    heads or groups.
    """

    ADAM_ONLY = ("conv_in", "embed_timestep", "pool.out")
    """Modules that are not hidden layers, which Muon does not update (training/engines/optimizer.py)."""
    LAST = ("pool.out",)

    def __init__(self, config: ModelConfig, classes: int, pool: Pool = "attention") -> None:
        super().__init__()
        assert not (config.context_width or config.vector_width), "the configuration was not checked"
        self.config, self.classes, self.pooling = config, classes, pool
        self.stride = 2 ** (len(config.multipliers) - 1)
        self.embed_timestep = Embedding(config.channels, 4 * config.channels)
        levels, widths = encoder_levels(config)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.encoder = cast("Sequence[Level]", nn.ModuleList(levels))
        self.middle = cast("Sequence[Block]", nn.ModuleList(middle_blocks(config)))
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1])
        heads = heads_of(config, widths[-1])
        self.pool = AttentionPool(widths[-1], heads, classes) if pool == "attention" else MeanPool(widths[-1], classes)

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """Raises ShapeError for latents that it cannot take."""
        self._check(x_BCHW)
        dtype = self.norm_out.weight.dtype
        embedding = F.silu(self.embed_timestep(timestep_features(timestep_B, self.config.channels).to(dtype)))
        shared: Shared = (embedding, None, None, None)
        run = self.runner(x_BCHW, shared)
        x = x_BCHW.to(dtype)
        if x.is_cuda or self.compiled:  # as in the UNet
            x = x.contiguous(memory_format=torch.channels_last)
        h = encoded(self.encoder, self.conv_in(x), embedding, run)[-1]
        for block in self.middle:
            h = run(block, h)
        return self.pool(norm_silu(self.norm_out, h))

    def recomputed_in(self, batch: int, height: int, width: int, length: int, precision: Precision) -> Collection[str]:
        budget = round(self.config.activation_gb * 1e9)
        return recompute_classifier(self.config, self.classes, self.pooling, batch, height, width, budget, precision)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ShapeError(f"the classifier takes (B, {self.config.in_channels}, H, W), not {tuple(x.shape)}")
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ShapeError(
                f"latents of {x.shape[2]}x{x.shape[3]} do not halve {len(self.config.multipliers) - 1} times: height "
                f"and width must be multiples of {self.stride}"
            )


class AttentionPool(nn.Module):
    """(B, C, H, W) -> logits (B, classes): the mean of all positions attends to them. Positions have no embedding, so
    that any size will do; zero padding tells the encoder where it is."""

    FUSED: ClassVar[dict[str, int]] = {"kv": 2}

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)  # rows: k, then v; heads in order within each
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens_BLC = x.flatten(2).transpose(1, 2)
        B, _, C = tokens_BLC.shape
        q = self.q(tokens_BLC.mean(dim=1)).view(B, self.heads, 1, C // self.heads)
        k, v = self.kv(tokens_BLC).view(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v)[:, 0])


class MeanPool(nn.Module):
    """(B, C, H, W) -> logits (B, classes) of the mean of all positions."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean(dim=(2, 3)))
