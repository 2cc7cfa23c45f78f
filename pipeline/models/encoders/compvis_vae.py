"""An autoencoder's weights between diffusers' AutoencoderKL and CompVis' `first_stage_model.*`, without loss.

The two differ in names, and in attention: diffusers holds its projections as matrices, CompVis as 1x1 convolutions.
CompVis counts the decoder's levels from the finest, diffusers in the order in which they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from pipeline.errors import WeightsError

PREFIX = "first_stage_model."
RESNET = {  # diffusers: CompVis
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
OUTSIDE = ("quant_conv", "post_quant_conv")
MATRIX = re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")


def to_compvis(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict -> CompVis', without a prefix. Raises WeightsError for a name that has no partner."""
    partners = dict(_modules(state_dict))
    renamed = {_partner(name, partners): tensor for name, tensor in state_dict.items()}
    return {name: t[:, :, None, None] if MATRIX.search(name) else t for name, t in renamed.items()}


def from_compvis(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CompVis' names, with or without their prefix -> diffusers'. What is no part of the autoencoder (the loss that it
    was trained with, the rest of a Stable Diffusion checkpoint) is left alone. Raises WeightsError as to_compvis."""
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
    parts = ("encoder.", "decoder.", *(f"{name}." for name in OUTSIDE))
    kept = {name: tensor for name, tensor in bare.items() if name.startswith(parts)}
    partners = {theirs: ours for ours, theirs in _modules(kept)}
    return {
        _partner(name, partners): t[:, :, 0, 0] if MATRIX.search(name) and t.ndim == 4 else t
        for name, t in kept.items()
    }


def is_compvis(state_dict: Iterable[str]) -> bool:
    """Whether these are CompVis' names, with or without their prefix."""
    return any(name.removeprefix(PREFIX).startswith("encoder.down.") for name in state_dict)


def _partner(name: str, partners: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    if module not in partners or kind not in ("weight", "bias"):
        raise WeightsError(f"{name} is no weight of an autoencoder that both layouts know")
    return f"{partners[module]}.{kind}"


def _modules(state_dict: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(diffusers' name, CompVis' name) of every module that an autoencoder with as many levels and blocks may have."""
    found = [re.match(r"decoder\.up(?:_blocks)?\.(\d+)\.(?:resnets|block)\.(\d+)\.", name) for name in state_dict]
    levels = 1 + max((int(match[1]) for match in found if match), default=0)
    blocks = 1 + max((int(match[2]) for match in found if match), default=0)
    for side, way in (("encoder", "down"), ("decoder", "up")):
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i
            mine, theirs = f"{side}.{way}_blocks.{i}", f"{side}.{way}.{level}"
            for j in range(blocks):
                yield from _named(f"{mine}.resnets.{j}", f"{theirs}.block.{j}", RESNET)
                yield from _named(f"{mine}.attentions.{j}", f"{theirs}.attn.{j}", ATTENTION)
            yield f"{mine}.{way}samplers.0.conv", f"{theirs}.{way}sample.conv"
        for j in (0, 1):
            yield from _named(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", RESNET)
        yield from _named(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", ATTENTION)
        yield from _named(side, side, ENDS)
    yield from ((name, name) for name in OUTSIDE)


def _named(mine: str, theirs: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((f"{mine}.{ours}", f"{theirs}.{other}") for ours, other in names.items())
