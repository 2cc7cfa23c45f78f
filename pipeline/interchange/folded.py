"""An autoencoder whose latents have another scale and no shift: what its 1x1 convolutions can take over, and the
entries of its codebook, if it has one.

Our latent is z' = (z - shift) scale. A pipeline that divides by a scale of its own, by none, or knows no shift gets an
autoencoder of latents z'' = z' / fixed, whose decoder's convolution computes W (fixed z'' / scale + shift) + b, and
whose encoder's gives the moments of z''. Both are exact: they have no neighbours. The entry of a codebook that is
nearest to a latent stays the nearest when both are scaled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.encoders.first_stage import FirstStage, NetworkStage, VQStage

LEAST_LOG_VARIANCE = -30.0
"""The lowest log-variance that diffusers does not clamp: a standard deviation of 3e-7."""


@torch.no_grad()
def folded(
    first_stage: FirstStage, fixed: float | None, *, mean_only: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, weights) of a diffusers AutoencoderKL or VQModel with scaling_factor `fixed`, None = the stage's own
    scale and shift. mean_only: its posterior has (almost) no variance, as a VQModel, which has none."""
    stage, channels = first_stage.float32(), first_stage.latent_channels
    assert isinstance(stage, NetworkStage), "latents that are pixels have no network"
    model = stage.model
    if isinstance(stage, VQStage):
        return _folded_codebook(stage, fixed)
    config = dict(model.config) | {"use_quant_conv": True, "use_post_quant_conv": True}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    inside, outside = (_convolution(state, name, size) for name, size in _convolutions(channels))
    if fixed is not None:
        ratio, shift = first_stage.scale / fixed, first_stage.shift
        config |= {"scaling_factor": fixed, "shift_factor": None}
        weight, bias = outside
        outside = weight / ratio, bias + shift * weight.sum(dim=(1, 2, 3))
        weight, bias = (tensor.clone() for tensor in inside)
        weight[:channels] *= ratio
        bias[:channels] = (bias[:channels] - shift) * ratio
        bias[channels:] += 2 * math.log(ratio)
        inside = weight, bias
    if mean_only:
        weight, bias = (tensor.clone() for tensor in inside)
        weight[channels:], bias[channels:] = 0.0, LEAST_LOG_VARIANCE
        inside = weight, bias
    for (name, _), convolution in zip(_convolutions(channels), (inside, outside), strict=True):
        state |= {f"{name}.weight": convolution[0].contiguous(), f"{name}.bias": convolution[1].contiguous()}
    return config, state


def _folded_codebook(stage: VQStage, fixed: float | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As folded, of a VQModel. Raises ConfigError for one whose norms are given the codebook's entries as well."""
    config = dict(stage.model.config) | {"scaling_factor": stage.scale if fixed is None else fixed}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in stage.model.state_dict().items()}
    ratio = 1.0 if fixed is None else stage.scale / fixed
    if ratio != 1 and config["norm_type"] == "spatial":
        raise ConfigError(
            f"the autoencoder's norms read its codebook (norm_type=spatial), so its latents of scale {stage.scale:g} "
            f"cannot become those of scale {fixed:g} that the pipeline wants"
        )
    for name, factor in (
        ("quant_conv.weight", ratio),
        ("quant_conv.bias", ratio),
        ("quantize.embedding.weight", ratio),
        ("post_quant_conv.weight", 1 / ratio),
    ):
        state[name] = state[name] * factor
    return config, state


def _convolutions(channels: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """The 1x1 convolutions after the encoder and before the decoder, with their channels."""
    return ("quant_conv", 2 * channels), ("post_quant_conv", channels)


def _convolution(state: dict[str, Tensor], name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Weight (C, C, 1, 1) and bias (C,); the identity where the autoencoder has none."""
    if f"{name}.weight" in state:
        return state[f"{name}.weight"], state[f"{name}.bias"]
    return torch.eye(channels)[:, :, None, None], torch.zeros(channels)
