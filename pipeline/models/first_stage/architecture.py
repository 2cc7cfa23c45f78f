"""The architecture of a first stage, as diffusers' AutoencoderKL or VQModel holds it (Rombach et al. 2021, appendix G;
Esser et al. 2021, table 7).

    image -> encoder -> quant_conv -> mean and log-variance, or what is quantised -> post_quant_conv -> decoder -> image
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pipeline.config import FirstStageConfig
from pipeline.models.first_stage.layers import take_over

CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}
"""diffusers' class, by regularizer."""


def diffusers_config(config: FirstStageConfig, scale: float = 1.0, side: int = 0) -> dict[str, Any]:
    """config.json of the autoencoder for diffusers, with `_class_name`.

    scale: what latents are multiplied with, 1 / their standard deviation. It is always written: where it is missing,
    diffusers takes that of Stable Diffusion (0.18215), also for a VQModel. side: pixels of the pictures that it was
    trained on; 0 = not said.
    """
    factors = [2**level for level in range(len(config.multipliers))]
    has_attention = [factor in config.attention for factor in factors]
    described: dict[str, Any] = {
        "_class_name": CLASSES[config.regularizer],
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in has_attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(has_attention)],
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "layers_per_block": config.blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.middle_attention,
        "scaling_factor": scale,
        "force_upcast": False,
    }
    if config.regularizer == "vq":
        described |= {"num_vq_embeddings": config.codes, "vq_embed_dim": config.latent_channels}
    return described | ({"sample_size": side} if side else {})


def build(config: FirstStageConfig) -> Any:
    """diffusers' AutoencoderKL or VQModel of `config`, with our layers in it; call reset_parameters or load weights
    before it is used. On `torch.device("meta")` it takes no memory."""
    from pipeline.models.encoders import packages

    described = diffusers_config(config)
    cls = getattr(packages, described.pop("_class_name"))
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights that are drawn again
        model = cls(**described)
    take_over(model)
    return model


def reset_parameters(model: nn.Module, seed: int) -> None:
    """Initialize the weights; one seed gives the same weights on every machine and device.

    Weights and biases are uniform in +-1/sqrt(fan in), norms are the identity, and each number of a codebook of n
    entries is uniform in +-1/n (van den Oord et al. 2017).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
        elif isinstance(module, nn.Embedding):
            bound = 1 / module.num_embeddings
        elif isinstance(module, nn.GroupNorm):
            module.reset_parameters()
            continue
        else:
            continue
        for parameter in module.parameters(recurse=False):
            values = torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound)
            parameter.data.copy_(values)
