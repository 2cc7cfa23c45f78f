"""latentmill export: a checkpoint's weights in other software's format.

format=diffusers: a folder that diffusers loads (unet, vae, scheduler, text encoder and tokenizer, model_index.json),
or whose README.md has a loop where no pipeline runs the run's task (interchange/tasks/).
format=compvis: one .safetensors or .ckpt file under CompVis' names (interchange/compvis.py).
The written files are loaded again and compared with our own denoiser.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from pipeline.config import ExportConfig
from pipeline.errors import ConfigError
from pipeline.inference.trained import Trained, load_trained
from pipeline.interchange.agreement import ExportDiffers as ExportDiffers
from pipeline.interchange.compvis import compvis_note as compvis_note
from pipeline.interchange.compvis import export_compvis, look_compvis
from pipeline.interchange.diffusers import export_diffusers, look_diffusers
from pipeline.log import show
from pipeline.models.denoiser import Denoiser


def main(config: ExportConfig) -> int:
    """Run the verb. Raises ExportDiffers when the check fails, which leaves the destination unchanged."""
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format}: choose one of {', '.join(FORMATS)}")
    look, write = FORMATS[config.format]
    dest = look(config)
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    text = trained.contract.text
    denoiser = trained.denoiser(None if text is None else torch.zeros(text.length, text.width))  # not exported
    write(config, trained, denoiser, dest)
    show(f"export: {config.dest}: {trained.weights} weights at {trained.n:,} samples, format {config.format}")
    return 0


FORMATS: dict[str, tuple[Callable[[ExportConfig], Any], Callable[[ExportConfig, Trained, Denoiser, Any], None]]] = {
    "diffusers": (look_diffusers, export_diffusers),
    "compvis": (look_compvis, export_compvis),
}
"""Format -> what looks at the destination before any work, and what writes there."""


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["export", *sys.argv[1:]]))
