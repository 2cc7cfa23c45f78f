"""`latentmill export format=compvis`: one file under the names of Stable Diffusion's own releases.

    model.diffusion_model.*                       the UNet
    first_stage_model.*                           the autoencoder
    cond_stage_model.transformer.text_model.*     the text tower in transformers' names, as Stable Diffusion 1's; or
    cond_stage_model.model.*                      in open_clip's, as Stable Diffusion 2's, whose last block is not read
    cond_stage_model.embedding, .channel_mapper, .transformer.attn_layers    what a task has learned, where CompVis has
                                                  the same: tokens of classes, averaged labels, a transformer of tokens
    model.diffusion_model.label_emb.weight        classes or levels of noise beside the timestep, as one table
    betas, alphas_cumprod, ...                    the forward process's tables
    v_pred, ztsnr                                 empty: ComfyUI's marks of prediction=v and of zero terminal SNR

What these names cannot express (the kind of prediction, the latent scale, the UNet's configuration) is stored under
`latentmill`: in the metadata of a .safetensors, beside the state_dict of a .ckpt. A .ckpt holds only tensors and text,
so that PyTorch opens it with weights_only=True.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline
from pipeline.config import DiffusionConfig, ExportConfig
from pipeline.config.loading.merge import to_dict
from pipeline.diffusion.process import PROCESSES
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError, DestinationExists
from pipeline.inference.trained import Trained
from pipeline.interchange import clip
from pipeline.interchange import unet as convert
from pipeline.interchange.agreement import ExportDiffers
from pipeline.interchange.class_table import class_table, with_class_table
from pipeline.interchange.folder import hash_file
from pipeline.interchange.noise_levels import levels_of, marks
from pipeline.interchange.single import is_export
from pipeline.interchange.tasks.base import export_of
from pipeline.log import show
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders import compvis_vae
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.weights import FACTS, read_file, save_tensors
from pipeline.storage.base import Storage
from pipeline.storage.staging import require_place, require_writable, staging_folder, writing
from pipeline.storage.urls import open_storage, split_url

SUFFIXES = (".safetensors", ".ckpt")
SPECIFIED = ("epsilon", "v")  # kinds of prediction that Stability's specification of metadata can name
NORM_GROUPS = 32  # in CompVis' code, which no configuration changes
STABLE_DIFFUSION_SCALE = 0.18215  # of the latents; the released files do not hold it


def look_compvis(config: ExportConfig) -> tuple[Storage, str]:
    """The destination's store and key. Raises DestinationExists where something lies there that no export wrote."""
    if Path(config.dest).suffix not in SUFFIXES:
        raise ConfigError(f"dest={config.dest}: format=compvis writes one {' or '.join(SUFFIXES)} file")
    root, key = split_url(config.dest)
    storage = open_storage(root)
    require_place(storage, key)
    if storage.exists(key) and not is_export(storage, key):
        raise DestinationExists(f"{config.dest} exists and no export wrote it: choose another dest")
    require_writable(storage)
    return storage, key


def export_compvis(config: ExportConfig, trained: Trained, denoiser: Denoiser, dest: tuple[Storage, str]) -> str:
    """Write the file, whole or not at all. Its SHA-256 where it is to be pushed, else ""."""
    suffix = Path(config.dest).suffix
    diffusion = trained.info.config.diffusion
    storage, key = dest
    with staging_folder(storage) as folder:
        state = single_file(config, trained, denoiser)
        facts = {
            "version": pipeline.__version__,
            "n": trained.n,
            "weights": trained.weights,
            "prediction": diffusion.prediction,
            "diffusion": levels_of(diffusion).settings,
            "scale": trained.contract.scale,
            "shift": trained.contract.shift,
            "model": to_dict(denoiser.unet.config),
        }
        export = export_of(trained, denoiser)
        if export.tells:
            facts |= export.facts()
        staging = folder / f"model{suffix}"
        write(staging, suffix, state, facts)
        if config.check:
            check(staging, suffix, state)
        checked = hash_file(staging) if config.push else ""
        storage.put_file(key, staging)
    notes = [compvis_note(diffusion), groups_note(denoiser), export.note()]
    for note in filter(None, notes):
        show(note if note.startswith("export: ") else f"export: note: {note}")
    return checked


def compvis_note(config: DiffusionConfig) -> str:
    """A line about the process of a model whose process is not Stable Diffusion 1's, which the file cannot tell; "" for
    other models."""
    defaults = DiffusionConfig()
    discrete_names = ["schedule", "beta_start", "beta_end", "timesteps", "zero_terminal_snr"]
    names = ["prediction", *{"flow": ["timesteps"], "edm": ["sigma_data"]}.get(config.prediction, discrete_names)]
    if all(getattr(config, name) == getattr(defaults, name) for name in names):
        return ""
    facts = ", ".join(f"{name}={getattr(config, name)}" for name in names)
    return f"export: note: software that loads the file must be told {facts}"


def groups_note(denoiser: Denoiser) -> str:
    """A line where CompVis' own code would load the UNet and compute something else, "" for other models."""
    groups = denoiser.unet.config.norm_groups
    if groups == NORM_GROUPS:
        return ""
    return (
        f"CompVis' own code has {NORM_GROUPS} groups in every norm, and this network {groups}: their code loads the "
        f"file without a word and predicts nonsense, unless its GroupNorm32 is given {groups} groups"
    )


def single_file(config: ExportConfig, trained: Trained, denoiser: Denoiser) -> dict[str, Tensor]:
    """Every tensor of the file. Prints which parts it cannot hold."""
    contract, unet = trained.contract, denoiser.unet
    diffusion, export = trained.info.config.diffusion, export_of(trained, denoiser)
    state = convert.to_compvis(unet.state_dict(), unet.config)
    if (vectors := export.vectors()) is not None:
        state = with_class_table(state, class_table(unet, vectors), "compvis")
    state |= process_tables(diffusion) | marks(diffusion) | export.compvis()
    if not contract.vae_sha256 or (contract.text is not None and not contract.text_sha256):
        show("export: the run's cache does not know its encoders, so the file holds the UNet alone")
        return _float32_copies(state)
    if contract.stored == "pixels":
        show("export: the run draws pixels, without an autoencoder, so the file holds the UNet alone")
        return _float32_copies(state)
    if contract.shift:
        raise ConfigError(f"latents are shifted by {contract.shift:g}, and CompVis' layout knows a scale alone")
    if contract.scale != STABLE_DIFFUSION_SCALE:
        state["scale_factor"] = torch.tensor(contract.scale)
    first_stage, tower = trained.encoders(override=config.encoders)
    exact = first_stage.float32()
    assert isinstance(exact, NetworkStage), "of stored pixels there is none"
    vae = compvis_vae.to_compvis(exact.model.state_dict())
    state |= {f"{compvis_vae.PREFIX}{name}": tensor for name, tensor in vae.items()}
    if export.reads_states and tower is not None and clip.is_clip(tower):
        state |= clip.compvis_state(tower)
    elif export.reads_states:
        show("export: CompVis' layout cannot hold this run's text tower, so the file is without one")
    return _float32_copies(state)


def process_tables(config: DiffusionConfig) -> dict[str, Tensor]:
    """The tables (T,) that CompVis' models hold beside their weights, float32: Ho et al. 2020, equations 4, 6 and 7.
    {} for a process without betas."""
    if PROCESSES[config.prediction] != "discrete":
        return {}
    alpha_bar = Schedule(config).alpha_bar.double()
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    betas = 1 - alpha_bar / alpha_bar_prev
    variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
    tables = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - alpha_bar_prev) * (1 - betas).sqrt() / (1 - alpha_bar),
    }
    return {name: table.float() for name, table in tables.items()}


def write(path: Path, suffix: str, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the file in the format of its suffix. Raises StorageError."""
    facts_json = json.dumps(facts, sort_keys=True)
    if suffix == ".safetensors":
        specified = facts.get("prediction") in SPECIFIED
        named = {"modelspec.prediction_type": facts["prediction"]} if specified else {}
        save_tensors(state, path, {FACTS: facts_json, **named})
    else:
        with writing(path), path.open("wb") as file:
            torch.save({"state_dict": state, FACTS: facts_json}, file)


def check(path: Path, suffix: str, state: dict[str, Tensor]) -> None:
    """Read the file as `init=` does and compare every tensor. Raises ExportDiffers."""
    stored = read_file(path, suffix)[0]
    differing = [name for name in state if name not in stored or not torch.equal(stored[name], state[name])]
    if differing or len(stored) != len(state):
        raise ExportDiffers(f"tensors read back differ: {', '.join(differing[:5])}; nothing was written")
    show(f"check: all {len(state):,} tensors read back as they were written")


def _float32_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 copies on the CPU that share no memory, which both formats require."""
    return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
