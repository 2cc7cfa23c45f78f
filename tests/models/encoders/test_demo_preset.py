"""scripts/demo_encoders/vae.py: what it gives `latentmill autoencoder` is the shipped autoencoder's architecture, and
losses of the scenes' own label maps."""

from __future__ import annotations

import json
from types import ModuleType

import numpy as np
import pytest
import torch

from made.places import REPOSITORY
from pipeline.config.loading.load import load
from pipeline.models.first_stage.architecture import diffusers_config
from pipeline.models.first_stage.trainable import TrainableAutoencoder
from preprocess.shapes.drawing import label_map, render, scene

SHIPPED = REPOSITORY / "pipeline" / "assets" / "demo" / "vae" / "config.json"


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    from demo_encoders import vae

    return vae


@pytest.fixture
def labels() -> np.ndarray:
    return np.stack([label_map(scene(5, index, "all")) for index in range(6)])


def test_the_preset_has_the_shipped_architecture(vae: ModuleType) -> None:
    config = load("autoencoder", [*vae.PRESET, "data.train=c", "run=r"])
    shipped = json.loads(SHIPPED.read_text())
    assert diffusers_config(config.autoencoder, shipped["scaling_factor"], 64) == shipped


def test_a_latent_cell_is_of_the_object_that_covers_a_quarter_of_it(vae: ModuleType, labels: np.ndarray) -> None:
    owners = vae.cell_owners(torch.from_numpy(labels)).numpy()
    expected = np.zeros((len(labels), 8, 8), dtype=np.int64)
    for index, row, column in np.ndindex(*expected.shape):
        cell = labels[index, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        counts = np.bincount(cell.reshape(-1), minlength=25)[1:]
        expected[index, row, column] = counts.argmax() + 1 if counts.max() >= 16 else 0
    assert np.array_equal(owners, expected)
    assert len(np.unique(owners)) > 3


def test_the_further_losses_reach_the_encoder_and_their_own_layers(vae: ModuleType, labels: np.ndarray) -> None:
    config = load("autoencoder", [*vae.PRESET, "data.train=c", "run=r"])
    module = TrainableAutoencoder(config.autoencoder, config.gan, vae.DemoLosses(), vae.NOISE)
    assert module.extra is not None
    module.reset_parameters(0)
    pixels = np.stack([render(scene(5, index, "all")) for index in range(2)])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    outputs = module(x, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert module.extra is not None
    losses = module.extra(outputs, x, {vae.LABELS: torch.from_numpy(labels[:2])})
    assert {name: float(loss.detach()) > 0 for name, loss in losses.items()} == dict.fromkeys(
        ("coarse", "spread", "named"), True
    )
    sum(losses.values()).backward()
    for name in ("model.encoder.conv_in.weight", "extra.colour.weight", "extra.meaning.2.weight"):
        gradient = module.get_parameter(name).grad
        assert gradient is not None and float(gradient.abs().max()) > 0
    assert module.get_parameter("model.decoder.conv_out.weight").grad is None
