"""The UNets of conf/model: those of Stable Diffusion, of the paper and of SDXL, by configuration alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from made.facts import Facts
from pipeline.config import ModelConfig, TextTask
from pipeline.config.loading.folders import conf_dir
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import TextFacts
from pipeline.errors import ConfigError
from pipeline.interchange import unet as convert
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.tasks.choose import make_task
from pipeline.models.unet.layers import PixelAttention, ResBlock, Transformer
from pipeline.models.unet.model import UNet

CONCATENATED = {
    "ldm4_semantic": 3,
    "ldm4_inpainting": 4,
    "ldm4_inpainting_big": 4,
    "ldm4_superres": 3,
}  # input channels that the task adds
NOT_IN_DIFFUSERS = ("ldm4_inpainting_big", "ldm8_churches")  # without context it knows one head width for all levels
NAMES = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))


def preset(name: str) -> ModelConfig:
    config = from_dict(ModelConfig, yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text()))
    return replace(config, in_channels=config.in_channels + CONCATENATED.get(name, 0))


def meta(config: ModelConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def diffusers_meta(config: ModelConfig, **changes: Any) -> Any:
    declare_torchvision_ops()
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, convert.diffusers_class(config))(**(convert.diffusers_config(config) | changes))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "parameters"), [("sd1", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684)])
def test_published_models_have_their_number_of_parameters(name: str, parameters: int) -> None:
    assert count(meta(preset(name))) == count(diffusers_meta(preset(name))) == parameters


@pytest.mark.parametrize(
    ("name", "parameters", "papers_millions"),
    [
        ("ldm4_class", 400_920_579, 400),
        ("ldm8_class", 394_984_196, 395),
        ("ldm4_semantic", 215_230_467 - 128 * 9, 215),  # an input channel less than inpainting
        ("ldm4_inpainting", 215_230_467, 215),
        ("ldm4_inpainting_big", 387_245_827, 387),
        ("ldm4_unconditional", 274_056_163, 274),
        ("ldm8_churches", 294_966_916, 295),
        ("ldm4_layout", 246_277_379, None),  # the paper counts its encoder of boxes too
        ("ldm8_layout", 312_241_540, None),
        ("ldm4_superres", 113_618_243 + 160 * 9 * 3, None),  # the paper counts its autoencoder too
    ],
)
def test_the_papers_models_have_the_number_of_parameters_that_it_says(
    name: str, parameters: int, papers_millions: int | None
) -> None:
    assert count(meta(preset(name))) == parameters
    assert papers_millions is None or abs(parameters / 1e6 - papers_millions) < 1


def test_the_papers_text_model_has_1_45_billion_parameters_with_its_transformer() -> None:
    """And with the head of logits over its vocabulary that CompVis' transformer has and nothing reads."""
    vocabulary, width = 30_522, 1280
    text = TextFacts(layer="last", length=77, width=width, pad=0, eot=102, start=101, vocabulary=vocabulary)
    config = TextTask(encoder="transformer")
    with torch.device("meta"):
        task = make_task(config, preset("ldm_text"), Facts(text=text))
    logits = vocabulary * width + vocabulary
    assert round((count(meta(preset("ldm_text"))) + count(task) + logits) / 1e7) == 145


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_IN_DIFFUSERS])
def test_every_preset_has_the_keys_and_shapes_of_diffusers_class(name: str) -> None:
    config = preset(name)
    ours = convert.to_diffusers(meta(config).state_dict(), config)
    theirs = diffusers_meta(config).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", NOT_IN_DIFFUSERS)
def test_what_diffusers_has_no_class_for_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="UNet2DModel"):
        convert.diffusers_config(preset(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_goes_to_compvis_and_back(name: str) -> None:
    config = preset(name)
    ours = meta(config).state_dict()
    theirs = convert.to_compvis(ours, config)
    back = convert.from_compvis(theirs, config)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in ours.items()}
    assert sum(value.numel() for value in theirs.values()) == sum(value.numel() for value in ours.values())


def test_sdxl_is_built_as_its_published_configuration_says() -> None:
    """The settings of its unet/config.json, passed to diffusers' class unchanged."""
    published = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    }
    ours = convert.diffusers_config(preset("sdxl"))
    assert {key: ours[key] for key in published} == published


@pytest.mark.parametrize(
    ("name", "levels", "depths"),
    [
        ("ldm4_class", [False, True, True, True], {1}),
        ("ldm8_class", [True, True, True], {1}),
        ("ldm4_layout", [False, True, True, True], {3}),
        ("ldm4_semantic", [False, False, False], set()),
        ("ldm8_layout", [True, True, True], {2}),
        ("ldm4_inpainting", [False, False, False], set()),
        ("ldm4_inpainting_big", [False, True, True, True], set()),
        ("ldm4_superres", [False, False, False, True], set()),
        ("ldm4_unconditional", [False, True, True, True], set()),
        ("ldm8_churches", [True, True, True, True, False], set()),
        ("ldm_text", [True, True, True, False], {1}),
        ("sdxl", [False, True, True], {2, 10}),
    ],
)
def test_attention_lies_at_the_levels_that_the_paper_names(name: str, levels: list[bool], depths: set[int]) -> None:
    unet = meta(preset(name))
    assert [level.blocks[0].attention is not None for level in unet.encoder] == levels
    assert [level.blocks[0].attention is not None for level in reversed(unet.decoder)] == levels
    attention = [block.attention for level in unet.encoder for block in level.blocks] + [unet.middle[0].attention]
    assert isinstance(unet.middle[0].attention, Transformer if depths else PixelAttention)
    assert {len(one.blocks) for one in attention if isinstance(one, Transformer)} == depths


def test_depths_by_level_count_from_the_finest_and_the_middle_has_the_last() -> None:
    unet = meta(replace(preset("tiny"), transformer_depth=(1, 3)))
    depths = [len(block.attention.blocks) for level in unet.encoder for block in level.blocks]  # type: ignore[union-attr, arg-type]
    assert depths == [1, 3]
    assert len(unet.middle[0].attention.blocks) == 3  # type: ignore[union-attr, arg-type]
    assert len(unet.decoder[0].blocks[0].attention.blocks) == 3  # type: ignore[union-attr, arg-type]
    with pytest.raises(ConfigError, match="one number for each of the 2"):
        meta(replace(preset("tiny"), transformer_depth=(1, 3, 3)))


@pytest.mark.parametrize(("name", "scaled"), [("ldm8_churches", True), ("ldm4_inpainting_big", False)])
def test_released_models_that_resample_in_residual_blocks_are_built_so(name: str, scaled: bool) -> None:
    unet = meta(preset(name))
    resampling = [level.resample for level in (*unet.encoder, *unet.decoder) if level.resample is not None]
    assert len(resampling) == 2 * (len(unet.encoder) - 1)
    assert all(isinstance(one, ResBlock) and one.scale_shift == scaled for one in resampling)
    assert unet.middle[0].res.scale_shift == scaled
