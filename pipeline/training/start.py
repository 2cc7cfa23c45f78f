"""Initial weights of a run (`init=`): those of another run, of a diffusers folder or of a CompVis checkpoint.

The UNet's weights are loaded, and what the task has learned beside it where it is the same task and fits; the average
starts from them. The autoencoder's and the text tower's never are: latents and text states come from the cache, whose
contract names the encoders that made them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import ModelConfig, TrainConfig
from pipeline.config.tasks.found import facts_of, found
from pipeline.data.format.contract import Contract
from pipeline.data.format.contract_json import contract_from_json
from pipeline.diffusion.process import PROCESSES
from pipeline.distributed.world import World
from pipeline.errors import WeightsError
from pipeline.interchange import pretrained
from pipeline.interchange.learned import Learned, misfit, refuse_inputs, renamed_classes
from pipeline.interchange.noise_levels import levels_of
from pipeline.interchange.pretrained import Pretrained
from pipeline.log import log
from pipeline.models.denoiser import Denoiser
from pipeline.models.weights import weights_hash
from pipeline.parsing.redaction import redact
from pipeline.runs.checkpoint import load_run, load_weights
from pipeline.storage.urls import open_storage

RUN = "run.json"


def begin(config: TrainConfig, denoiser: Denoiser, contract: Contract) -> dict[str, Any]:
    """Load the weights that config.init names into the denoiser. Returns what run.json records of them.

    Raises WeightsError for weights that cannot be read, or that belong to another network, another kind of prediction
    or other latents. Logs what is not known about them, and which input channels are new.
    """
    unet = denoiser.unet
    kind, weights, facts = _read_weights(config, unet.config, contract)
    _check(config, contract, weights)
    require_finite(f"init={config.init}", weights.state)
    facts = {"from": redact(config.init), "kind": kind, **facts, "sha256": weights_hash(weights.state.items())}
    log.info(f"train: begins with the weights of {config.init} ({', '.join(_in_words(facts))})")
    channels, task = weights.state["conv_in.weight"].shape[1], denoiser.task
    extra = channels - (unet.config.in_channels - task.extra_channels)
    where = f"init={config.init}"
    if doubt := refuse_inputs(where, weights.learned, extra, config.task, task.extra_channels, contract.conditions):
        log.warning(f"{doubt}, so nothing proves that they are this run's")
    if channels < unet.config.in_channels:
        facts["new_input_channels"] = unet.config.in_channels - channels
        words = found(facts_of(config.task).export).inputs(contract.conditions) if task.extra_channels else ""
        facts |= {"new_inputs": words} if words else {}
        log.info(
            f"train: {facts['new_input_channels']} input channels after the first {channels} are new, and start at zero"
            + (f": {words}" if words else "")
        )
    facts |= _take_task(config, denoiser, contract, weights.learned)
    try:
        unet.load_state_dict(pretrained.widened(weights.state, unet.config))
    except RuntimeError as error:
        raise WeightsError(f"init={config.init}: its weights are not those of its configuration ({error})") from None
    return facts


def _take_task(config: TrainConfig, denoiser: Denoiser, contract: Contract, learned: Learned) -> dict[str, Any]:
    """Load what the task has learned where it fits. Returns what run.json records of it, {} for a task without weights
    of its own."""
    expected = denoiser.task.state_dict()
    if not expected:
        return {}
    if why := misfit(learned, config.task, expected):
        log.info(f"train: what task={config.task.name} learns beside the UNet begins anew: of {config.init}, {why}")
        return {"task": {"taken": False, "why": why}}
    require_finite(f"init={config.init}", learned.state)
    denoiser.task.load_state_dict(dict(learned.state))
    digest = weights_hash(learned.state.items())
    log.info(f"train: takes {len(expected)} tensors of task={config.task.name} too (SHA-256 {digest[:12]})")
    for name in renamed_classes(learned, contract.conditions):
        log.warning(f"the {name} of {config.init} have other names than those of {config.data.train}")
    return {"task": {"taken": True, "sha256": digest}}


def share(module: nn.Module, world: World) -> None:
    """Copy rank 0's weights to every rank. Collective."""
    if world.size == 1:
        return
    with torch.no_grad():
        for parameter in module.parameters():
            values = parameter.detach().to(world.device)
            dist.broadcast(values, src=0)
            parameter.copy_(values)


def require_finite(what: str, state: Mapping[str, Tensor]) -> None:
    """Raise WeightsError, which names the tensor, where weights are NaN or infinite. what: names them for that."""
    for name, tensor in state.items():
        finite = int(torch.isfinite(tensor).sum())
        if finite < tensor.numel():
            raise WeightsError(
                f"{what}: {tensor.numel() - finite:,} of the {tensor.numel():,} values of {name} are NaN or infinite, "
                "and no training mends them: begin with other weights"
            )


def _read_weights(
    config: TrainConfig, model: ModelConfig, contract: Contract
) -> tuple[str, Pretrained, dict[str, Any]]:
    """(kind, weights, further facts for run.json) of what config.init names. kind: run, diffusers or compvis."""
    where, which = config.init, config.init_weights
    path = Path(where).expanduser()
    if "://" in where:
        if open_storage(where).exists(RUN):
            return _read_run(config, model, contract)
        raise WeightsError(
            f"init={where}: no run is there ({RUN}); a diffusers folder or a CompVis file must be on a local disk"
        )
    if path.is_file():
        return "compvis", pretrained.load_compvis(path, model, which, config.task), {"weights": which}
    if (path / RUN).is_file():
        return _read_run(config, model, contract)
    if (path / "unet" / "config.json").is_file() or (path / "config.json").is_file():
        return "diffusers", pretrained.load_diffusers(path, model, which), {}
    if path.exists():
        raise WeightsError(
            f"init={where} is none of these: a run ({RUN}), a diffusers folder (unet/config.json), a CompVis file"
        )
    raise WeightsError(
        f"init={where}: there is no such file or folder. A model of the Hugging Face hub is not fetched: download it, "
        "and give its folder"
    )


def _read_run(config: TrainConfig, model: ModelConfig, contract: Contract) -> tuple[str, Pretrained, dict[str, Any]]:
    """The same for a latentmill run: those of the newest checkpoint that has them whole."""
    info = load_run(config.init)
    init_contract = contract_from_json(info.contract)
    pretrained.require_same_architecture(f"init={config.init}", info.config.model, model)
    n, state = load_weights(info.storage, 0, config.init_weights)
    unet = {name.removeprefix("unet."): t for name, t in state.items() if name.startswith("unet.")}
    if "conv_in.weight" not in unet or unet["conv_in.weight"].dim() != 4:
        raise WeightsError(f"init={config.init}: its checkpoint at {n} samples holds no UNet")
    if unet["conv_in.weight"].shape[1] > model.in_channels:
        raise WeightsError(
            f"init={config.init} reads {unet['conv_in.weight'].shape[1]} channels, and this run {model.in_channels}: "
            "begin with other weights"
        )
    for encoder, init_sha256, sha256 in (
        ("text tower", init_contract.text_sha256, contract.text_sha256),
        ("autoencoder", init_contract.vae_sha256, contract.vae_sha256),
    ):
        if init_sha256 != sha256:
            log.warning(
                f"{config.init} was trained on a cache of another {encoder} than {config.data.train}: "
                f"{init_sha256[:12]}, {sha256[:12]}"
            )
    process = info.config.diffusion
    scaling = (init_contract.scale, init_contract.shift)
    width = init_contract.text.width if init_contract.text else None
    own = {name.removeprefix("task."): tensor for name, tensor in state.items() if name.startswith("task.")}
    task = info.config.task
    learned = Learned(task.name, vars(task), init_contract.conditions, own)
    weights = Pretrained(unet, process.prediction, *scaling, width, levels_of(process), learned)
    return "run", weights, {"weights": config.init_weights, "n": n}


def _check(config: TrainConfig, contract: Contract, weights: Pretrained) -> None:
    """Compare what is known about the weights with this run. Raises WeightsError."""
    prediction = config.diffusion.prediction
    if weights.prediction is not None and weights.prediction != prediction:
        raise WeightsError(
            f"init={config.init} predicts {weights.prediction}, and diffusion.prediction={prediction}: set "
            f"diffusion.prediction={weights.prediction}, or begin with other weights"
        )
    if weights.levels is not None:
        if weights.levels.alpha_bar is not None and PROCESSES[prediction] != "discrete":
            raise WeightsError(
                f"init={config.init} holds the noise levels of a discrete process, and diffusion.prediction="
                f"{prediction} has none: set diffusion.prediction=epsilon or v, or begin with other weights"
            )
        if differing := weights.levels.differing(config.diffusion):
            log.warning(f"{config.init} was trained with {differing}, which are other noise levels than this run's")
    init_scaling, scaling = (weights.scale or 0.0, weights.shift or 0.0), (contract.scale, contract.shift)
    if weights.scale is not None and not all(map(partial(math.isclose, rel_tol=1e-6), init_scaling, scaling)):
        raise WeightsError(
            f"init={config.init} was trained on latents of scale {init_scaling[0]:g} and shift {init_scaling[1]:g}, "
            f"and {config.data.train} holds latents of scale {scaling[0]:g} and shift {scaling[1]:g}: encode with the "
            "autoencoder of those weights, or begin with others"
        )
    unknown = [
        name
        for name, value in (
            ("kind of prediction", weights.prediction),
            ("latent scale", weights.scale),
            ("noise levels", weights.levels and (weights.levels.settings or weights.levels.alpha_bar is not None)),
        )
        if not value
    ]
    if unknown:
        log.warning(
            f"{config.init} does not say its {' and '.join(unknown)}, so nothing proves that they are this run's"
        )
    if contract.text is not None and weights.text_width not in (None, contract.text.width):
        log.warning(
            f"the text encoder of {config.init} has states of width {weights.text_width}, and {config.data.train} "
            f"holds states of width {contract.text.width}: this run reads the cache's"
        )


def _in_words(facts: Mapping[str, Any]) -> list[str]:
    """Such as ["run", "ema weights", "at 12,800 samples", "SHA-256 0123456789ab"]."""
    words = [str(facts["kind"])]
    words += [f"{facts['weights']} weights"] if "weights" in facts else []
    words += [f"at {facts['n']:,} samples"] if "n" in facts else []
    return [*words, f"SHA-256 {facts['sha256'][:12]}"]
