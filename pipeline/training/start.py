"""What a run begins with (`init=`): the weights of another run, of a diffusers folder or of a CompVis checkpoint.

The UNet's weights are taken, and the average starts from them. Autoencoder and text tower are never: latents and text
states are the cache's, and its contract says what made them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import ModelConfig, TrainConfig
from pipeline.data.format.contract import Contract, contract_from_json
from pipeline.distributed.world import World
from pipeline.errors import WeightsError
from pipeline.interchange import pretrained
from pipeline.interchange.pretrained import Pretrained
from pipeline.log import log
from pipeline.models.denoiser import Denoiser
from pipeline.models.weights import weights_hash
from pipeline.runs.checkpoint import load_run, load_weights
from pipeline.storage.urls import open_storage

RUN = "run.json"
PROCESS = ("schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr", "sigma_data")
"""What of the noise levels a network has learnt; others may be learnt from there."""


def begin(config: TrainConfig, denoiser: Denoiser, contract: Contract) -> dict[str, Any]:
    """Give the denoiser the weights that config.init names; returns what run.json records of them.

    Raises WeightsError for weights that cannot be had or are those of another network, another kind of prediction or
    other latents; says what is not known, and what of the network is new.
    """
    unet = denoiser.unet
    kind, found, facts = _find(config, unet.config, contract)
    _check(config, contract, found)
    facts = {"from": config.init, "kind": kind, **facts, "sha256": weights_hash(found.state.items())}
    print(f"train: begins with the weights of {config.init} ({', '.join(_words(facts))})", flush=True)
    theirs = found.state["conv_in.weight"].shape[1]
    if theirs < unet.config.in_channels:
        facts["new_input_channels"] = unet.config.in_channels - theirs
        print(
            f"train: {facts['new_input_channels']} input channels after the first {theirs} are new, and start at zero",
            flush=True,
        )
    unet.load_state_dict(pretrained.widened(found.state, unet.config))
    return facts


def share(denoiser: Denoiser, world: World) -> None:
    """Give every rank the weights that rank 0 has. Collective."""
    if world.size == 1:
        return
    with torch.no_grad():
        for parameter in denoiser.parameters():
            values = parameter.detach().to(world.device)
            dist.broadcast(values, src=0)
            parameter.copy_(values)


def _find(config: TrainConfig, model: ModelConfig, contract: Contract) -> tuple[str, Pretrained, dict[str, Any]]:
    """What kind of thing config.init is, its weights, and what more there is to record."""
    where, which = config.init, config.init_weights
    path = Path(where).expanduser()
    if "://" in where:
        if open_storage(where).exists(RUN):
            return _run(config, model, contract)
        raise WeightsError(f"init={where}: no run is there ({RUN}); a diffusers folder or a file is read from a disk")
    if path.is_file():
        return "compvis", pretrained.load_compvis(path, model, which), {"weights": which}
    if (path / RUN).is_file():
        return _run(config, model, contract)
    if (path / "unet" / "config.json").is_file() or (path / "config.json").is_file():
        return "diffusers", pretrained.load_diffusers(path, model), {}
    if path.exists():
        raise WeightsError(
            f"init={where} is none of these: a run ({RUN}), a diffusers folder (unet/config.json), a CompVis file"
        )
    raise WeightsError(
        f"init={where}: there is no such file or folder. A model of the Hugging Face hub is not fetched: download it, "
        "and give its folder"
    )


def _run(config: TrainConfig, model: ModelConfig, contract: Contract) -> tuple[str, Pretrained, dict[str, Any]]:
    """A run of ours: its newest good checkpoint."""
    info = load_run(config.init)
    theirs = contract_from_json(info.contract)
    pretrained.require_same_architecture(f"init={config.init}", info.config.model, model)
    n, state = load_weights(info.storage, 0, config.init_weights)
    unet = {name.removeprefix("unet."): t for name, t in state.items() if name.startswith("unet.")}
    if unet["conv_in.weight"].shape[1] > model.in_channels:
        raise WeightsError(
            f"init={config.init} reads {unet['conv_in.weight'].shape[1]} channels, and this run {model.in_channels}"
        )
    for what, there, here in (
        ("another text tower", theirs.text_sha256, contract.text_sha256),
        ("another autoencoder", theirs.vae_sha256, contract.vae_sha256),
    ):
        if there != here:
            _warn(f"{config.init} was trained on a cache of {what} than {config.data.train}: {there[:12]}, {here[:12]}")
    process = info.config.diffusion
    if differing := [name for name in PROCESS if getattr(process, name) != getattr(config.diffusion, name)]:
        told = ", ".join(f"diffusion.{name}={getattr(process, name)}" for name in differing)
        _warn(f"{config.init} was trained with {told}, which are other noise levels than this run's")
    found = Pretrained(unet, info.config.diffusion.prediction, theirs.scale, theirs.shift, theirs.text.width)
    return "run", found, {"weights": config.init_weights, "n": n}


def _check(config: TrainConfig, contract: Contract, found: Pretrained) -> None:
    """Hold what is known of the weights against this run. Raises WeightsError."""
    ours = config.diffusion.prediction
    if found.prediction is not None and found.prediction != ours:
        raise WeightsError(
            f"init={config.init} predicts {found.prediction}, and diffusion.prediction={ours}: set "
            f"diffusion.prediction={found.prediction}, or begin with other weights"
        )
    there, here = (found.scale or 0.0, found.shift or 0.0), (contract.scale, contract.shift)
    if found.scale is not None and not all(map(partial(math.isclose, rel_tol=1e-6), there, here)):
        raise WeightsError(
            f"init={config.init} was trained on latents of scale {there[0]:g} and shift {there[1]:g}, and "
            f"{config.data.train} holds latents of scale {here[0]:g} and shift {here[1]:g}: encode with the "
            "autoencoder of those weights, or begin with others"
        )
    unknown = [
        name
        for name, value in (("kind of prediction", found.prediction), ("latent scale", found.scale))
        if value is None
    ]
    if unknown:
        _warn(f"{config.init} does not say its {' and '.join(unknown)}, so nothing proves that they are this run's")
    if found.text_width not in (None, contract.text.width):
        _warn(
            f"the text encoder of {config.init} has states of width {found.text_width}, and {config.data.train} holds "
            f"such of width {contract.text.width}: the cache's are what this run reads"
        )


def _words(facts: Mapping[str, Any]) -> list[str]:
    words = [str(facts["kind"])]
    words += [f"{facts['weights']} weights"] if "weights" in facts else []
    words += [f"at {facts['n']:,} samples"] if "n" in facts else []
    return [*words, f"SHA-256 {facts['sha256'][:12]}"]


def _warn(line: str) -> None:
    log.warning(line)
