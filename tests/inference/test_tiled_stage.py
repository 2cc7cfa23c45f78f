"""inference/tiles/stage.py: what tiles change of an autoencoder, and what they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from made.first_stages import kl_stage, vq_folder
from pipeline.config import EncodersConfig
from pipeline.inference.tiles import stage as tiled_stage
from pipeline.inference.tiles.field import decoder_reach, encoder_reach
from pipeline.inference.tiles.norms import TileNorm, WholeStatistics
from pipeline.inference.tiles.stage import TiledStage, Way, overlap_of
from pipeline.inference.tiles.windows import windows
from pipeline.models.encoders.autoencoder import STABLE_DIFFUSION, load_network
from pipeline.models.encoders.first_stage import NetworkStage

WHOLE = Way(middle="whole", norms="whole")


@pytest.fixture(scope="module", params=["kl", "vq", "spatial"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NetworkStage:
    """With attention in the middle block; of each kind one whose decoder sees 5 positions far after it."""
    if request.param == "kl":
        return kl_stage()
    changes: dict[str, Any] = (
        {"norm_type": "spatial", "block_out_channels": (32, 32)} if request.param == "spatial" else {}
    )
    folder = vq_folder(tmp_path_factory.mktemp(request.param), scaling_factor=0.5, **changes)
    return load_network(EncodersConfig(vae=str(folder)))


def latents(stage: NetworkStage, height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, stage.latent_channels, height, width, generator=torch.Generator().manual_seed(0))


def images(height: int, width: int, count: int = 2) -> Tensor:
    """Smooth pictures of noise."""
    noise = torch.randn(count, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, scale_factor=4, mode="bilinear").clamp(-1, 1)


def test_what_one_tile_covers_is_the_stages_own_to_the_bit(stage: NetworkStage) -> None:
    tiled, z, x = TiledStage(stage, 16), latents(stage, 12, 16), images(24, 32)
    assert torch.equal(tiled.decode(z), stage.decode(z))
    assert torch.equal(tiled.encode(x), stage.encode(x)) and torch.equal(tiled.mean(x), stage.mean(x))
    assert tiled.float32() is tiled and tiled.stored == stage.stored
    one_by_one = TiledStage(stage, 16, at_once=12 * 16)
    torch.testing.assert_close(one_by_one.decode(z), stage.decode(z), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one_by_one.encode(x), stage.encode(x), rtol=1e-4, atol=1e-4)


def test_whole_statistics_make_tiles_of_a_decoder_what_the_whole_decoder_gives(stage: NetworkStage) -> None:
    """Where a tile is wider than what a position sees, and norms take the whole picture's statistics. Those of later
    norms depend a little on earlier ones, which in the first pass took the tile's."""
    z = latents(stage, 24, 40)
    whole = stage.decode(z)
    errors = {
        way: float((TiledStage(stage, 16, 8, way=way).decode(z) - whole).square().mean().sqrt())
        for way in (Way("tile", "tile"), Way("whole", "tile"), WHOLE)
    }
    assert errors[WHOLE] < errors[Way("whole", "tile")] < errors[Way("tile", "tile")], errors
    assert errors[WHOLE] < 0.6 * errors[Way("tile", "tile")], errors


def test_seams_need_no_more_than_the_overlap_that_is_chosen(stage: NetworkStage, monkeypatch: Any) -> None:
    """With the statistics of the whole decoder itself, what is left is what zeros at tiles' borders change. The weights
    there are small."""
    z = latents(stage, 24, 96, 1)
    whole = stage.decode(z)
    norms = WholeStatistics(stage.model.decoder)
    (only,) = windows(24, 96, 96, 0)

    def exact(tiled: TiledStage, norms: WholeStatistics, *_: Any) -> None:
        with norms.gathered_from(only):
            given = stage.network_input(z)
            tiled._after_middle(tiled._until_middle(given), given)

    monkeypatch.setattr(TiledStage, "_gather", exact)
    side = 2 * overlap_of(stage.model, 1000)
    assert side == 32
    blended, cut = (TiledStage(stage, side, o, way=WHOLE).decode(z) - whole for o in (None, 0))
    assert blended.square().mean() < 0.01 * cut.square().mean() > 0
    assert blended.abs().max() < 0.3 * cut.abs().max()
    assert all(norm.statistics is norm.seen is None for norm in norms.norms)


def test_pictures_are_encoded_in_tiles(stage: NetworkStage) -> None:
    x = images(48, 80)
    whole, tiled = stage.encode(x), TiledStage(stage, 16)
    found = tiled.encode(x)
    assert found.shape == whole.shape and found.dtype == torch.float32
    spread = whole.std()
    assert (found - whole).square().mean().sqrt() < 0.3 * spread
    seamed = TiledStage(stage, 16, 0).encode(x)
    assert (found - whole).square().mean() < (seamed - whole).square().mean()
    assert torch.equal(tiled.mean(x), found[:, : stage.latent_channels])


def test_images_in_tiles_do_not_depend_on_their_batch(stage: NetworkStage, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiled_stage, "TOGETHER", 2 * 8 * 8)
    z, tiled = latents(stage, 12, 20, 3), TiledStage(stage, 8, 4, way=WHOLE)
    alone = torch.cat([tiled.decode(one[None]) for one in z])
    torch.testing.assert_close(tiled.decode(z), alone, rtol=1e-3, atol=1e-4)


def test_the_sum_of_tiles_is_float32_and_clamped(stage: NetworkStage) -> None:
    pictures = TiledStage(stage, 8, 4).decode(5 * latents(stage, 12, 20))
    assert pictures.dtype == torch.float32 and pictures.abs().max() <= 1
    assert (pictures.abs() == 1).any()


# --------------------------------------------------------------------------------------------------------------------
# Norms and fields


def test_a_tile_norm_is_a_group_norm_to_the_bit_until_it_is_told_statistics() -> None:
    norm = nn.GroupNorm(4, 8, eps=1e-3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = torch.randn(2, 8, 6, 10) * 3 + 1
    network = nn.Sequential(norm)
    whole = WholeStatistics(network)
    assert isinstance(network[0], TileNorm)
    assert torch.equal(network(x), norm(x)) and network.state_dict().keys() == {"0.weight", "0.bias"}
    for window in windows(6, 10, 4, 2):
        with whole.gathered_from(window):
            network(window.of(x))
    with whole.applied():
        for window in windows(6, 10, 4, 2):
            torch.testing.assert_close(network(window.of(x)), window.of(norm(x)))
            rows = network(window.of(x).flatten(2))
            torch.testing.assert_close(rows, window.of(norm(x)).flatten(2))
            half = network(window.of(x).bfloat16())
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), window.of(norm(x)), rtol=0.05, atol=0.05)
    assert torch.equal(network(x), norm(x))


class Fixed(nn.Module):
    """A norm whose statistics do not depend on its input: what it sees is then what convolutions see."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x * 0.5


def local(model: Any) -> Any:
    """The model without what sees everything."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.GroupNorm):
            model.set_submodule(name, Fixed())
    for half in (model.encoder, model.decoder):
        half.mid_block.attentions = nn.ModuleList([Fixed()])
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_out_channels": (8, 8, 8), "layers_per_block": 2}
        | {
            f"{way}_block_types": (f"{kind}Block2D",) * 3
            for way, kind in (("down", "DownEncoder"), ("up", "UpDecoder"))
        },
    ],
)
def test_fields_are_what_gradients_reach(changes: dict[str, Any]) -> None:
    stage = kl_stage(**changes)
    factor, before_middle = stage.downsampling, encoder_reach(stage.model)
    reaches = {middle: decoder_reach(stage.model, middle=middle) for middle in (True, False)}
    model = local(stage.model)
    model.decoder.mid_block.attentions = model.encoder.mid_block.attentions = nn.ModuleList([None])  # type: ignore[list-item]
    for middle, reach in reaches.items():
        assert reach is not None or middle
        z = torch.randn(1, stage.latent_channels, 60, 60, requires_grad=True)
        h = model.decoder.mid_block(model.decoder.conv_in(z)) if middle else model.decoder.conv_in(z).detach()
        h = h if middle else h.requires_grad_()
        y = h
        for block in model.decoder.up_blocks:
            y = block(y)
        y = model.decoder.conv_out(model.decoder.conv_act(y))
        cell = y[..., 30 * factor : 31 * factor, 30 * factor : 31 * factor].square().sum()
        (gradient,) = torch.autograd.grad(cell, z if middle else h)
        seen = gradient[0].abs().sum((0, 1)).nonzero()[:, 0]
        found = max(30 - int(seen.min()), int(seen.max()) - 30)
        expected = decoder_reach(model, middle=True) if middle else reach
        assert found == expected
    x = torch.randn(1, 3, 60 * factor, 60 * factor, requires_grad=True)
    h = model.encoder.conv_in(x)
    for block in model.encoder.down_blocks:
        h = block(h)
    (gradient,) = torch.autograd.grad(h[..., 30, 30].square().sum(), x)
    seen = gradient[0].abs().sum((0, 1)).nonzero()[:, 0]
    first, last = 30 * factor, 31 * factor - 1
    assert max(first - int(seen.min()), int(seen.max()) - last) == before_middle


def test_overlaps_are_wider_than_fields_and_at_most_half_a_tile() -> None:
    stage = kl_stage(**{**STABLE_DIFFUSION, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4})
    assert decoder_reach(stage.model, middle=True) is None  # attention
    reach = decoder_reach(stage.model, middle=False)
    assert reach is not None and 12 <= reach <= 13 and encoder_reach(stage.model) == 68
    assert overlap_of(stage.model, 128) == 2 * reach + 2
    assert overlap_of(stage.model, 32) == 16


def test_a_model_that_attends_in_its_levels_has_no_field() -> None:
    kinds = {"down_block_types": ("AttnDownEncoderBlock2D",) * 2, "up_block_types": ("AttnUpDecoderBlock2D",) * 2}
    stage = kl_stage(**kinds)
    assert decoder_reach(stage.model, middle=False) is None and encoder_reach(stage.model) is None
    assert overlap_of(stage.model, 16) == 8
    z = latents(stage, 24, 20)
    whole = stage.decode(z)
    assert (TiledStage(stage, 16, way=WHOLE).decode(z) - whole).square().mean().sqrt() < 0.2


def test_the_folders_of_vq_models_decode_as_before_in_whole(tmp_path: Path) -> None:
    stage = load_network(EncodersConfig(vae=str(vq_folder(tmp_path / "vq"))))
    z = latents(stage, 8, 8)
    before = stage.decode(z)
    TiledStage(stage, 4, way=WHOLE)
    assert torch.equal(stage.decode(z), before)
