"""Weights that an autoencoder's run begins with (`init=`): those of another autoencoder's run, or of a folder or file
that encoders.vae takes. The discriminator always begins anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import AutoencoderConfig, EncodersConfig
from pipeline.errors import WeightsError
from pipeline.log import log
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.first_stage.trainable import AVERAGED, TrainableAutoencoder
from pipeline.models.weights import weights_hash
from pipeline.parsing.redaction import redact
from pipeline.parsing.text import one_line
from pipeline.runs.checkpoint import load_weights
from pipeline.runs.directory import committed, load_autoencoder_run
from pipeline.runs.stored import read_facts
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training.start import require_finite

RUN = "run.json"


def initial_weights(config: AutoencoderConfig, run: Storage, module: TrainableAutoencoder) -> dict[str, Any]:
    """The facts that run.json records about the run's initial weights; {} for random ones. At the beginning of a run
    the weights are also loaded into the module. Rank 0 only. Raises WeightsError, RunError."""
    if not config.init:
        return {}
    if committed(run):
        return dict(read_facts(run).get("init", {}))
    facts, state = _of_run(config) if _is_run(config.init) else _of_folder(config)
    where = f"init={config.init}"
    expected = module.model.state_dict()
    if missing := sorted(expected.keys() ^ state.keys()):
        raise WeightsError(
            f"{where} holds another architecture than autoencoder={config.autoencoder.name}: {missing[0]} is "
            f"{'missing' if missing[0] in expected else 'no part of it'}; choose its own, or begin without init"
        )
    if differing := next((name for name, tensor in state.items() if tensor.shape != expected[name].shape), None):
        raise WeightsError(
            f"{where} holds another architecture than autoencoder={config.autoencoder.name}: {differing} is "
            f"{tuple(state[differing].shape)}, not {tuple(expected[differing].shape)}; choose its own, or begin "
            "without init"
        )
    require_finite(where, state)
    with torch.no_grad():
        module.model.load_state_dict(state)
    facts = {"from": redact(config.init), **facts, "sha256": weights_hash(state.items())}
    log.info(f"autoencoder: begins with the weights of {config.init} (SHA-256 {facts['sha256'][:12]})")
    return facts


def _is_run(where: str) -> bool:
    return open_storage(where).exists(RUN) if "://" in where else (Path(where).expanduser() / RUN).is_file()


def _of_run(config: AutoencoderConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and weights of an autoencoder's run: of its newest checkpoint that has them whole."""
    info = load_autoencoder_run(config.init)
    n, state = load_weights(info.storage, 0, config.init_weights, AVERAGED)
    model = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    return {"kind": "run", "weights": config.init_weights, "n": n}, model


def _of_folder(config: AutoencoderConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same of a folder or file of diffusers or CompVis."""
    if "://" in config.init:
        raise WeightsError(
            f"init={config.init}: no run is there ({RUN}); a folder or file of an autoencoder must be on a local disk"
        )
    if not Path(config.init).expanduser().exists():
        raise WeightsError(f"init={config.init}: there is no such file or folder. None is fetched: download it first")
    try:
        stage = load_autoencoder(EncodersConfig(vae=config.init))
    except WeightsError as error:
        said = one_line(str(error)).replace("encoders.vae=", "init=")
        raise WeightsError(said if said.startswith("init=") else f"init={config.init}: {said}") from None
    if not isinstance(stage, NetworkStage):
        raise WeightsError(f"init={config.init} is no autoencoder: give a run of one, or a folder")
    return {"kind": stage.architecture}, dict(stage.model.state_dict())
