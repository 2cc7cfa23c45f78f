"""The UNet's weights in other software's layouts, without loss in either direction.

    diffusers   UNet2DConditionModel, or UNet2DModel for a model without context
    compvis     the released latent diffusion and Stable Diffusion checkpoints: keys under "model.diffusion_model."

Each layout is a walk over the network that pairs our modules with theirs. Tensors differ in three ways only: we fuse
projections of one input (their q, k, v are our rows), we hold 1x1 convolutions as matrices, and CompVis orders the rows
of fused pixel attention by head first. A key without a partner raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.errors import WeightsError
from pipeline.interchange.unet_config import diffusers_class as diffusers_class
from pipeline.interchange.unet_config import diffusers_config as diffusers_config
from pipeline.models.unet.layers import PixelAttention, ResBlock, Transformer
from pipeline.models.unet.model import Block, UNet
from pipeline.models.weights import require_finite

COMPVIS_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Pair:
    """One of our modules and the modules of another layout that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]  # modules that hold our rows, cut into as many equal parts
    bias: bool = True
    ones: int = 0  # trailing dimensions of size one that only their weight has
    heads: int = 0  # rows are (3, heads, width) here and (heads, 3, width) there

    def export(self, ours: Tensor, weight: bool) -> list[Tensor]:
        """Our tensor as copies in their layout."""
        if self.heads:
            ours = ours.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        parts = [part.clone() for part in ours.chunk(len(self.theirs))]
        return [part.reshape(*part.shape, *[1] * self.ones) if weight else part for part in parts]

    def adopt(self, theirs: list[Tensor], weight: bool) -> Tensor:
        """Their tensors as one copy in our layout."""
        ones = self.ones if weight else 0
        joined = torch.cat([part.reshape(part.shape[: part.ndim - ones]) for part in theirs])
        if self.heads:
            joined = joined.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return joined


# --------------------------------------------------------------------------------------------------------------------
# Conversions


def to_diffusers(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our UNet's state dict -> diffusers'. Raises WeightsError for keys that are missing or unknown."""
    return _export(state_dict, _meta(config), "diffusers", "")


def from_diffusers(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """diffusers' UNet state dict -> ours. Raises WeightsError for keys or shapes of another architecture."""
    return _adopt(state_dict, _meta(config), "diffusers", "")


def to_compvis(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our UNet's state dict -> CompVis' `model.diffusion_model.*`. Raises WeightsError as to_diffusers does."""
    return _export(state_dict, _meta(config), "compvis", COMPVIS_PREFIX)


def from_compvis(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The UNet of a CompVis checkpoint -> ours. Keys outside `model.diffusion_model.` (autoencoder, text tower, EMA)
    are ignored. Raises WeightsError as from_diffusers does."""
    unet = {key: value for key, value in state_dict.items() if key.startswith(COMPVIS_PREFIX)}
    return _adopt(unet, _meta(config), "compvis", COMPVIS_PREFIX)


def _export(state_dict: Mapping[str, Tensor], unet: UNet, layout: str, prefix: str) -> dict[str, Tensor]:
    pairs = list(_pairs(unet, layout))
    _check_keys(state_dict, [key for pair in pairs for key in _keys(pair, (pair.ours,))])
    theirs: dict[str, Tensor] = {}
    for pair in pairs:
        for kind in _kinds(pair):
            parts = pair.export(state_dict[f"{pair.ours}.{kind}"], kind == "weight")
            theirs |= {f"{prefix}{module}.{kind}": part for module, part in zip(pair.theirs, parts, strict=True)}
    return theirs


def _adopt(state_dict: Mapping[str, Tensor], unet: UNet, layout: str, prefix: str) -> dict[str, Tensor]:
    pairs = list(_pairs(unet, layout))
    _check_keys(state_dict, [prefix + key for pair in pairs for key in _keys(pair, pair.theirs)])
    ours = {}
    for pair in pairs:
        for kind in _kinds(pair):
            names = [f"{prefix}{module}.{kind}" for module in pair.theirs]
            expected = pair.export(unet.get_parameter(f"{pair.ours}.{kind}"), kind == "weight")
            for name, expected_part in zip(names, expected, strict=True):
                if state_dict[name].shape != expected_part.shape:
                    raise WeightsError(
                        f"weights of another architecture: {name} is {tuple(state_dict[name].shape)} where "
                        f"model={unet.config.name} has {tuple(expected_part.shape)}"
                    )
                require_finite(name, state_dict[name])
            ours[f"{pair.ours}.{kind}"] = pair.adopt([state_dict[name] for name in names], kind == "weight")
    return ours


def _meta(config: ModelConfig) -> UNet:
    """The network's modules and shapes, on the meta device, without memory."""
    with torch.device("meta"):
        return UNet(config)


def _kinds(pair: Pair) -> tuple[str, ...]:
    return ("weight", "bias") if pair.bias else ("weight",)


def _keys(pair: Pair, modules: Iterable[str]) -> list[str]:
    return [f"{module}.{kind}" for module in modules for kind in _kinds(pair)]


def _check_keys(state_dict: Mapping[str, Tensor], expected: list[str]) -> None:
    missing, unknown = sorted(set(expected) - set(state_dict)), sorted(set(state_dict) - set(expected))
    if missing or unknown:
        problems = [
            f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise WeightsError(f"weights of another architecture ({'; '.join(problems)})")


# --------------------------------------------------------------------------------------------------------------------
# Layouts

TOP = {
    "diffusers": {
        "embed_timestep.linear1": "time_embedding.linear_1",
        "embed_timestep.linear2": "time_embedding.linear_2",
        "embed_vector.linear1": "class_embedding.linear_1",
        "embed_vector.linear2": "class_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    "compvis": {
        "embed_timestep.linear1": "time_embed.0",
        "embed_timestep.linear2": "time_embed.2",
        "embed_vector.linear1": "label_emb.0.0",
        "embed_vector.linear2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    },
}
TEXT_TIME = {  # where the vector is SDXL's: pooled text, then sinusoids of sizes and crop
    "embed_vector.linear1": "add_embedding.linear_1",
    "embed_vector.linear2": "add_embedding.linear_2",
}
RES_BLOCK = {
    "diffusers": {
        "norm1": "norm1",
        "conv1": "conv1",
        "embed": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
    "compvis": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embed": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
}
TRANSFORMER_BLOCK = (  # the same in both layouts
    Pair("norm_self", ("norm1",)),
    Pair("attend_self.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), bias=False),
    Pair("attend_self.out", ("attn1.to_out.0",)),
    Pair("norm_cross", ("norm2",)),
    Pair("attend_cross.q", ("attn2.to_q",), bias=False),
    Pair("attend_cross.kv", ("attn2.to_k", "attn2.to_v"), bias=False),
    Pair("attend_cross.out", ("attn2.to_out.0",)),
    Pair("norm_feed", ("norm3",)),
    Pair("feed.up", ("ff.net.0.proj",)),
    Pair("feed.down", ("ff.net.2",)),
)


def _pairs(unet: UNet, layout: str) -> Iterator[Pair]:
    """Every module of the network with its partner, in the network's order."""
    top = TOP[layout] | (TEXT_TIME if layout == "diffusers" and unet.config.vector_time_ids else {})
    for ours, theirs in top.items():
        if unet.embed_vector is not None or not ours.startswith("embed_vector"):
            yield Pair(ours, (theirs,))
    diffusers, linear = layout == "diffusers", unet.config.linear_projection

    k = 1  # CompVis' lists are flat
    for i, level in enumerate(unet.encoder):
        for j, block in enumerate(level.blocks):
            res = f"down_blocks.{i}.resnets.{j}" if diffusers else f"input_blocks.{k}.0"
            attention = f"down_blocks.{i}.attentions.{j}" if diffusers else f"input_blocks.{k}.1"
            yield from _block(block, layout, f"encoder.{i}.blocks.{j}", res, attention, linear)
            k += 1
        if level.resample is not None:
            down = f"down_blocks.{i}.downsamplers.0" if diffusers else f"input_blocks.{k}.0"
            yield from _resample(level.resample, layout, f"encoder.{i}.resample", down, "conv" if diffusers else "op")
            k += 1

    parts = ("resnets.0", "attentions.0", "resnets.1") if diffusers else ("0", "1", "2")
    res, attention, res_after = (f"{'mid_block' if diffusers else 'middle_block'}.{part}" for part in parts)
    yield from _block(unet.middle[0], layout, "middle.0", res, attention, linear)
    yield from _block(unet.middle[1], layout, "middle.1", res_after, "", linear)

    k = 0
    for i, level in enumerate(unet.decoder):
        for j, block in enumerate(level.blocks):
            res = f"up_blocks.{i}.resnets.{j}" if diffusers else f"output_blocks.{k}.0"
            attention = f"up_blocks.{i}.attentions.{j}" if diffusers else f"output_blocks.{k}.1"
            yield from _block(block, layout, f"decoder.{i}.blocks.{j}", res, attention, linear)
            k += 1
        if level.resample is not None:
            after = 1 if block.attention is None else 2  # CompVis puts it in the list of the level's last block
            up = f"up_blocks.{i}.upsamplers.0" if diffusers else f"output_blocks.{k - 1}.{after}"
            yield from _resample(level.resample, layout, f"decoder.{i}.resample", up, "conv")


def _resample(module: nn.Module, layout: str, ours: str, theirs: str, conv: str) -> Iterator[Pair]:
    """What changes the resolution. theirs: its name in the other layout. conv: there the name of a single
    convolution."""
    if isinstance(module, ResBlock):
        yield from _res(module, layout, ours, theirs)
    else:
        yield Pair(f"{ours}.conv", (f"{theirs}.{conv}",))


def _res(module: ResBlock, layout: str, ours: str, theirs: str) -> Iterator[Pair]:
    for our_name, their_name in RES_BLOCK[layout].items():
        if our_name != "skip" or not isinstance(module.skip, nn.Identity):
            yield Pair(f"{ours}.{our_name}", (f"{theirs}.{their_name}",))


def _block(block: Block, layout: str, ours: str, res: str, attention: str, linear: bool) -> Iterator[Pair]:
    """A residual block and its attention. res, attention: names of the two modules in the other layout."""
    yield from _res(block.res, layout, f"{ours}.res", res)
    if isinstance(block.attention, Transformer):
        ones = 0 if linear else 2
        yield Pair(f"{ours}.attention.norm", (f"{attention}.norm",))
        yield Pair(f"{ours}.attention.project_in", (f"{attention}.proj_in",), ones=ones)
        for depth in range(len(block.attention.blocks)):
            for pair in TRANSFORMER_BLOCK:
                names = tuple(f"{attention}.transformer_blocks.{depth}.{name}" for name in pair.theirs)
                yield replace(pair, ours=f"{ours}.attention.blocks.{depth}.{pair.ours}", theirs=names)
        yield Pair(f"{ours}.attention.project_out", (f"{attention}.proj_out",), ones=ones)
    elif isinstance(block.attention, PixelAttention):
        heads = block.attention.attend.heads
        qkv, out = f"{ours}.attention.attend.qkv", f"{ours}.attention.attend.out"
        if layout == "diffusers":
            yield Pair(f"{ours}.attention.norm", (f"{attention}.group_norm",))
            yield Pair(qkv, tuple(f"{attention}.to_{name}" for name in "qkv"))
            yield Pair(out, (f"{attention}.to_out.0",))
        else:
            yield Pair(f"{ours}.attention.norm", (f"{attention}.norm",))
            yield Pair(qkv, (f"{attention}.qkv",), ones=1, heads=heads)
            yield Pair(out, (f"{attention}.proj_out",), ones=1)
