from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.config.loading.load import load
from pipeline.config.tasks.table import TASK_FACTS
from pipeline.errors import ConfigError, WeightsError
from pipeline.interchange import unet as convert
from pipeline.interchange.unet_config import diffusers_config
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.unet.layers import timestep_features
from pipeline.models.unet.model import UNet

SD1_LIKE = ModelConfig(
    name="sd1-like",
    channels=32,
    multipliers=(1, 2, 2, 2),
    attention=(1, 2, 4),
    heads=4,
    context_width=24,
    norm_groups=16,
)
SD2_LIKE = replace(SD1_LIKE, name="sd2-like", heads=0, head_width=16, linear_projection=True)
LAYOUT_LIKE = replace(SD2_LIKE, transformer_depth=2, blocks=1, attention=(8, 2), in_channels=7, vector_width=10)
UNCONDITIONAL = replace(SD2_LIKE, context_width=0)
SEMANTIC_LIKE = replace(SD1_LIKE, context_width=0, multipliers=(1, 2), attention=(32, 16, 8))
SDXL_LIKE = replace(
    SD2_LIKE,
    name="sdxl-like",
    multipliers=(1, 2, 4),
    attention=(2, 4),
    transformer_depth=(0, 1, 3),
    vector_width=10 + 6 * 256,
    vector_time_ids=6,
)
CHURCHES_LIKE = replace(UNCONDITIONAL, name="churches-like", resblock_updown=True, scale_shift_norm=True)
RESAMPLED = replace(UNCONDITIONAL, resblock_updown=True, attention=(1, 4))
SCALED = replace(SD1_LIKE, scale_shift_norm=True)
TINY = ModelConfig(channels=64, multipliers=(1, 2), blocks=1, attention=(1, 2), heads=4, norm_groups=8)
ALL = [SD1_LIKE, SD2_LIKE, SDXL_LIKE, TINY, LAYOUT_LIKE, UNCONDITIONAL, SEMANTIC_LIKE, CHURCHES_LIKE, RESAMPLED, SCALED]
IDS = ["sd1", "sd2", "sdxl", "tiny", "layout", "unconditional", "semantic", "churches", "resampled", "scaled"]
TIME_IDS = torch.tensor([[512, 768, 0, 16, 512, 512], [1024, 1024, 8, 0, 640, 512]])  # SDXL's sizes and crop
SD1 = replace(SD1_LIKE, channels=320, multipliers=(1, 2, 4, 4), heads=8, context_width=768, norm_groups=32)


def diffusers_model(config: ModelConfig) -> Any:
    declare_torchvision_ops()
    import diffusers

    return getattr(diffusers, convert.diffusers_class(config))(**convert.diffusers_config(config))


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        key: 0.1 * torch.randn(value.shape, generator=g) + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        for key, value in UNet(config).state_dict().items()
    }


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, config.in_channels, 16, 8, generator=g)
    context = torch.randn(2, 5, config.context_width, generator=g) if config.context_width else None
    vector = torch.randn(2, config.vector_width, generator=g) if config.vector_width else None
    if config.vector_time_ids and vector is not None:
        sinusoids = timestep_features(TIME_IDS.flatten(), 256).view(2, -1)
        vector = torch.cat([vector[:, : -sinusoids.shape[1]], sinusoids], dim=1)
    return x, torch.tensor([7, 901]), context, vector


def run_diffusers(
    model: Any, x: Tensor, t: Tensor, context: Tensor | None, vector: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    if context is None:
        return model(x, t).sample
    if model.config.addition_embed_type == "text_time":
        assert vector is not None
        added = {"text_embeds": vector[:, : -6 * 256], "time_ids": TIME_IDS}
        return model(x, t, context, added_cond_kwargs=added).sample
    return model(x, t, context, class_labels=vector, encoder_attention_mask=mask).sample


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


@pytest.mark.parametrize("config", ALL, ids=IDS)
def test_prediction_and_gradients_equal_diffusers(config):
    torch.manual_seed(0)
    theirs = diffusers_model(config)
    ours = UNet(config)
    ours.load_state_dict(convert.from_diffusers(theirs.state_dict(), config))
    x, t, context, vector = inputs(config)

    expected = run_diffusers(theirs, x, t, context, vector)
    got = ours(x, t, context, None, vector)
    assert (got - expected).norm() < 1e-5 * expected.norm()

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    # Gradients change layout as weights do.
    mine = convert.to_diffusers(gradients(ours), config)
    for name, gradient in gradients(theirs).items():
        assert (mine[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_masked_prediction_equals_diffusers():
    torch.manual_seed(0)
    theirs = diffusers_model(SD1_LIKE)
    ours = UNet(SD1_LIKE)
    ours.load_state_dict(convert.from_diffusers(theirs.state_dict(), SD1_LIKE))
    x, t, context, _ = inputs(SD1_LIKE)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        expected = run_diffusers(theirs, x, t, context, None, mask)
        assert (ours(x, t, context, mask) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("config", ALL, ids=IDS)
@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_round_trips_are_bit_equal_and_account_for_every_key(config, layout):
    to, back = getattr(convert, f"to_{layout}"), getattr(convert, f"from_{layout}")
    ours = random_state(config)
    theirs = to(ours, config)
    again = back(theirs, config)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[key], ours[key]) for key in ours)
    assert sum(value.numel() for value in theirs.values()) == sum(value.numel() for value in ours.values())
    assert all(value.is_contiguous() for value in theirs.values())
    theirs_again = to(again, config)
    assert theirs_again.keys() == theirs.keys()
    assert all(torch.equal(theirs_again[key], theirs[key]) for key in theirs)
    if layout == "diffusers":
        assert theirs.keys() == diffusers_model(config).state_dict().keys()


def test_sdxls_vector_has_the_names_that_diffusers_and_compvis_give_it():
    ours = random_state(SDXL_LIKE)
    for to, name in ((convert.to_diffusers, "add_embedding.linear_2"), (convert.to_compvis, "label_emb.0.2")):
        (found,) = (value for key, value in to(ours, SDXL_LIKE).items() if key.endswith(f"{name}.weight"))
        assert torch.equal(found, ours["embed_vector.linear2.weight"])
    plain = convert.to_diffusers(ours, replace(SDXL_LIKE, vector_time_ids=0))
    assert torch.equal(plain["class_embedding.linear_2.weight"], ours["embed_vector.linear2.weight"])


def test_no_two_exported_tensors_share_memory():
    theirs = convert.to_diffusers(random_state(SD1_LIKE), SD1_LIKE)
    assert len({value.untyped_storage().data_ptr() for value in theirs.values()}) == len(theirs)


def test_full_size_sd1_has_diffusers_keys_and_shapes():
    with torch.device("meta"):
        theirs = diffusers_model(SD1).state_dict()
        ours = convert.to_diffusers(UNet(SD1).state_dict(), SD1)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_full_size_sd1_has_compvis_keys_and_shapes():
    with torch.device("meta"):
        theirs = convert.to_compvis(UNet(SD1).state_dict(), SD1)
    shapes = {key.removeprefix("model.diffusion_model."): tuple(value.shape) for key, value in theirs.items()}
    assert len(shapes) == 686
    assert {key.split(".")[0] for key in shapes} == {
        "time_embed",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "out",
    }
    for key, shape in {
        "time_embed.0.weight": (1280, 320),
        "time_embed.2.bias": (1280,),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (320,),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
        "input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias": (320,),
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (320, 1280),
        "input_blocks.1.1.transformer_blocks.0.norm3.weight": (320,),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.9.0.op.bias": (1280,),
        "input_blocks.11.0.out_layers.0.bias": (1280,),
        "middle_block.1.transformer_blocks.0.attn1.to_v.weight": (1280, 1280),
        "middle_block.2.in_layers.2.weight": (1280, 1280, 3, 3),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.6.0.skip_connection.weight": (640, 1920, 1, 1),
        "output_blocks.11.1.proj_out.bias": (320,),
        "out.0.weight": (320,),
        "out.2.weight": (4, 320, 3, 3),
    }.items():
        assert shapes[key] == shape, key
    assert "input_blocks.10.1.norm.weight" not in shapes
    assert "input_blocks.1.1.transformer_blocks.0.attn1.to_q.bias" not in shapes


@pytest.mark.parametrize("config", [config for config in ALL if config.context_width], ids=lambda config: config.name)
def test_diffusers_own_conversion_reads_what_compvis_is_given(config):
    declare_torchvision_ops()
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours = random_state(config)
    read = convert_ldm_unet_checkpoint(convert.to_compvis(ours, config), dict(diffusers_model(config).config))
    expected = convert.to_diffusers(ours, config)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_compvis_pixel_attention_has_its_rows_by_head_first():
    config = UNCONDITIONAL
    ours = random_state(config)
    rows = 3 * 32
    ours["encoder.0.blocks.0.attention.attend.qkv.bias"] = torch.arange(float(rows))
    theirs = convert.to_compvis(ours, config)["model.diffusion_model.input_blocks.1.1.qkv.bias"]
    # 2 heads of width 16: q, k, v of head 0, then q, k, v of head 1; ours are q of both heads, k of both, v of both.
    assert theirs.tolist() == [
        row
        for head in (0, 1)
        for which in (0, 1, 2)
        for row in range(32 * which + 16 * head, 32 * which + 16 * head + 16)
    ]
    assert convert.to_compvis(ours, config)["model.diffusion_model.input_blocks.1.1.qkv.weight"].shape == (rows, 32, 1)


def test_other_parts_of_a_compvis_checkpoint_are_left_alone():
    ours = random_state(SD1_LIKE)
    whole = convert.to_compvis(ours, SD1_LIKE) | {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(1),
        "model_ema.decay": torch.zeros(()),
    }
    assert convert.from_compvis(whole, SD1_LIKE).keys() == ours.keys()


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_missing_and_unknown_keys_are_named(layout):
    theirs = getattr(convert, f"to_{layout}")(random_state(SD1_LIKE), SD1_LIKE)
    missing = next(key for key in theirs if "to_k.weight" in key)
    theirs["model.diffusion_model.surprise.weight"] = theirs.pop(missing)
    with pytest.raises(WeightsError, match=r"surprise\.weight") as error:
        getattr(convert, f"from_{layout}")(theirs, SD1_LIKE)
    assert missing in str(error.value)
    ours = random_state(SD1_LIKE)
    del ours["conv_out.bias"]
    with pytest.raises(WeightsError, match=r"1 missing: conv_out\.bias"):
        getattr(convert, f"to_{layout}")(ours, SD1_LIKE)


def test_weights_of_another_shape_are_named():
    theirs = convert.to_diffusers(random_state(SD1_LIKE), SD1_LIKE)
    with pytest.raises(WeightsError, match=r"proj_in\.weight is \(32, 32, 1, 1\) where model=sd1-like has \(32, 32\)"):
        convert.from_diffusers(theirs, replace(SD1_LIKE, linear_projection=True))
    theirs["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    with pytest.raises(WeightsError, match=r"conv_in\.weight is \(32, 9, 3, 3\)"):
        convert.from_diffusers(theirs, SD1_LIKE)


@pytest.mark.parametrize(
    "config", [replace(UNCONDITIONAL, heads=4, head_width=0), replace(UNCONDITIONAL, vector_width=2)]
)
def test_models_without_a_diffusers_class_are_refused(config):
    with pytest.raises(ConfigError, match="UNet2DModel"):
        convert.diffusers_config(config)


def test_residual_blocks_that_resample_beside_cross_attention_are_refused():
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel resamples .* model\.resblock_updown=false"):
        convert.diffusers_config(replace(SD1_LIKE, resblock_updown=True))


def test_resampling_blocks_have_compvis_names_and_go_there_and_back():
    config = replace(SD1_LIKE, resblock_updown=True, scale_shift_norm=True)
    ours = random_state(config)
    theirs = convert.to_compvis(ours, config)
    prefix = "model.diffusion_model."
    assert torch.equal(theirs[f"{prefix}input_blocks.3.0.in_layers.2.weight"], ours["encoder.0.resample.conv1.weight"])
    assert torch.equal(theirs[f"{prefix}output_blocks.2.1.out_layers.3.bias"], ours["decoder.0.resample.conv2.bias"])
    assert torch.equal(theirs[f"{prefix}output_blocks.5.2.emb_layers.1.bias"], ours["decoder.1.resample.embed.bias"])
    assert theirs[f"{prefix}input_blocks.1.0.emb_layers.1.weight"].shape == (64, 128)  # scale, then shift
    back = convert.from_compvis(theirs, config)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", TASK_FACTS)
def test_diffusers_holds_the_network_of_every_recipe_of_the_demo(name: str) -> None:
    """The demo exports what it has trained, so a recipe whose network diffusers has no class for would end it there."""
    config = load("train", ["run=r", "data.train=c", f"experiment={TASK_FACTS[name].recipe}"])
    assert diffusers_config(config.model, classes=24 if config.task.makes_vector else 0)
