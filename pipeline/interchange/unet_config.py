"""diffusers' own configuration of our UNet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.planning.dimensions import heads_of

WITHOUT_ATTENTION = ("DownBlock2D", "UpBlock2D")
TIME_ID_WIDTH = 256
"""Channels of each of the sinusoids of SDXL's sizes and crop."""


def diffusers_class(config: ModelConfig) -> str:
    """Name of the diffusers class that holds this UNet."""
    return "UNet2DConditionModel" if config.context_width else "UNet2DModel"


def diffusers_config(config: ModelConfig, sample_size: int | None = None, classes: int = 0) -> dict[str, Any]:
    """Keyword arguments of that class, which are also its config.json.

    `sample_size`: side of the latents that it was trained on. `config` is the built UNet's (`unet.config`), whose
    in_channels count what the task concatenates. `classes`: rows of a table that takes the vector's place, for models
    whose vector is one of so many (class_table.py); 0 = none. Raises ConfigError for models that diffusers has no
    class for: without context, it knows one head width and no vector; with it, no resampling in residual blocks.
    """
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    attends = [2**level in config.attention for level in range(len(widths))]
    common: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "block_out_channels": widths,
        "layers_per_block": config.blocks,
        "downsample_padding": 1,
        "act_fn": "silu",
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
    }
    if config.scale_shift_norm:
        common["resnet_time_scale_shift"] = "scale_shift"
    if classes:
        common["num_class_embeds"] = classes
        config = replace(config, vector_width=0)
    if config.context_width:
        if config.resblock_updown:
            raise ConfigError(
                "diffusers' UNet2DConditionModel resamples by single convolutions where it attends: set "
                "model.resblock_updown=false, or export format=compvis"
            )
        depth = config.transformer_depth
        text_time = config.vector_time_ids > 0
        return common | {
            "down_block_types": [
                "CrossAttnDownBlock2D" if has_attention else "DownBlock2D" for has_attention in attends
            ],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": [
                "CrossAttnUpBlock2D" if has_attention else "UpBlock2D" for has_attention in reversed(attends)
            ],
            "cross_attention_dim": config.context_width,
            "transformer_layers_per_block": depth if isinstance(depth, int) else [max(1, blocks) for blocks in depth],
            # diffusers reads "attention_head_dim" of this class as the number of heads
            "attention_head_dim": config.heads or [max(1, width // config.head_width) for width in widths],
            "use_linear_projection": config.linear_projection,
            "class_embed_type": "projection" if config.vector_width and not text_time else None,
            "addition_embed_type": "text_time" if text_time else None,
            "addition_time_embed_dim": TIME_ID_WIDTH if text_time else None,
            "projection_class_embeddings_input_dim": config.vector_width or None,
        }
    attending = [width for width, has_attention in zip(widths, attends, strict=True) if has_attention] + [widths[-1]]
    head_widths = {width // heads_of(config, width) for width in attending}
    if len(head_widths) > 1 or config.vector_width:
        raise ConfigError(
            "diffusers' UNet2DModel takes one head width at all levels and no vector: set model.head_width "
            "and model.vector_width=0, or export format=compvis"
        )
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resblock_updown else WITHOUT_ATTENTION
    if config.resblock_updown:
        common |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if config.scale_shift_norm:  # without it the middle's attention would have no norm
        common["attn_norm_num_groups"] = config.norm_groups
    return common | {
        "down_block_types": ["AttnDownBlock2D" if has_attention else plain[0] for has_attention in attends],
        "up_block_types": ["AttnUpBlock2D" if has_attention else plain[1] for has_attention in reversed(attends)],
        "attention_head_dim": head_widths.pop(),
    }
