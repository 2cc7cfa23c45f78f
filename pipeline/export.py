"""latentmill export: a checkpoint's weights in other software's format.

format=diffusers: a folder that diffusers loads (unet, vae, scheduler, text encoder and tokenizer, model_index.json),
or whose README.md has a loop where no pipeline runs the run's task (interchange/tasks/). Of an autoencoder's run: a
folder of its AutoencoderKL or VQModel (interchange/first_stage/), which encoders.vae= takes.
format=compvis: one .safetensors or .ckpt file under CompVis' names (interchange/compvis.py).
The written files are loaded again and compared with our own networks. push=hub:OWNER/NAME uploads them after that, with
a model card (interchange/hub/); without it nothing contacts the hub.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from pipeline.config import AutoencoderConfig, ExportConfig
from pipeline.errors import ConfigError
from pipeline.inference.first_stage import TrainedAutoencoder, load_trained_autoencoder
from pipeline.inference.trained import Trained, load_trained
from pipeline.interchange.agreement import ExportDiffers as ExportDiffers
from pipeline.interchange.compvis import compvis_note as compvis_note
from pipeline.interchange.compvis import export_compvis, look_compvis
from pipeline.interchange.diffusers import export_diffusers, look_diffusers
from pipeline.interchange.first_stage.compvis import export_file
from pipeline.interchange.first_stage.diffusers import export_autoencoder
from pipeline.interchange.hub.client import Hub
from pipeline.interchange.hub.exported import look_hub, push_export
from pipeline.log import show
from pipeline.models.denoiser import Denoiser
from pipeline.runs.directory import load_any_run


def main(config: ExportConfig) -> int:
    """Run the verb. Raises ExportDiffers when the check fails, which leaves the destination unchanged."""
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format}: choose one of {', '.join(FORMATS)}")
    look, write, write_autoencoder = FORMATS[config.format]
    hub = look_hub(config)
    dest = look(config)
    if isinstance(load_any_run(config.run).config, AutoencoderConfig):
        if config.encoders is not None:
            raise ConfigError(f"encoders: {config.run} is the run of an autoencoder, which has none; leave it out")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        autoencoder = load_trained_autoencoder(config.run, config.at, config.weights, config.ema, device)
        checked = write_autoencoder(config, autoencoder, dest)
        return _done(config, autoencoder, hub, checked)
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    text = trained.contract.text
    denoiser = trained.denoiser(None if text is None else torch.zeros(text.length, text.width))  # not exported
    checked = write(config, trained, denoiser, dest)
    return _done(config, trained, hub, checked)


def _done(config: ExportConfig, trained: Trained | TrainedAutoencoder, hub: Hub | None, checked: str | None) -> int:
    show(f"export: {config.dest}: {trained.weights} weights at {trained.n:,} samples, format {config.format}")
    if hub is not None:
        push_export(config, trained, hub, checked or "")
    return 0


Look = Callable[[ExportConfig], Any]
Write = Callable[[ExportConfig, Trained, Denoiser, Any], str | None]
WriteAutoencoder = Callable[[ExportConfig, TrainedAutoencoder, Any], str | None]
FORMATS: dict[str, tuple[Look, Write, WriteAutoencoder]] = {
    "diffusers": (look_diffusers, export_diffusers, export_autoencoder),
    "compvis": (look_compvis, export_compvis, export_file),
}
"""Format -> what looks at the destination before any work, what writes a diffusion model there, and what an
autoencoder. Of one file they return the SHA-256 of what was compared."""


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["export", *sys.argv[1:]]))
