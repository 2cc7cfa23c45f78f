"""A run's trained autoencoder, which export and eval load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import AutoencoderConfig, FirstStageConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.contract_json import contract_from_json
from pipeline.errors import RunError
from pipeline.models.first_stage import architecture
from pipeline.models.first_stage.trainable import AVERAGED
from pipeline.runs.averages import label, load_average
from pipeline.runs.directory import RunInfo, load_autoencoder_run


@dataclass(frozen=True)
class TrainedAutoencoder:
    """A run and one of its checkpoints.

    contract: of the cache of pixels that it was trained on. n: samples seen by the weights. weights: "ema", "raw", or
    an average such as "ema=0.1". model: diffusers' AutoencoderKL or VQModel with our layers, float32, in evaluation
    mode.
    """

    info: RunInfo[AutoencoderConfig]
    contract: Contract
    n: int
    weights: str
    model: Any

    @property
    def config(self) -> FirstStageConfig:
        """Its architecture."""
        return self.info.config.autoencoder


def load_trained_autoencoder(
    url: str, at: int = 0, which: str = "ema", ema: float = 0.0, device: torch.device | str = "cpu"
) -> TrainedAutoencoder:
    """The autoencoder's run at `url` and its checkpoint at `at` samples (0: the newest that has these weights
    whole). which, ema: as in load_average. Raises RunError, also for a diffusion model's run, CheckpointCorrupt."""
    info = load_autoencoder_run(url)
    n, state = load_average(info.storage, at, which, ema, AVERAGED)
    model = build_autoencoder(info.config.autoencoder, state, device)
    return TrainedAutoencoder(info, contract_from_json(info.contract), n, label(which, ema), model)


def build_autoencoder(config: FirstStageConfig, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """An autoencoder in evaluation mode with the weights of a commit, whose names begin with "model."; it holds the
    tensors of `state`, not copies, where they are on `device`. Raises RunError where they are of another
    architecture."""
    with torch.device("meta"):
        model = architecture.build(config)
    own = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise RunError(f"the checkpoint's weights are not those of the run's configuration: {error}") from None
    return torch.nn.Module.to(model, device=device).eval().requires_grad_(False)
