"""A run's trained denoiser and the encoders of its cache, which eval, sample and export load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EncodersConfig, ModelConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract
from pipeline.data.format.contract_json import contract_from_json
from pipeline.errors import ContractMismatch, RunError
from pipeline.inference.named import load_named, located, named_text
from pipeline.inference.packed import pack
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.models.tasks.choose import make_task
from pipeline.models.tasks.task import Task
from pipeline.runs.averages import label, load_average
from pipeline.runs.checkpoint import RunInfo, load_run
from pipeline.runs.directory import dataset_urls


@dataclass(frozen=True)
class Trained:
    """A run and one of its checkpoints.

    contract: of the cache that it was trained on. n: samples seen by the weights. weights: "ema", "raw", or an average
    such as "ema=0.1". state: full fp32 weights by parameter name.
    """

    info: RunInfo
    contract: Contract
    n: int
    weights: str
    state: dict[str, Tensor]

    def denoiser(
        self,
        empty_LD: Tensor | None,
        device: torch.device | str = "cpu",
        *,
        packed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Denoiser:
        """The denoiser with these weights, in evaluation mode. empty_LD: the encoded empty caption, for guidance.

        packed: the denoiser only predicts, on a CPU with its weights in oneDNN's order. `state` is empty afterwards.
        dtype: of its weights and activations.
        """
        config = self.info.config
        task = make_task(config.task, config.model, self.contract, empty_LD)
        denoiser = build_denoiser(config.model, task, self.state, device, dtype)
        if packed:
            self.state.clear()
            pack(denoiser.unet)
        return denoiser

    def encoders(
        self, device: torch.device | str = "cpu", override: EncodersConfig | None = None, beside: Sequence[str] = ()
    ) -> tuple[FirstStage, TextTower | None]:
        """The encoders that the run's cache was made with: from `override`, else from the run's `encoders`, else from
        the contract's names. beside: datasets beside which they are looked for, after the run's own. Raises
        ContractMismatch when they are other encoders."""
        config = self.info.config
        beside = (*dataset_urls(config.data), config.data.val, *beside)
        return load_encoders(self.contract, device, override, named=config.encoders, beside=beside)


def load_trained(url: str, at: int = 0, which: str = "ema", ema: float = 0.0) -> Trained:
    """The run at `url` and its checkpoint at `at` samples (0: the newest that has these weights whole). which,
    ema: as in load_average. Raises RunError."""
    info = load_run(url)
    n, state = load_average(info.storage, at, which, ema)
    return Trained(info, contract_from_json(info.contract), n, label(which, ema), state)


def build_denoiser(
    config: ModelConfig,
    task: Task,
    state: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Denoiser:
    """A denoiser in evaluation mode that holds the float32 tensors of `state`, not copies, where they are on `device`
    and `dtype` is float32."""
    with torch.device("meta"):
        denoiser = Denoiser(config, task)
    try:
        denoiser.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        raise RunError(f"the checkpoint's weights are not those of the run's configuration: {error}") from None
    return denoiser.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_encoders(
    contract: Contract,
    device: torch.device | str = "cpu",
    override: EncodersConfig | None = None,
    *,
    named: EncodersConfig | None = None,
    beside: Sequence[str] = (),
) -> tuple[FirstStage, TextTower | None]:
    """The autoencoder and the text tower that a cache of this contract was made with; no tower, and none is loaded,
    where the cache has no captions.

    override: where to load them from, whatever the contract's names; of a cache of pixels it says where the text tower
    is alone. Without it they are looked for by the names of `named`, a run's, or else of the contract, in the working
    directory and beside the datasets `beside` (named.py). Raises WeightsError when they are not found, ContractMismatch
    when the loaded weights are not those that encoded the cache.
    """
    pixels = contract.stored == "pixels"
    if not (contract.vae_sha256 or pixels) or (contract.text is not None and not contract.text_sha256):
        raise ContractMismatch(
            "the cache does not know its encoders (`latentmill index` was given none), so nothing proves which to "
            "load: index it again with encoders=NAME"
        )
    config = encoders_of(contract, override, named)
    if override is not None:
        first_stage = load_autoencoder(config, device)
    else:
        first_stage = load_named(config, contract.vae_sha256, beside, device)
        config = named_text(config, beside)
    tower = load_text(config, device) if contract.text is not None else None
    pairs: dict[str, tuple[Any, Any]] = {
        f"autoencoder {config.vae}": (first_stage.weights_sha256, contract.vae_sha256 or first_stage.weights_sha256),
        "latent scale": (first_stage.scale, contract.scale),
        "latent shift": (first_stage.shift, contract.shift),
    }
    if tower is not None and contract.text is not None:
        pairs |= {
            f"text tower {config.text}": (tower.weights_sha256, contract.text_sha256),
            "text layer": (tower.layer, contract.text.layer),
            "padding id": (tower.pad, contract.text.pad),
            "context length": (tower.length, contract.text.length),
            "quick_gelu": (tower.quick_gelu, contract.text.quick_gelu),
        }
    differing = [
        f"{name}: {str(loaded)[:12]} here, {str(expected)[:12]} there"
        for name, (loaded, expected) in pairs.items()
        if loaded != expected
    ]
    if differing:
        raise ContractMismatch(
            f"these are not the encoders that made the cache ({'; '.join(differing)}); give those with encoders="
        )
    return first_stage, tower


def encoders_of(
    contract: Contract, override: EncodersConfig | None, named: EncodersConfig | None = None
) -> EncodersConfig:
    """The encoders of a cache, as in `load_encoders`; of a cache of pixels there is no autoencoder."""
    config = override or named or from_dict(EncodersConfig, contract.encoders)
    return replace(config, vae="pixels") if contract.stored == "pixels" else config


def located_encoders(info: RunInfo, override: EncodersConfig | None, beside: Sequence[str] = ()) -> EncodersConfig:
    """The encoders that `Trained.encoders` would load for a run, with the place where its autoencoder lies: for what
    can be known of them without their weights."""
    config = encoders_of(contract_from_json(info.contract), override, info.config.encoders)
    beside = (*dataset_urls(info.config.data), info.config.data.val, *beside)
    return config if override is not None else located(config, beside)


def encode_captions(tower: TextTower, captions: list[str], *, trimmed: bool = False) -> Tensor:
    """Captions -> states (B, L, D) float32, rounded through float16 as a cache holds them.

    trimmed: zeros after each caption's end token, as in a cache with text_storage=trimmed.
    """
    return encode_tokens(tower, tower.tokenize(captions), trimmed=trimmed)


def encode_tokens(tower: TextTower, tokens_BL: Tensor, *, trimmed: bool = False) -> Tensor:
    """As encode_captions, from ids (B, L)."""
    states = tower.encode(tokens_BL).half().float()
    if trimmed:
        end_tokens_before = (tokens_BL == tower.eot).cumsum(dim=1) - (tokens_BL == tower.eot).int()  # (B, L)
        states[end_tokens_before.to(states.device) > 0] = 0
    return states
