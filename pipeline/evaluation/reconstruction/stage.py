"""From the weights of an autoencoder's run to the first stage that they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.config import FirstStageConfig
from pipeline.errors import RunError
from pipeline.models.encoders.first_stage import NETWORKS, FirstStage
from pipeline.models.first_stage.architecture import CLASSES, build
from pipeline.models.first_stage.trainable import AVERAGED


def stage_of(config: FirstStageConfig, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> FirstStage:
    """The first stage with the weights of a commit, whose names begin with "model."; others are passed over. It holds
    the tensors of `state`, not copies, where they are on `device`. Its latents have scale 1. Raises RunError where the
    weights are of another architecture."""
    with torch.device("meta"):
        model = build(config)
    (prefix,) = AVERAGED
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise RunError(f"the checkpoint's weights are not those of the run's configuration: {error}") from None
    return NETWORKS[CLASSES[config.regularizer]](model, torch.float32, torch.device(device))
