"""Building blocks of the UNet: residual blocks, transformers and resampling.

Images are `x_BCHW`; as tokens they are `x_BLC`, with L = H W. Projections that are 1x1 convolutions in Stable
Diffusion 1 are linear layers here (with the same numbers), and projections of one input are fused (q, k and v of
self-attention, k and v of cross-attention). interchange/unet.py splits and joins them without loss.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.diffusion.conditioning import ContextCache
from pipeline.models.kernels.convolution import Conv3x3
from pipeline.models.kernels.fused import attend, linear_geglu, norm_alone, norm_silu


def timestep_features(timestep_B: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the timestep, cosines first: (B,) any dtype -> (B, width) float32. `width` is even.

    Frequencies fall geometrically from 1 to 1/max_period (Vaswani et al. 2017, section 3.5). They are computed in
    float32 at every call, because bfloat16 cannot represent odd timesteps above 256.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep_B.device) * (-math.log(max_period) / half)
    angle = timestep_B.float()[:, None] * exponent.exp()[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedding(nn.Module):
    """Two linear layers with SiLU between them: (B, in_width) -> (B, width)."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep embedding added between them, and a residual path.

    x (B, in_width, H, W), embedding (B, embedding_width) after SiLU -> (B, width, H, W). scale_shift: the embedding
    scales and shifts the second norm instead. resample: both paths halve the image (means of 2x2 pixels) or double it
    (nearest neighbours) before the first convolution (Dhariwal & Nichol 2021).
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        embedding_width: int,
        groups: int,
        dropout: float,
        scale_shift: bool = False,
        resample: Literal["", "down", "up"] = "",
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, in_width)
        self.conv1 = Conv3x3(in_width, width)
        self.embed = nn.Linear(embedding_width, 2 * width if scale_shift else width)  # rows: scale, then shift
        self.norm2 = nn.GroupNorm(groups, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(width, width)
        self.skip = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = norm_silu(self.norm1, x)
        if self.resample:
            h, x = self._resampled(h), self._resampled(x)
        h = self.conv1(h)
        embedded = self.embed(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = F.silu(norm_alone(self.norm2, h) * (1 + scale) + shift)
        else:
            h = norm_silu(self.norm2, h + embedded)
        h = self.conv2(self.dropout(h))
        return self.skip(x) + h

    def _resampled(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens: (B, L, C) -> (B, L, C)."""

    FUSED: ClassVar[dict[str, int]] = {"qkv": 3}
    """Weights whose rows hold several projections, and how many, for optimizers that update each matrix as a whole."""

    def __init__(self, width: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)  # rows: q, then k, then v; heads in order within each
        self.out = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        B, L, C = x_BLC.shape
        q, k, v = self.qkv(x_BLC).view(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v))


class CrossAttention(nn.Module):
    """Tokens (B, L, C) attend to the context (B, M, context_width) where mask (B, M) is True -> (B, L, C).

    context_cache: the context's keys and values by module; this module reads its own, or computes and adds them.
    """

    FUSED: ClassVar[dict[str, int]] = {"kv": 2}

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)  # rows: k, then v
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BLC: Tensor, context_BMD: Tensor, mask_BM: Tensor | None, context_cache: ContextCache | None = None
    ) -> Tensor:
        B, L, C = x_BLC.shape
        q = self.q(x_BLC).view(B, L, self.heads, C // self.heads).transpose(1, 2)
        if context_cache is None or self not in context_cache:
            k, v = self.kv(context_BMD).view(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
            if context_cache is not None:
                context_cache[self] = k, v
        else:
            k, v = context_cache[self]
        mask = None if mask_BM is None else mask_BM[:, None, None, :]  # the same for every head and query
        return self.out(attend(q, k, v, mask))


class GegluLinear(nn.Linear):
    """A linear layer and GEGLU (Shazeer 2020): (..., in_width) -> (..., width). The weight has values, then gates."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__(in_width, 2 * width)

    def forward(self, input: Tensor) -> Tensor:
        return linear_geglu(input, self.weight, self.bias)


class FeedForward(nn.Module):
    """A feed-forward layer with GEGLU and an inner width of 4 C: (B, L, C) -> (B, L, C)."""

    FUSED: ClassVar[dict[str, int]] = {"up": 2}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = GegluLinear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.down(self.up(x_BLC))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each pre-normed and residual: (B, L, C) -> (B, L, C)."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.attend_self = SelfAttention(width, heads)
        self.norm_cross = nn.LayerNorm(width)
        self.attend_cross = CrossAttention(width, context_width, heads)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = FeedForward(width)

    def forward(
        self, x_BLC: Tensor, context_BMD: Tensor, mask_BM: Tensor | None, context_cache: ContextCache | None = None
    ) -> Tensor:
        x_BLC = x_BLC + self.attend_self(self.norm_self(x_BLC))
        x_BLC = x_BLC + self.attend_cross(self.norm_cross(x_BLC), context_BMD, mask_BM, context_cache)
        return x_BLC + self.feed(self.norm_feed(x_BLC))


class Transformer(nn.Module):
    """Pixels as tokens through `depth` transformer blocks between two projections, residual (Rombach et al., 3.3).

    x (B, C, H, W), context (B, M, D), mask (B, M) bool or None -> (B, C, H, W).
    """

    def __init__(self, width: int, context_width: int, heads: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.project_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, context_width, heads) for _ in range(depth))
        self.project_out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, context_BMD: Tensor, mask_BM: Tensor | None, context_cache: ContextCache | None = None
    ) -> Tensor:
        tokens = self.project_in(norm_alone(self.norm, x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, context_BMD, mask_BM, context_cache)
        return x + self.project_out(tokens).transpose(1, 2).reshape(x.shape)


class PixelAttention(nn.Module):
    """Residual self-attention of pixels: models without context have it in place of a transformer.

    x (B, C, H, W) -> (B, C, H, W); context, mask and cache are ignored.
    """

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.attend = SelfAttention(width, heads, bias=True)

    def forward(
        self,
        x: Tensor,
        context_BMD: Tensor | None = None,
        mask_BM: Tensor | None = None,
        context_cache: ContextCache | None = None,
    ) -> Tensor:
        tokens = self.attend(norm_alone(self.norm, x).flatten(2).transpose(1, 2))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2) by a strided 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv3x3(width, width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbours, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
