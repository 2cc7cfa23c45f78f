"""latentmill export: a checkpoint's weights in other software's format.

format=diffusers: a folder that diffusers loads (unet, vae, scheduler, text encoder and tokenizer, model_index.json).
format=compvis: one .safetensors or .ckpt file under CompVis' names (interchange/compvis.py).
The written files are loaded again and compared with our own denoiser.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from pipeline.config import ExportConfig
from pipeline.errors import ConfigError
from pipeline.inference.trained import Trained, load_trained
from pipeline.interchange.agreement import ExportDiffers as ExportDiffers
from pipeline.interchange.compvis import compvis_note as compvis_note
from pipeline.interchange.compvis import export_compvis
from pipeline.interchange.diffusers import export_diffusers
from pipeline.log import show
from pipeline.models.denoiser import Denoiser


def main(config: ExportConfig) -> int:
    """Run the verb. Raises ExportDiffers when the check fails, which leaves the destination unchanged."""
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format}: choose one of {', '.join(FORMATS)}")
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    empty_LD = torch.zeros(trained.contract.text.length, trained.contract.text.width)  # not exported
    denoiser = trained.denoiser(empty_LD)
    if task_weights := [name for name in trained.state if name.startswith("task.")]:
        raise ConfigError(
            f"task={trained.info.config.task.name} has weights of its own ({task_weights[0]}): no other software "
            "holds it"
        )
    FORMATS[config.format](config, trained, denoiser)
    show(f"export: {config.dest}: {trained.weights} weights at {trained.n:,} samples, format {config.format}")
    return 0


FORMATS: dict[str, Callable[[ExportConfig, Trained, Denoiser], None]] = {
    "diffusers": export_diffusers,
    "compvis": export_compvis,
}


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["export", *sys.argv[1:]]))
