"""planning/inference.py: the memory of decoding, encoding and denoising, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from made.first_stages import kl_stage, vq_folder
from made.live_memory import Live
from pipeline.config import EncodersConfig, ModelConfig
from pipeline.errors import ShapeError
from pipeline.inference.tiles.stage import TiledStage
from pipeline.models.encoders.autoencoder import STABLE_DIFFUSION, load_network
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.kernels import fused
from pipeline.models.unet.model import UNet
from pipeline.planning.inference import decode_bytes, denoise_bytes, encode_bytes, stage_shape, tile_bytes

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
KL: dict[str, Any] = {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8} | LEVELS
"""A decoder like Stable Diffusion's."""
NARROW: dict[str, Any] = {"block_out_channels": (16, 16, 96), "mid_block_add_attention": False} | LEVELS
"""The demo's is like that: its deepest level is the widest by far."""
CASES = pytest.mark.parametrize("changes", [KL, NARROW], ids=["kl", "narrow"])
SIZES = pytest.mark.parametrize(("batch", "height", "width"), [(2, 16, 24), (1, 40, 32)])


def peak(run: Any) -> int:
    with Live() as live:
        run()
    return live.peak


@CASES
@SIZES
def test_the_peak_of_a_decode_is_that_of_the_tensors_alive(
    changes: dict[str, Any], batch: int, height: int, width: int
) -> None:
    stage = kl_stage(**changes)
    z = torch.randn(batch, 3, height, width)
    stage.decode(z)  # folds weights
    modelled = decode_bytes(stage_shape(dict(stage.model.config)), batch, height, width)
    assert modelled == pytest.approx(peak(lambda: stage.decode(z)), rel=0.15)


@CASES
@SIZES
def test_the_peak_of_an_encode_is_that_of_the_tensors_alive(
    changes: dict[str, Any], batch: int, height: int, width: int
) -> None:
    stage = kl_stage(**changes)
    x = torch.randn(batch, 3, height * stage.downsampling, width * stage.downsampling)
    modelled = encode_bytes(stage_shape(dict(stage.model.config)), batch, height, width)
    assert modelled == pytest.approx(peak(lambda: stage.encode(x)), rel=0.15)


@pytest.mark.parametrize(("height", "width", "side"), [(40, 64, 32), (64, 64, 24)])
def test_the_peak_of_a_decode_in_tiles_is_that_of_the_tensors_alive(
    height: int, width: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.inference.tiles import stage as module

    monkeypatch.setattr(module, "TOGETHER", 1)
    stage = kl_stage(**KL)
    z, tiled = torch.randn(2, 3, height, width), TiledStage(stage, side)
    tiled.decode(z)
    modelled = tile_bytes(stage_shape(dict(stage.model.config)), height, width, side, batch=2)
    found = peak(lambda: tiled.decode(z))
    assert modelled == pytest.approx(found, rel=0.15)
    assert found < 0.7 * decode_bytes(stage_shape(dict(stage.model.config)), 1, height, width)


def test_a_vq_models_decoder_is_counted_as_well(tmp_path: Any) -> None:
    kinds: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 8}
    stage = load_network(EncodersConfig(vae=str(vq_folder(tmp_path / "vq", **kinds))))
    assert isinstance(stage, NetworkStage)
    z = torch.randn(1, 3, 48, 40)
    stage.decode(z)
    modelled = decode_bytes(stage_shape(dict(stage.model.config)), 1, 48, 40)
    assert modelled == pytest.approx(peak(lambda: stage.decode(z)), rel=0.15)


@pytest.mark.parametrize("side", [256, pytest.param(384, marks=pytest.mark.long)])
def test_the_peak_of_a_decode_is_that_of_the_process(side: int) -> None:
    """In a process of its own, at two sizes, as glibc counts it that returns freed blocks at once."""
    config = {**STABLE_DIFFUSION, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8, "layers_per_block": 1}
    ended = subprocess.run(
        [sys.executable, "-m", "ranks.decode_peak_job", json.dumps(config), str(side)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    modelled = decode_bytes(stage_shape(config), 1, side // 8, side // 8)
    assert modelled == pytest.approx(int(ended.stdout), rel=0.15)


def test_parameters_of_autoencoders_are_counted() -> None:
    for changes in (KL, NARROW):
        stage = kl_stage(**changes)
        found = sum(p.numel() for p in stage.model.parameters())
        assert stage_shape(dict(stage.model.config)).parameters == pytest.approx(found, rel=0.05)
    assert 4 * stage_shape(STABLE_DIFFUSION).parameters == pytest.approx(335e6, rel=0.02)  # 83.7 million


UNETS = [
    ModelConfig(channels=32, multipliers=(1, 2), attention=(1, 2), blocks=1, heads=2, context_width=0, norm_groups=8),
    ModelConfig(channels=32, multipliers=(1, 2, 4), attention=(2, 4), blocks=2, heads=4, context_width=24),
    ModelConfig(channels=32, multipliers=(1, 2), attention=(), blocks=2, context_width=0, resblock_updown=True),
]


@pytest.mark.parametrize("config", UNETS, ids=["pixels", "transformer", "plain"])
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 16, 24), (1, 40, 32)])
def test_the_peak_of_a_prediction_is_that_of_the_tensors_alive(
    config: ModelConfig, batch: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SCORES", 0)
    unet = UNet(config).requires_grad_(False)
    x = torch.randn(batch, 4, height, width)
    context = torch.randn(batch, 7, config.context_width) if config.context_width else None
    with torch.no_grad():
        found = peak(lambda: unet(x, torch.full((batch,), 5), context))
    assert denoise_bytes(config, batch, height, width, 7 if config.context_width else 0) == pytest.approx(
        found, rel=0.15
    )


def test_sizes_that_a_unet_cannot_take_are_refused() -> None:
    with pytest.raises(ShapeError, match="multiples of 2"):
        denoise_bytes(UNETS[0], 1, 15, 16)
