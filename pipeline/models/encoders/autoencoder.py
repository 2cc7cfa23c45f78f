"""The first stage: images to posterior moments of latents and back (Rombach et al. 2021, section 3.1).

It can be any diffusers AutoencoderKL. A latent is z' = (z - shift) * scale, where z is drawn from the posterior N(mean,
exp(logvar)), so the standard deviation of a channel is near 1. Caches hold unscaled moments; only `sample_posterior`
scales, and only `FirstStage.decode` undoes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.described import MOST_BLOCKS, Autoencoder, read_described
from pipeline.models.encoders.fetched import hub_error, part_folder, quiet_hub_clients, require_hashes
from pipeline.models.kernels.upsampled import FoldedUpsample
from pipeline.models.weights import read_file, require_room, require_whole, save_tensors, weights_hash
from pipeline.parsing.text import one_line
from pipeline.storage.staging import writing

DEMO = Path(__file__).resolve().parent.parent.parent / "assets" / "demo" / "vae"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
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


class FirstStage:
    """An autoencoder with two operations, encode_moments and decode.

    scale, shift: of the latents. downsampling: pixels per latent position along a side. latent_channels: C.
    weights_sha256: hash of its weights, which does not depend on the file that they came from.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, device: torch.device, reload: Callable[[], FirstStage] | None = None
    ) -> None:
        """model: in float32; the stage takes it over and changes it. reload: loads the stage again in float32."""
        config = model.config
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = int(config.latent_channels)
        self.weights_sha256 = weights_hash(model.state_dict().items())
        self.device, self.dtype = device, dtype
        self._reload = reload
        self._float32: FirstStage | None = None
        # Module.to directly: diffusers' override warns about a cast that concerns no layer of this class.
        self.model = torch.nn.Module.to(model, device=device, dtype=dtype).eval().requires_grad_(False)
        for block in self.model.decoder.up_blocks:
            for i, up in enumerate(getattr(block, "upsamplers", None) or ()):
                block.upsamplers[i] = FoldedUpsample(up.conv)

    def float32(self) -> FirstStage:
        """The stage with the same weights in float32 on the same device; a float32 stage returns itself.

        A cast loses bits, so the first call loads the weights again. Raises WeightsError when they have changed or can
        no longer be loaded.
        """
        if self.dtype == torch.float32:
            return self
        if self._float32 is None:
            assert self._reload is not None, "this stage was made without a way to load it again"
            loaded = self._reload()
            if loaded.weights_sha256 != self.weights_sha256:
                raise WeightsError("the autoencoder's weights have changed since they were first loaded: start again")
            self._float32 = loaded
        return self._float32

    @torch.no_grad()
    def encode_moments(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> posterior mean and log-variance (B, 2C, H/f, W/f), float32, unscaled."""
        # Channels last makes convolutions on a CPU up to twice as fast.
        x = x_BCHW.to(self.device, self.dtype, memory_format=torch.channels_last)
        h = self.model.encoder(x)
        return (h if self.model.quant_conv is None else self.model.quant_conv(h)).float().contiguous()

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, h f, w f), float32, clamped to [-1, 1]."""
        z = z_BCHW.to(self.device).float() / self.scale + self.shift
        z = z.to(self.dtype, memory_format=torch.channels_last)  # faster, as above
        return self.model.decode(z).sample.float().clamp(-1, 1)


def load_autoencoder(config: EncodersConfig, device: torch.device | str = "cpu") -> FirstStage:
    """The autoencoder that `config` names: fetched into `config.weights`, "demo", a folder, a safetensors file, or a
    name on the Hugging Face hub. Raises WeightsError when its weights cannot be loaded or do not fit."""
    if config.vae_dtype not in DTYPES:
        raise ConfigError(f"encoders.vae_dtype={config.vae_dtype}: choose one of {', '.join(DTYPES)}")
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
    stage = FirstStage(model, DTYPES[config.vae_dtype], torch.device(device), reload)
    if config.weights:
        require_hashes(config, "vae", vae_sha256=stage.weights_sha256)
    return stage


def save_autoencoder(stage: FirstStage, folder: Path) -> None:
    """Write a float32 stage to a folder that `load_autoencoder` reads. Equal weights give equal bytes."""
    assert stage.dtype == torch.float32
    config = {name: value for name, value in dict(stage.model.config).items() if not name.startswith("_")}
    config["_class_name"] = "AutoencoderKL"
    with writing(folder / CONFIG):
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in stage.model.state_dict().items()}
    save_tensors(state, folder / WEIGHTS)


def _build(config: Mapping[str, Any], name: str, weights: Path | None = None) -> Any:
    """An AutoencoderKL with random weights. name: for the message of WeightsError. weights: the file that is to fill
    it, which must have the bytes for that."""
    from pipeline.models.encoders.packages import AutoencoderKL

    def build() -> Any:
        return AutoencoderKL.from_config(dict(config))

    try:
        require_room(build, f"encoders.vae={name}", weights)
        return build()
    except WeightsError:
        raise
    except Exception as error:  # diffusers checks little of a configuration
        raise WeightsError(f"encoders.vae={name} is no AutoencoderKL: {one_line(str(error))[:200]}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an autoencoder's folder. Raises WeightsError."""
    config, described = read_described(folder / CONFIG, Autoencoder)
    levels = len(described.block_out_channels)
    if not 1 <= levels <= MOST_BLOCKS or {len(described.down_block_types), len(described.up_block_types)} != {levels}:
        raise WeightsError(
            f"{folder / CONFIG}: as many down_block_types and up_block_types are wanted as block_out_channels, 1 to "
            f"{MOST_BLOCKS}"
        )
    return config


def _load_pretrained(name: str, subfolder: str, local: bool) -> Any:
    """Load from a local folder or the Hugging Face hub; only safetensors (a pickle could run code)."""
    from pipeline.models.encoders.packages import AutoencoderKL

    if local:
        folder = Path(name) / subfolder
        config = _read_config(folder)
    try:
        if local:
            require_room(lambda: AutoencoderKL.from_config(config), f"encoders.vae={name}", folder)
        with quiet_hub_clients():
            model, info = AutoencoderKL.from_pretrained(
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
                f"encoders.vae={name}: cannot load an AutoencoderKL from it: {one_line(str(error))[:500]}"
            ) from error
        raise WeightsError(
            f"encoders.vae={name} cannot be fetched from the Hugging Face hub ({hub_error(error)}). By hand: put its "
            f"{CONFIG} and {WEIGHTS} into a folder and give encoders.vae=FOLDER; or run `latentmill fetch` where there "
            "is internet, and give encoders.weights="
        ) from error
    _refuse_mismatch(name, info["missing_keys"], info["unexpected_keys"])
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
