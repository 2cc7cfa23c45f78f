"""Losses that a program adds to an autoencoder's own: trained beside it, logged, and left behind by its export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from made.autoencoder_run import BATCH, autoencoder_config, make_pixels
from pipeline import autoencoder, export
from pipeline.config import AutoencoderConfig, DeepSpeedConfig, ExportConfig, LaunchConfig, OptimConfig, TrackingConfig
from pipeline.errors import DatasetError
from pipeline.models.first_stage.trainable import Outputs
from pipeline.runs.checkpoint import load_weights
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import parse_rows


class Brightness(nn.Module):
    """A guess at a picture's mean from its latent."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = nn.Linear(3, 1)

    def forward(self, outputs: Outputs, x_B3HW: Tensor, members: dict[str, Tensor]) -> dict[str, Tensor]:
        guess = self.guess(outputs.z.mean(dim=(2, 3)))[:, 0]
        return {"brightness": 3 * (guess - x_B3HW.mean(dim=(1, 2, 3))).square().mean()}

    def reset_parameters(self, seed: int) -> None:
        nn.init.zeros_(self.guess.weight)
        nn.init.zeros_(self.guess.bias)


@pytest.fixture
def config(tmp_path: Path) -> AutoencoderConfig:
    make_pixels(str(tmp_path / "pixels"), [2 * BATCH])
    return autoencoder_config(
        tmp_path,
        optim=OptimConfig(batch=BATCH, lr=1e-2, warmup=0),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        deepspeed=DeepSpeedConfig(engine="torch"),
        launch=LaunchConfig(threads=1),
        device="cpu",
        samples=4 * BATCH,
    )


def test_further_losses_are_trained_and_logged_and_stay_behind_at_the_export(
    config: AutoencoderConfig, tmp_path: Path
) -> None:
    assert autoencoder.main(config, autoencoder.Further(Brightness, noise=0.5)) == 0
    run = open_storage(config.run)
    _, raw = load_weights(run, which="raw")
    assert float(raw["extra.guess.weight"].abs().max()) > 0
    _, averaged = load_weights(run, prefixes=("model.",))
    assert not any(name.startswith("extra.") for name in averaged)
    rows = [row for row in parse_rows(run.get("metrics.jsonl")) if row["kind"] == "train"]
    assert len(rows) == 4
    assert all(row["brightness"] > 0 for row in rows)
    assert export.main(ExportConfig(run=config.run, dest=str(tmp_path / "ae"))) == 0
    exported = load_file(tmp_path / "ae" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == {name.removeprefix("model.") for name in averaged}

    plain = replace(config, run=str(tmp_path / "plain"))
    assert autoencoder.main(plain) == 0
    _, without = load_weights(open_storage(plain.run), which="raw", prefixes=("model.",))
    assert not torch.equal(without["model.encoder.conv_in.weight"], raw["model.encoder.conv_in.weight"])


def test_arrays_that_further_losses_read_and_the_cache_lacks_are_named(config: AutoencoderConfig) -> None:
    further = autoencoder.Further(Brightness, members=("cond.labels",))
    with pytest.raises(DatasetError, match=r"holds no cond\.labels"):
        autoencoder.main(config, further)
