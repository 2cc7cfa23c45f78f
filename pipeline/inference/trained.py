"""A run's trained denoiser and the encoders that its cache was made with: what eval, sample and export begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import EncodersConfig, ModelConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract, contract_from_json
from pipeline.errors import ContractMismatch, RunError
from pipeline.inference.packed import pack
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.autoencoder import FirstStage, load_autoencoder
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.models.tasks.choose import make_task
from pipeline.models.tasks.task import Task
from pipeline.runs.averages import label, load_average
from pipeline.runs.checkpoint import RunInfo, load_run


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
        self, empty_LD: Tensor | None, device: torch.device | str = "cpu", *, packed: bool = False
    ) -> Denoiser:
        """The denoiser with these weights, in evaluation mode. empty_LD: the encoded empty caption, for guidance.

        packed: it only predicts, and `state` is empty afterwards: on a CPU its weights are put into oneDNN's order.
        """
        config = self.info.config
        task = make_task(config.task, self.contract.latent_shape, empty_LD, trimmed=self.contract.trimmed)
        denoiser = build_denoiser(config.model, task, self.state, device)
        if packed:
            self.state.clear()
            pack(denoiser.unet)
        return denoiser

    def encoders(
        self, device: torch.device | str = "cpu", override: EncodersConfig | None = None
    ) -> tuple[FirstStage, TextTower]:
        """The encoders that the run's cache was made with: from `override`, else the run's own `encoders`, else the
        contract's names. Raises ContractMismatch when they are others."""
        return load_encoders(self.contract, device, override or self.info.config.encoders)


def load_trained(url: str, at: int = 0, which: str = "ema", ema: float = 0.0) -> Trained:
    """The run at `url` and its checkpoint at `at` samples (0: the newest good one). which, ema: as load_average has
    them. Raises RunError."""
    info = load_run(url)
    n, state = load_average(info.storage, at, which, ema)
    return Trained(info, contract_from_json(info.contract), n, label(which, ema), state)


def build_denoiser(
    config: ModelConfig, task: Task, state: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> Denoiser:
    """A denoiser that holds `state`'s tensors themselves (no second copy where they lie on `device`), in eval mode."""
    with torch.device("meta"):
        denoiser = Denoiser(config, task)
    try:
        denoiser.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        raise RunError(f"the checkpoint's weights are not those of the run's configuration: {error}") from None
    return denoiser.to(device).eval().requires_grad_(False)


def load_encoders(
    contract: Contract, device: torch.device | str = "cpu", override: EncodersConfig | None = None
) -> tuple[FirstStage, TextTower]:
    """The autoencoder and the text tower that a cache of this contract was made with.

    override: where to load them from, when the contract's own names mean nothing here. Raises ContractMismatch when
    what was loaded has other weights than what encoded the cache.
    """
    if not (contract.vae_sha256 and contract.text_sha256):
        raise ContractMismatch(
            "the cache does not know its encoders (`latentmill index` was given none), so nothing proves which to "
            "load: index it again with encoders=NAME"
        )
    config = override or from_dict(EncodersConfig, contract.encoders)
    first_stage, tower = load_autoencoder(config, device), load_text(config, device)
    pairs = {
        f"autoencoder {config.vae}": (first_stage.weights_sha256, contract.vae_sha256),
        f"text tower {config.text}": (tower.weights_sha256, contract.text_sha256),
        "text layer": (tower.layer, contract.text.layer),
        "padding id": (tower.pad, contract.text.pad),
        "context length": (tower.length, contract.text.length),
        "quick_gelu": (tower.quick_gelu, contract.text.quick_gelu),
        "latent scale": (first_stage.scale, contract.scale),
        "latent shift": (first_stage.shift, contract.shift),
    }
    differing = [
        f"{name}: {str(here)[:12]} here, {str(there)[:12]} there"
        for name, (here, there) in pairs.items()
        if here != there
    ]
    if differing:
        raise ContractMismatch(
            f"these are not the encoders that made the cache ({'; '.join(differing)}); give those with encoders="
        )
    return first_stage, tower


def encode_captions(tower: TextTower, captions: list[str], *, trimmed: bool = False) -> Tensor:
    """Captions -> states (B, L, D) float32, rounded through float16 as a cache holds them.

    trimmed: zeros after each caption's end token, as a cache with text_storage=trimmed is read.
    """
    return encode_tokens(tower, tower.tokenize(captions), trimmed=trimmed)


def encode_tokens(tower: TextTower, tokens_BL: Tensor, *, trimmed: bool = False) -> Tensor:
    """As encode_captions, from ids (B, L)."""
    states = tower.encode(tokens_BL).half().float()
    if trimmed:
        ended = (tokens_BL == tower.eot).cumsum(dim=1) - (tokens_BL == tower.eot).int()  # end tokens before each
        states[ended.to(states.device) > 0] = 0
    return states
