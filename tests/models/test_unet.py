from dataclasses import replace

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.diffusion.conditioning import ContextCache
from pipeline.errors import ConfigError, ShapeError
from pipeline.models.unet.layers import CrossAttention, Transformer, timestep_features
from pipeline.models.unet.model import Block, UNet

SD1 = ModelConfig(
    name="sd1",
    channels=320,
    multipliers=(1, 2, 4, 4),
    attention=(1, 2, 4),
    heads=8,
    context_width=768,
)
SD2 = replace(SD1, name="sd2", heads=0, head_width=64, context_width=1024, linear_projection=True)
TINY = ModelConfig(channels=32, multipliers=(1, 2), attention=(2,), blocks=1, heads=2, context_width=16, norm_groups=8)


def built(config: ModelConfig, seed: int = 0, **arguments: int) -> UNet:
    """A UNet without zero weights, so that every part affects its output."""
    unet = UNet(config, **arguments)
    unet.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def inputs(config: ModelConfig, batch: int = 3, height: int = 8, width: int = 8) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(batch, config.in_channels, height, width, generator=g)
    return x, torch.tensor([1, 500, 999])[:batch], torch.randn(batch, 5, config.context_width, generator=g)


@pytest.mark.parametrize(("config", "parameters"), [(SD1, 859_520_964), (SD2, 865_910_724)])
def test_stable_diffusion_has_the_published_number_of_parameters(config, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet(config).parameters()) == parameters


def test_the_unconditional_celeba_model_has_the_papers_274_million_parameters():
    config = ModelConfig(
        in_channels=3,
        out_channels=3,
        channels=224,
        multipliers=(1, 2, 3, 4),
        attention=(8, 4, 2),
        heads=0,
        head_width=32,
        context_width=0,
    )
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet(config).parameters()) == 274_056_163


def test_the_first_prediction_is_zero_and_every_branch_starts_as_the_identity():
    unet = UNet(TINY)
    unet.reset_parameters(0)
    assert not unet(*inputs(TINY)).any()
    block = unet.encoder[1].blocks[0]
    assert not block.res.conv2.weight.any()
    assert isinstance(block.attention, Transformer)
    assert not block.attention.project_out.weight.any()
    torch.nn.init.ones_(unet.conv_out.weight)
    assert unet(*inputs(TINY)).any()


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = UNet(TINY)
    a.reset_parameters(3)
    torch.manual_seed(2)
    b = UNet(TINY)
    b.reset_parameters(3)
    c = UNet(TINY)
    c.reset_parameters(4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv_in.weight, c.conv_in.weight)
    bound = 1 / (4 * 9) ** 0.5
    assert 0.9 * bound < a.conv_in.weight.abs().max() <= bound


def test_prediction_takes_non_square_latents_and_a_batch_of_one():
    unet = built(TINY)
    x, t, context = inputs(TINY, batch=3, height=4, width=12)
    together = unet(x, t, context)
    assert together.shape == (3, 4, 4, 12)
    alone = unet(x[1:2], t[1:2], context[1:2])
    assert torch.allclose(alone, together[1:2], atol=1e-5)


def test_every_input_changes_the_prediction():
    config = replace(TINY, vector_width=6)
    unet = built(config)
    x, t, context = inputs(config)
    vector = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    base = unet(x, t, context, None, vector)
    for changed in (
        unet(x + 0.1, t, context, None, vector),
        unet(x, t - 1, context, None, vector),
        unet(x, t, context.flip(0), None, vector),
        unet(x, t, context, None, vector + 1),
    ):
        assert ((changed - base).flatten(1).norm(dim=1) > 1e-5).any()


def test_masked_context_tokens_are_not_read():
    unet = built(TINY)
    x, t, context = inputs(TINY)
    for read in ([0, 1, 2], [0, 2], [4]):
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask[:, read] = True
        short = unet(x, t, context[:, read])
        assert torch.allclose(unet(x, t, context, mask), short, atol=1e-5)
        assert not torch.allclose(unet(x, t, context), short, atol=1e-5)


def test_concatenated_channels_widen_the_input_only():
    unet = UNet(TINY, in_channels=9)
    assert unet.config.in_channels == 9
    assert unet(torch.zeros(1, 9, 8, 8), torch.tensor([0]), torch.zeros(1, 5, 16)).shape == (1, 4, 8, 8)
    with pytest.raises(ShapeError, match="9, H, W"):
        unet(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.zeros(1, 5, 16))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        unet = built(replace(TINY, checkpointing=checkpointing))
        unet(*inputs(TINY)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None]))
    assert len(gradients[0]) == sum(p.numel() for p in unet.parameters())
    assert gradients[0].norm() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


def test_bfloat16_weights_take_float32_inputs_and_exact_timesteps():
    unet = built(TINY)
    x, t, context = inputs(TINY)
    exact = unet(x, t, context)
    rounded = unet.bfloat16()(x, t, context)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03
    assert not torch.equal(rounded, unet(x, t + 1, context))  # 1, 500 and 999 do not round to their neighbours


def test_timestep_features_are_cosines_then_sines_of_falling_frequency():
    features = timestep_features(torch.tensor([0, 10]), 6)
    assert features.dtype == torch.float32
    assert features[0].tolist() == [1, 1, 1, 0, 0, 0]
    angle = 10 * torch.tensor([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    assert torch.allclose(features[1], torch.cat([angle.cos(), angle.sin()]), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(9, 8), (8, 7)])
def test_sizes_that_do_not_halve_are_refused(height, width):
    with pytest.raises(ShapeError, match="multiples of 2"):
        UNet(TINY)(*inputs(TINY, height=height, width=width))


def test_missing_or_wrong_conditioning_is_refused():
    x, t, context = inputs(TINY)
    with pytest.raises(ShapeError, match="context of width 16"):
        UNet(TINY)(x, t)
    with pytest.raises(ShapeError, match="given width 17"):
        UNet(TINY)(x, t, torch.zeros(3, 5, 17))
    with pytest.raises(ShapeError, match="vector of width 0"):
        UNet(TINY)(x, t, context, None, torch.zeros(3, 2))


@pytest.mark.parametrize("change", [{"heads": 5}, {"heads": 0, "head_width": 48}, {"heads": 0}, {"head_width": 8}])
def test_heads_that_do_not_fit_are_refused(change):
    with pytest.raises(ConfigError, match="head"):
        UNet(replace(TINY, **change))


@pytest.mark.parametrize("masked", [False, True])
def test_a_context_is_projected_once_for_all_passes_that_share_what_is_known(masked, monkeypatch):
    config = ModelConfig(channels=16, multipliers=(1, 2), attention=(1, 2), heads=2, context_width=12, norm_groups=8)
    unet = UNet(config)
    unet.reset_parameters(0)
    torch.nn.init.normal_(unet.conv_out.weight)
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 6, 12, generator=g)
    mask = torch.arange(6)[None] < torch.tensor([[4], [2]]) if masked else None
    projected = []
    attentions = [part for part in unet.modules() if isinstance(part, CrossAttention)]
    for part in attentions:
        part.kv.register_forward_hook(lambda *_: projected.append(1))
    context_cache: ContextCache = {}
    with torch.no_grad():
        for timestep in (900, 20):
            t = torch.full((2,), timestep)
            assert torch.equal(unet(x, t, context, mask, context_cache=context_cache), unet(x, t, context, mask))
    assert len(context_cache) == len(attentions)
    assert len(projected) == 3 * len(attentions)


def test_tokens_that_no_row_attends_to_are_not_computed_with():
    config = ModelConfig(channels=16, multipliers=(1, 2), attention=(1, 2), heads=2, context_width=12, norm_groups=8)
    unet = UNet(config)
    seen = []
    for part in unet.modules():
        if isinstance(part, CrossAttention):
            part.kv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    mask = torch.arange(6)[None] < torch.tensor([[4], [2]])
    unet(torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.randn(2, 6, 12), mask)
    assert set(seen) == {4}


def test_compiled_blocks_compute_the_same_for_every_size_and_keep_their_names():
    unet = built(TINY)
    plain = [unet(*inputs(TINY, height=side, width=8)) for side in (8, 4)]
    names, calls = list(unet.state_dict()), []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    unet.compile_blocks(backend)
    compiled = [unet(*inputs(TINY, height=side, width=8)) for side in (8, 4)]
    assert len(calls) >= len({tuple(p.shape for p in b.parameters()) for b in unet.modules() if isinstance(b, Block)})
    assert list(unet.state_dict()) == names
    for one, other in zip(compiled, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
