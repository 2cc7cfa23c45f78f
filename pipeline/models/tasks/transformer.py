"""A transformer encoder over a few tokens, for conditions that are trained with the UNet."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each behind a norm and beside a residual path (pre-norm; Xiong et al.
    2020)."""

    FUSED: ClassVar[dict[str, int]] = {"qkv": 3}

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor, mask_B11L: Tensor | None) -> Tensor:
        B, L, _ = x_BLD.shape
        q, k, v = self.qkv(self.norm1(x_BLD)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11L)
        x_BLD = x_BLD + self.out(attended.transpose(1, 2).reshape(B, L, -1))
        return x_BLD + self.down(F.gelu(self.up(self.norm2(x_BLD))))


class Transformer(nn.Module):
    """Tokens (B, L, D) -> (B, L, D) by `depth` blocks and a last norm. It knows no order of its own. mask (B, L) bool:
    tokens to attend to, one a row at least; None = all."""

    def __init__(self, width: int, depth: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, head_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        for block in self.blocks:
            x_BLD = block(x_BLD, mask)
        return self.norm(x_BLD)
