"""inference/tiles/choice.py: which tiles are chosen by memory, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made.asked import contract
from made.first_stages import vq_folder
from pipeline.config import (
    EncodersConfig,
    InpaintTask,
    LayoutTask,
    ModelConfig,
    SamplerConfig,
    SemanticTask,
    TextTask,
)
from pipeline.errors import ConfigError
from pipeline.inference.tiles import choice
from pipeline.inference.tiles.choice import WHOLE, Drawn, choose
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.inference.tiles.stage import TiledStage
from pipeline.models.encoders.autoencoder import STABLE_DIFFUSION, described_network, load_autoencoder
from pipeline.models.encoders.first_stage import Identity
from pipeline.planning.inference import decode_bytes, stage_shape, tile_bytes

CPU = torch.device("cpu")
MODEL = ModelConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, context_width=128)
UNCONDITIONED = replace(MODEL, context_width=0)
STAGE = stage_shape(STABLE_DIFFUSION)
"""What is taken for encoders whose architecture is not known before they are loaded."""


def drawn(*sizes: tuple[int, int], batch: int = 4, task: Any = None, **changes: Any) -> Drawn:
    """Pictures of a semantic model, by an autoencoder of Stable Diffusion's architecture."""
    task = task or SemanticTask()
    return Drawn(
        model=MODEL if task.makes_context else UNCONDITIONED,
        task=task,
        cache=contract(),
        encoders=changes.pop("encoders", EncodersConfig(vae="someone/vae")),
        sampler=SamplerConfig(batch=batch, guidance=1.0),
        sizes=sizes,
        pictures=batch,
        **changes,
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the bytes that are free."""

    def set_to(size: float) -> None:
        monkeypatch.setattr(choice, "free_bytes", lambda device: int(size))

    return set_to


def test_pictures_that_cannot_fit_are_refused_with_the_key_that_makes_them_fit(free: Any) -> None:
    asked = drawn((2048, 1024))
    needed = decode_bytes(STAGE, 4, 128, 256)
    free(needed + 1)
    assert choose("off", asked, CPU) == WHOLE
    free(0.75 * needed)
    line = f"4 images of 2048 x 1024 pixels at once would take about {needed / 1e9:.3g} GB of memory to decode, and "
    line += f"{0.75 * needed / 1e9:.3g} GB are free here: give tile=auto"
    with pytest.raises(ConfigError, match=re.escape(line)):
        choose("off", asked, CPU)
    assert choose("auto", asked, CPU).decode == 0
    wide = replace(asked, model=replace(MODEL, channels=16384, norm_groups=32), task=TextTask())
    with pytest.raises(ConfigError, match=r"GB of memory to denoise, and .* give tile=auto$"):
        choose("off", wide, CPU)


def test_auto_takes_whole_pictures_then_fewer_at_once_then_the_largest_tiles_that_fit(free: Any) -> None:
    asked = drawn((2048, 1024), (512, 512))
    all_four, one = decode_bytes(STAGE, 4, 128, 256), decode_bytes(STAGE, 1, 128, 256)
    weights = asked.weights(STAGE)
    free((all_four + weights) / choice.SHARE + 1e6)
    assert (choose("auto", asked, CPU).facts, choose("auto", asked, CPU).at_once) == ({}, 0)
    free((2.5 * one + weights) / choice.SHARE)
    two = choose("auto", asked, CPU)
    assert (two.facts, two.at_once) == ({}, 2 * 128 * 256)
    room = 0.5 * one
    free((room + weights) / choice.SHARE)
    tiles = choose("auto", asked, CPU)
    side = tiles.facts["decode"] // 8
    assert 16 < side < 256 and side % 8 == 0
    assert tile_bytes(STAGE, 128, 256, side, 4) <= room < tile_bytes(STAGE, 128, 256, side + 8, 4)
    assert tiles.words() == f"decoding in tiles of {8 * side}"
    free(0)
    least = choose("auto", asked, CPU)
    assert least.facts == {"denoise": 64, "decode": 128} and least.rows == 1


def test_denoising_is_cut_to_the_size_of_training_where_it_does_not_fit(free: Any, caplog: Any) -> None:
    asked = drawn((1024, 1024), encoders=EncodersConfig(vae="pixels"))
    free((0.9 * asked.denoising(4, 128, 128) + asked.weights(None)) / choice.SHARE)
    tiles = choose("auto", asked, CPU)
    assert tiles.facts == {"denoise": 64} and tiles.rows == 4
    assert tiles.stage(Identity()).__class__ is Identity
    free((2 * asked.denoising(4, 128, 128) + asked.weights(None)) / choice.SHARE)
    assert choose("auto", asked, CPU).facts == {}


def test_sides_are_multiples_that_the_unet_takes(free: Any) -> None:
    free(1e12)
    assert choose("96", drawn((128, 256)), CPU).facts == {"denoise": 96, "decode": 96}
    assert choose("256", drawn((128, 256)), CPU).facts == {}
    with pytest.raises(
        ConfigError, match=r"tile=100: tiles .* of 32 pixels or more, multiples of 16; .* nearest is 96"
    ):
        choose("100", drawn((128, 256)), CPU)
    with pytest.raises(ConfigError, match=r"tile=16: .* the nearest is 32"):
        choose("16", drawn((128, 256)), CPU)


@pytest.mark.parametrize(("task", "warned"), [(TextTask(), True), (SemanticTask(), False), (InpaintTask(), False)])
def test_tasks_whose_windows_cannot_tell_what_lies_where_are_warned_of(
    free: Any, caplog: pytest.LogCaptureFixture, task: Any, warned: bool
) -> None:
    free(1e12)
    with caplog.at_level("WARNING", logger="latentmill"):
        choose("64", drawn((128, 128), task=task), CPU)
        choose("auto", drawn((128, 128), task=task), CPU)
    assert [f"a model of task={task.name}" in record.getMessage() for record in caplog.records] == [True] * warned


def test_what_is_made_of_the_choice_has_the_sides_in_latent_positions(free: Any, tmp_path: Path) -> None:
    free(1e12)
    encoders = EncodersConfig(vae=str(vq_folder(tmp_path / "vq")))
    tiles = choose("64", drawn((128, 128), task=LayoutTask()), CPU)
    stage = tiles.stage(load_autoencoder(encoders))
    assert isinstance(stage, TiledStage) and stage.side == 32 and 0 < stage.overlap <= 16
    network: Any = torch.nn.Module()
    denoiser: Any = tiles.denoiser(network)
    assert denoiser.__class__ is TiledDenoiser and (denoiser.side, denoiser.overlap) == (8, 2)
    assert WHOLE.denoiser(network) is network
    assert WHOLE.stage(stage) is stage


def test_architectures_are_known_before_weights_are_loaded(tmp_path: Path) -> None:
    folder = vq_folder(tmp_path / "vq")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert stage_shape(described_network(EncodersConfig(vae=str(folder))) or {}).widths == (8, 16)
    (folder / "one.safetensors").write_bytes(b"")
    for vae in (str(folder / "one.safetensors"), f"{folder}/"):
        assert stage_shape(described_network(EncodersConfig(vae=vae)) or {}).widths == (8, 16)
    assert stage_shape(described_network(EncodersConfig()) or {}).widths == (16, 16, 32, 96)
    assert described_network(EncodersConfig(vae="pixels")) is None
    assert described_network(EncodersConfig(vae="someone/vae")) == STABLE_DIFFUSION
    nested = EncodersConfig(vae=str(folder.parent), vae_subfolder=folder.name)
    assert stage_shape(described_network(nested) or {}).widths == (8, 16)


def test_free_memory_is_what_the_machine_and_its_control_group_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = choice.free_bytes(CPU)
    assert machine > 1e6
    monkeypatch.setattr(choice, "GROUP", tmp_path)
    assert abs(choice.free_bytes(CPU) - machine) < 2e9
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert choice.free_bytes(CPU) == 650_000
    (tmp_path / "memory.max").write_text("max\n")
    assert choice.free_bytes(CPU) > 1e6
