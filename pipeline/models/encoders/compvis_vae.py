"""Converts an autoencoder's weights between diffusers' AutoencoderKL or VQModel and CompVis' `first_stage_model.*`,
without loss.

The two differ in names and in attention, whose projections are matrices in diffusers and 1x1 convolutions in CompVis.
CompVis numbers the decoder's levels from the finest, diffusers in the order in which they run.
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
OUTSIDE = ("quant_conv", "post_quant_conv", "quantize.embedding")
MATRIX = re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")


def to_compvis(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict -> CompVis', without a prefix. Raises WeightsError for a name that CompVis does not
    have."""
    partners = dict(_modules(state_dict))
    renamed = {_partner(name, partners): tensor for name, tensor in state_dict.items()}
    return {name: t[:, :, None, None] if MATRIX.search(name) else t for name, t in renamed.items()}


def from_compvis(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CompVis' state dict, with or without a prefix -> diffusers'. Tensors outside the autoencoder (its training loss,
    the rest of a Stable Diffusion checkpoint) are left out. Raises WeightsError as to_compvis does."""
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
    parts = ("encoder.", "decoder.", *(f"{name}." for name in OUTSIDE))
    autoencoder_state = {name: tensor for name, tensor in bare.items() if name.startswith(parts)}
    partners = {compvis_name: diffusers_name for diffusers_name, compvis_name in _modules(autoencoder_state)}
    return {
        _partner(name, partners): t[:, :, 0, 0] if MATRIX.search(name) and t.ndim == 4 else t
        for name, t in autoencoder_state.items()
    }


def is_compvis(state_dict: Iterable[str]) -> bool:
    """Whether these names are CompVis', with or without a prefix."""
    return any(name.removeprefix(PREFIX).startswith("encoder.down.") for name in state_dict)


def _partner(name: str, partners: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    if module not in partners or kind not in ("weight", "bias"):
        raise WeightsError(f"{name} is no weight of an autoencoder that both layouts know")
    return f"{partners[module]}.{kind}"


def _modules(state_dict: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(diffusers' name, CompVis' name) of every module of an autoencoder with the levels and blocks of `state_dict`."""
    matches = [re.match(r"decoder\.up(?:_blocks)?\.(\d\d?)\.(?:resnets|block)\.(\d\d?)\.", name) for name in state_dict]
    levels = 1 + max((int(match[1]) for match in matches if match), default=0)
    blocks = 1 + max((int(match[2]) for match in matches if match), default=0)
    for side, way in (("encoder", "down"), ("decoder", "up")):
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i
            diffusers_part, compvis_part = f"{side}.{way}_blocks.{i}", f"{side}.{way}.{level}"
            for j in range(blocks):
                yield from _name_pairs(f"{diffusers_part}.resnets.{j}", f"{compvis_part}.block.{j}", RESNET)
                yield from _name_pairs(f"{diffusers_part}.attentions.{j}", f"{compvis_part}.attn.{j}", ATTENTION)
            yield f"{diffusers_part}.{way}samplers.0.conv", f"{compvis_part}.{way}sample.conv"
        for j in (0, 1):
            yield from _name_pairs(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", RESNET)
        yield from _name_pairs(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", ATTENTION)
        yield from _name_pairs(side, side, ENDS)
    yield from ((name, name) for name in OUTSIDE)


def _name_pairs(diffusers_part: str, compvis_part: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return (
        (f"{diffusers_part}.{diffusers_name}", f"{compvis_part}.{compvis_name}")
        for diffusers_name, compvis_name in names.items()
    )
