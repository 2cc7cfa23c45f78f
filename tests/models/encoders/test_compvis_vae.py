"""Autoencoder weights converted to CompVis' names and back, compared with diffusers' conversion and released files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import WeightsError
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.autoencoder import STABLE_DIFFUSION
from pipeline.models.encoders.packages import AutoencoderKL

SMALL: dict[str, Any] = STABLE_DIFFUSION | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}


def seeded(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL.from_config(SMALL | changes)


@pytest.mark.parametrize("changes", [{}, {"mid_block_add_attention": False, "layers_per_block": 1}], ids=["sd", "demo"])
def test_a_seeded_autoencoder_comes_back_bit_equal(changes: dict[str, Any]) -> None:
    ours = seeded(**changes).state_dict()
    theirs = compvis_vae.to_compvis(ours)
    assert compvis_vae.is_compvis(theirs) and not compvis_vae.is_compvis(ours)
    assert len(theirs) == len(ours)
    back = compvis_vae.from_compvis({f"first_stage_model.{name}": tensor for name, tensor in theirs.items()})
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


@torch.no_grad()
def test_diffusers_own_conversion_reads_what_is_written() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ours = seeded()
    theirs = {f"first_stage_model.{name}": t for name, t in compvis_vae.to_compvis(ours.state_dict()).items()}
    torch.manual_seed(1)
    loaded = AutoencoderKL.from_config(SMALL)
    loaded.load_state_dict(convert_ldm_vae_checkpoint(theirs, dict(loaded.config)))
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(x).sample, ours(x).sample)


def test_the_full_size_has_the_names_and_shapes_of_released_files() -> None:
    with torch.device("meta"):
        model = AutoencoderKL.from_config(STABLE_DIFFUSION)
    shapes = {name: tuple(t.shape) for name, t in compvis_vae.to_compvis(model.state_dict()).items()}
    assert len(shapes) == 248
    for name, shape in {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.block.1.conv2.bias": (512,),
        "encoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "decoder.mid.block_2.norm2.bias": (512,),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),  # the finest level is 0, and runs last
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.norm_out.bias": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (4,),
    }.items():
        assert shapes[name] == shape, name
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert "encoder.down.3.downsample.conv.weight" not in shapes


def test_what_else_a_checkpoint_holds_is_left_alone_and_strange_parts_are_named() -> None:
    theirs: dict[str, Tensor] = compvis_vae.to_compvis(seeded().state_dict())
    whole = {f"first_stage_model.{name}": tensor for name, tensor in theirs.items()}
    whole |= {"first_stage_model.loss.logvar": torch.zeros(()), "model.diffusion_model.out.0.bias": torch.zeros(3)}
    assert len(compvis_vae.from_compvis(whole)) == len(theirs)
    with pytest.raises(WeightsError, match=r"encoder\.surprise\.weight"):
        compvis_vae.from_compvis(theirs | {"encoder.surprise.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"decoder\.extra\.weight"):
        compvis_vae.to_compvis({"decoder.extra.weight": torch.zeros(1)})
