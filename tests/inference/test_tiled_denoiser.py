"""inference/tiles/denoise.py: what a network sees of a window, and how windows are joined."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from made.facts import EVERYTHING, Facts
from pipeline.config import DiffusionConfig, LayoutTask, ModelConfig, SamplerConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.hooks import Hooks, Steer
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.errors import ConfigError
from pipeline.inference.packed import pack
from pipeline.inference.pictures import draw
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task

MODEL = ModelConfig(channels=16, multipliers=(1, 2), attention=(2,), blocks=1, heads=2, context_width=16, norm_groups=8)


class Pointwise(nn.Module):
    """A network whose prediction at a position depends on what it is given there, and on context and vector."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = SimpleNamespace(stride=2)
        self.batches: list[int] = []

    def forward(self, x: Tensor, timestep_B: Tensor, given: Conditioning) -> Tensor:
        assert given.context is not None and given.concat is not None and given.vector is not None
        assert given.context_mask is not None
        self.batches.append(len(x))
        context = (given.context * given.context_mask[..., None]).sum((1, 2))
        row = context + given.vector.sum(1) + timestep_B
        return x * 2 + given.concat[:, :1] * 3 + row[:, None, None, None]


def inputs(rows: int = 3, height: int = 12, width: int = 20) -> tuple[Tensor, Tensor, Conditioning]:
    g = torch.Generator().manual_seed(0)
    given = Conditioning(
        context=torch.randn(rows, 5, 4, generator=g),
        context_mask=torch.rand(rows, 5, generator=g) > 0.3,
        concat=torch.randn(rows, 2, height, width, generator=g),
        vector=torch.randn(rows, 6, generator=g),
    )
    return torch.randn(rows, 4, height, width, generator=g), torch.arange(rows), given


@pytest.mark.parametrize(("side", "overlap"), [(8, 4), (8, 2), (4, 0), (16, 8), (10, 8)])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
def test_what_is_concatenated_is_cut_with_the_window_and_the_rest_is_shared(side: int, overlap: int, most: int) -> None:
    """So a network without neighbours predicts in windows what it predicts whole."""
    network, given = Pointwise(), inputs()
    whole = network(*given)
    network.batches.clear()
    tiled: Any = TiledDenoiser(network, side, overlap, most)  # type: ignore[arg-type]
    torch.testing.assert_close(tiled(*given), whole)
    assert max(network.batches) <= most
    windows = sum(network.batches) / 3
    assert windows == int(windows) and windows >= 12 * 20 / side**2


def test_latents_that_one_window_covers_are_the_networks_own_to_the_bit() -> None:
    network, given = Pointwise(), inputs()
    tiled: Any = TiledDenoiser(network, 20, 4, 1)  # type: ignore[arg-type]
    assert torch.equal(tiled(*given), network(*given))
    assert network.batches == [3, 3]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """Of boxes, whose tokens are a context, and whose coordinates and painted boxes are concatenated."""
    task = make_task(LayoutTask(paint=2), MODEL, Facts(conditions=EVERYTHING), None)
    made = Denoiser(MODEL, task)
    made.reset_parameters(0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made.eval().requires_grad_(False)


def conditioned(denoiser: Denoiser, numbers: list[int], sides: tuple[int, int]) -> Conditioning:
    assert EVERYTHING.boxes is not None
    boxes = torch.full((8, EVERYTHING.boxes.most, 5), -1.0)
    boxes[:, 0] = torch.tensor([1, 0.1, 0.2, 0.6, 0.9])
    boxes[:, 0, 0] = torch.arange(8)
    boxes[4:, 1] = torch.tensor([3, 0.5, 0.0, 1.0, 0.5])
    batch = denoiser.task.prepare({"cond.boxes": boxes[numbers]}, 0, torch.tensor(numbers), sides=sides, training=False)
    return denoiser.task(batch)


def test_a_context_is_projected_once_and_the_prediction_is_the_same(denoiser: Denoiser) -> None:
    given = conditioned(denoiser, [0, 4, 5], (12, 20))
    x, timestep = torch.randn(3, 4, 12, 20, generator=torch.Generator().manual_seed(1)), torch.full((3,), 400)
    expected = TiledDenoiser(denoiser, 8, 4, 100)(x, timestep, given)
    for most in (1, 2, 3, 8):
        tiled, cached = TiledDenoiser(denoiser, 8, 4, most), replace(given, context_cache={})
        for _ in range(2):
            torch.testing.assert_close(tiled(x, timestep, cached), expected, rtol=1e-4, atol=1e-5)
    assert (expected - denoiser(x, timestep, given)).abs().max() > 1e-3, "windows change nothing here"


@pytest.mark.parametrize("guided", [False, True])
def test_images_in_tiles_do_not_depend_on_their_batch(denoiser: Denoiser, guided: bool) -> None:
    def drawn(numbers: list[int], side: int, most: int) -> Tensor:
        given = conditioned(denoiser, numbers, (12, 16))
        null = conditioned(denoiser, [7] * len(numbers), (12, 16)) if guided else None
        noise = initial_noise(3, torch.tensor(numbers), (4, 12, 16))
        tiled = TiledDenoiser(denoiser, side, 4, most)
        return sample(tiled, DiffusionConfig(), noise, given, null, steps=3, guidance=2.0 if guided else 1.0)

    whole = drawn([0, 1, 2, 5], 8, 64)
    torch.testing.assert_close(torch.cat([drawn([n], 8, 3) for n in (0, 1, 2, 5)]), whole, rtol=1e-3, atol=1e-4)
    plain = sample(
        denoiser,
        DiffusionConfig(),
        initial_noise(3, torch.tensor([0, 1, 2, 5]), (4, 12, 16)),
        conditioned(denoiser, [0, 1, 2, 5], (12, 16)),
        conditioned(denoiser, [7] * 4, (12, 16)) if guided else None,
        steps=3,
        guidance=2.0 if guided else 1.0,
    )
    assert torch.equal(drawn([0, 1, 2, 5], 16, 64), plain)
    assert (whole - plain).abs().max() > 1e-3


def test_packed_weights_take_windows_as_well(denoiser: Denoiser) -> None:
    packed = Denoiser(MODEL, denoiser.task).requires_grad_(False)
    packed.load_state_dict(denoiser.state_dict())
    pack(packed.unet)
    given = conditioned(denoiser, [0, 4], (12, 16))
    x, timestep = torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(1)), torch.full((2,), 400)
    expected = TiledDenoiser(denoiser, 8, 4, 5)(x, timestep, given)
    torch.testing.assert_close(TiledDenoiser(packed, 8, 4, 5)(x, timestep, given), expected, rtol=1e-3, atol=1e-4)


def test_tiles_with_a_guide_are_refused(denoiser: Denoiser) -> None:
    steer = Steer(lambda x0, x, level: x0.sum((1, 2, 3)), 1.0)
    given, nothing = Conditioning(), torch.device("cpu")
    tiled, config = TiledDenoiser(denoiser, 8, 4, 1), (DiffusionConfig(), SamplerConfig())
    with pytest.raises(ConfigError, match="tile= goes with no guide"):
        draw(tiled, None, *config, given, [0], 0, (4, 8, 8), nothing, hooks=Hooks(steer=(steer,)))  # type: ignore[arg-type]
