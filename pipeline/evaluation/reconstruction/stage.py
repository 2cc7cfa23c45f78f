"""From the weights of an autoencoder's run to the first stage that they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.config import FirstStageConfig
from pipeline.inference.first_stage import build_autoencoder
from pipeline.models.encoders.first_stage import NETWORKS, FirstStage
from pipeline.models.first_stage.architecture import CLASSES
from pipeline.models.first_stage.trainable import AVERAGED


def stage_of(config: FirstStageConfig, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> FirstStage:
    """The first stage with the weights of a commit, by parameter name; those of a discriminator are passed over. Its
    latents have scale 1. Raises RunError where the weights are of another architecture."""
    own = {name: tensor for name, tensor in state.items() if name.startswith(AVERAGED)}
    model = build_autoencoder(config, own, device)
    return NETWORKS[CLASSES[config.regularizer]](model, torch.float32, torch.device(device))
