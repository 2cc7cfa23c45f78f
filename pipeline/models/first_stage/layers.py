"""Layers that take the place of diffusers' in its autoencoders: the same functions and names of weights, but what they
keep for the backward pass is less (the outputs of norms are computed again, and images are not kept upsampled), and the
decoder has fewer operations.

`take_over` puts them into a model. Without autocast, a residual block then keeps four images instead of six.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.models.kernels.fused import attend, norm_alone, norm_silu
from pipeline.models.kernels.upsampled import upsampled_convolution


class Residual(nn.Module):
    """diffusers' ResnetBlock2D without a timestep: x (B, in_width, H, W) -> (B, width, H, W)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut  # None where both widths are equal

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """diffusers' Attention of pixels to each other, with one head and a residual path: (B, C, H, W), as it came."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        assert attention.heads == 1, "the autoencoders of diffusers have one head"
        self.group_norm = attention.group_norm
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out  # a linear layer, and dropout of nothing

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        # One copy in the layout of tokens, which the three projections would each make and keep.
        tokens = norm_alone(self.group_norm, x).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attend(q, k, v)).transpose(1, 2).reshape(x.shape)


class Upsample(nn.Module):
    """diffusers' Upsample2D: (B, C, H, W) -> (B, C, 2H, 2W), nearest neighbours and a 3x3 convolution, as one 2x2
    convolution of the small image."""

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.conv = upsample.conv

    def forward(self, x: Tensor) -> Tensor:
        return upsampled_convolution(x, self.conv.weight, self.conv.bias)


class Half(nn.Module):
    """diffusers' Encoder (pictures to moments, or to what is quantised) or Decoder (latents to pictures)."""

    def __init__(self, half: Any) -> None:
        super().__init__()
        self.encodes = hasattr(half, "down_blocks")
        for name, module in half.named_children():
            if name != "conv_act":
                self.add_module(name, module)

    def forward(self, x: Tensor, latent_embeds: None = None) -> Tensor:
        part: Any = self
        middle = part.mid_block
        h = part.conv_in(x)
        for block in (*part.down_blocks, middle) if self.encodes else (middle, *part.up_blocks):
            h = block(h)
        out: Tensor = part.conv_out(norm_silu(part.conv_norm_out, h))
        return out


OURS = {"ResnetBlock2D": Residual, "Attention": PixelAttention, "Upsample2D": Upsample}
"""Names of diffusers' classes, and what takes their place."""


def take_over(model: Any) -> None:
    """Replace the layers of an AutoencoderKL or VQModel. Its weights, and their names, stay."""
    for name, module in list(model.named_modules()):
        if ours := OURS.get(type(module).__name__):
            model.set_submodule(name, ours(module))
    model.encoder, model.decoder = Half(model.encoder), Half(model.decoder)
