"""Loads and saves the networks of a first stage: any AutoencoderKL or VQModel of diffusers, a single file in diffusers'
or CompVis' names, or none at all where latents are pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.described import MOST_BLOCKS, Autoencoder, Quantised, read_described
from pipeline.models.encoders.fetched import hub_error, part_folder, quiet_hub_clients, require_hashes
from pipeline.models.encoders.first_stage import NETWORKS, FirstStage, Identity, KLStage, NetworkStage, VQStage
from pipeline.models.weights import read_file, require_room, require_whole, save_tensors
from pipeline.parsing.text import one_line
from pipeline.storage.staging import writing

DEMO = Path(__file__).resolve().parent.parent.parent / "assets" / "demo" / "vae"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PIXELS = "pixels"
"""encoders.vae of caches and models whose latents are the pixels."""
KL, VQ = KLStage.architecture, VQStage.architecture
UNSCALED = 1.0
"""The scale of a VQModel's latents where its configuration has none: those that were published so were trained on
unscaled latents, and diffusers' default, Stable Diffusion's 0.18215, is right for none of them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STABLE_DIFFUSION: dict[str, Any] = {  # kl-f8, in single files of Stable Diffusion 1 and 2, which have no config
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def load_autoencoder(config: EncodersConfig, device: torch.device | str = "cpu") -> FirstStage:
    """The first stage that `config` names: fetched into `config.weights`, "demo", a folder, a safetensors file, a name
    on the Hugging Face hub, or "pixels" for none. Raises WeightsError when its weights cannot be loaded or do not fit.
    """
    if config.vae_dtype not in DTYPES:
        raise ConfigError(f"encoders.vae_dtype={config.vae_dtype}: choose one of {', '.join(DTYPES)}")
    if config.vae == PIXELS:
        return Identity(device)
    if config.weights:
        path, subfolder = part_folder(config, "vae"), ""
    else:
        path, subfolder = DEMO if config.vae == "demo" else Path(config.vae).expanduser(), config.vae_subfolder
    folder = path / subfolder
    if config.seed >= 0:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = _build(_read_config(folder) if folder.is_dir() else STABLE_DIFFUSION, config.vae)
    elif path.is_file():
        model = _load_single_file(path)
    elif path.is_dir():
        model = _load_pretrained(str(path), subfolder, local=True)
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", config.vae) and not config.vae.endswith(".safetensors"):
        model = _load_pretrained(config.vae, subfolder, local=False)
    else:
        raise WeightsError(
            f"encoders.vae={config.vae}: there is no such folder or file, and it is not a "
            "valid name on the Hugging Face hub"
        )
    if config.seed < 0:
        require_whole(f"encoders.vae={config.vae}", model.state_dict())
    reload = partial(load_autoencoder, replace(config, vae_dtype="float32"), device)
    stage = NETWORKS[type(model).__name__](model, DTYPES[config.vae_dtype], torch.device(device), reload)
    if config.weights:
        require_hashes(config, "vae", vae_sha256=stage.weights_sha256)
    return stage


def load_network(config: EncodersConfig, device: torch.device | str = "cpu") -> NetworkStage:
    """The same, of a first stage that is a network. Raises WeightsError also for "pixels", which are none."""
    stage = load_autoencoder(config, device)
    if not isinstance(stage, NetworkStage):
        raise WeightsError(f"encoders.vae={config.vae} names no network, and one is wanted here")
    return stage


def described_network(config: EncodersConfig) -> Mapping[str, Any] | None:
    """The configuration of the network that `config` names, without its weights; None for "pixels", which are none. Of
    names on the hub, and of files without a configuration, it is Stable Diffusion's. Raises WeightsError."""
    if config.vae == PIXELS:
        return None
    path = part_folder(config, "vae") if config.weights else DEMO if config.vae == "demo" else Path(config.vae)
    folder = path.expanduser() / ("" if config.weights or config.vae == "demo" else config.vae_subfolder)
    for place in (folder, folder.parent):
        if (place / CONFIG).is_file() and (place == folder or folder.is_file()):
            return _read_config(place)
    return STABLE_DIFFUSION


def save_autoencoder(stage: FirstStage, folder: Path) -> None:
    """Write a float32 stage that is a network to a folder that `load_autoencoder` and diffusers read. Equal weights
    give equal bytes."""
    assert isinstance(stage, NetworkStage) and stage.dtype == torch.float32
    config = {name: value for name, value in dict(stage.model.config).items() if not name.startswith("_")}
    config |= {"_class_name": stage.architecture, "scaling_factor": stage.scale}
    with writing(folder / CONFIG):
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in stage.model.state_dict().items()}
    save_tensors(state, folder / WEIGHTS)


def _architecture(config: Mapping[str, Any], where: str) -> str:
    """The class of diffusers that a configuration is of. Raises WeightsError for another than these two."""
    name = config.get("_class_name", KL)
    if name not in NETWORKS:
        raise WeightsError(f"{where} is of a {one_line(str(name))[:60]}; {KL} and {VQ} are read")
    return name


def _scaled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the scale that a VQModel's has where none is written."""
    return {**({"scaling_factor": UNSCALED} if config.get("_class_name") == VQ else {}), **config}


def _build(config: Mapping[str, Any], name: str, weights: Path | None = None) -> Any:
    """An autoencoder with random weights. name: for the message of WeightsError. weights: the file that is to fill
    it, which must have the bytes for that."""
    from pipeline.models.encoders import packages

    architecture = _architecture(config, f"encoders.vae={name}")

    def build() -> Any:
        return getattr(packages, architecture).from_config(_scaled(config))

    try:
        require_room(build, [architecture, _scaled(config)], f"encoders.vae={name}", weights)
        return build()
    except WeightsError:
        raise
    except Exception as error:  # diffusers checks little of a configuration
        raise WeightsError(f"encoders.vae={name} is no {architecture}: {one_line(str(error))[:200]}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an autoencoder's folder. Raises WeightsError."""
    path = folder / CONFIG
    config, described = read_described(path, Autoencoder)
    if _architecture(config, str(path)) == VQ:
        described = read_described(path, Quantised)[1]
    levels = len(described.block_out_channels)
    if not 1 <= levels <= MOST_BLOCKS or {len(described.down_block_types), len(described.up_block_types)} != {levels}:
        raise WeightsError(
            f"{path}: as many down_block_types and up_block_types are wanted as block_out_channels, 1 to {MOST_BLOCKS}"
        )
    return config


def _load_pretrained(name: str, subfolder: str, local: bool) -> Any:
    """Load from a local folder or the Hugging Face hub; only safetensors (a pickle could run code)."""
    from pipeline.models.encoders import packages

    architecture = KL
    if local:
        folder = Path(name) / subfolder
        config = _read_config(folder)
        architecture = _architecture(config, str(folder / CONFIG))
    try:
        if local:
            network = getattr(packages, architecture)
            require_room(lambda: network.from_config(config), [architecture, config], f"encoders.vae={name}", folder)
        with quiet_hub_clients():
            if not local:
                config = packages.AutoencoderKL.load_config(name, subfolder=subfolder or None)
                architecture = _architecture(config, f"encoders.vae={name}")
            model, info = getattr(packages, architecture).from_pretrained(
                name,
                subfolder=subfolder or None,
                use_safetensors=True,
                output_loading_info=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                local_files_only=local,
                **({"variant": _variant(folder)} if local else {}),
            )
    except WeightsError:
        raise
    except Exception as error:  # diffusers and safetensors have errors of many kinds
        if local:
            raise WeightsError(
                f"encoders.vae={name}: cannot load an {architecture} from it: {one_line(str(error))[:500]}"
            ) from error
        raise WeightsError(
            f"encoders.vae={name} cannot be fetched from the Hugging Face hub ({hub_error(error)}). By hand: put its "
            f"{CONFIG} and {WEIGHTS} into a folder and give encoders.vae=FOLDER; or run `latentmill fetch` where there "
            "is internet, and give encoders.weights="
        ) from error
    _refuse_mismatch(name, info["missing_keys"], info["unexpected_keys"])
    if architecture == VQ:
        model.register_to_config(scaling_factor=config.get("scaling_factor", UNSCALED))
    return model


def _variant(folder: Path) -> str | None:
    """The variant that diffusers must be asked for, such as fp16, where a folder holds no weights without one."""
    if (folder / WEIGHTS).is_file() or (folder / f"{WEIGHTS}.index.json").is_file():
        return None
    name = re.escape(WEIGHTS.removesuffix(".safetensors"))
    pattern = re.compile(rf"{name}\.(\w+)\.safetensors|{re.escape(WEIGHTS)}\.index\.(\w+)\.json")
    variants = {match[1] or match[2] for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    return min(variants, key=lambda variant: (variant == "non_ema", variant), default=None)


def _load_single_file(path: Path) -> Any:
    """Load one safetensors file, with diffusers' names (config.json beside it) or CompVis' (Stable Diffusion 1, 2)."""
    if path.suffix != ".safetensors":
        raise WeightsError(f"encoders.vae={path}: only .safetensors files are read (a pickle could run code)")
    state = read_file(path)[0]
    config_file = path.parent / CONFIG
    if config_file.exists():
        model = _build(_read_config(path.parent), str(path), path)
    else:
        model = _build(STABLE_DIFFUSION, str(path))
    if compvis_vae.is_compvis(state):
        state = compvis_vae.from_compvis(state)
    state = {_present_name(name): tensor for name, tensor in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"encoders.vae={path} holds another architecture: {one_line(str(error))[:500]}") from None
    _refuse_mismatch(str(path), missing, unexpected)
    return model


def _present_name(name: str) -> str:
    """diffusers' present name of a tensor: attention had other names, which published files still have."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def _refuse_mismatch(name: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise WeightsError if names of weights are missing or unexpected."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise WeightsError(
            f"encoders.vae={name} holds another architecture: {len(missing)} weights missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
