"""`latentmill export format=compvis` of an autoencoder: one file under the names of CompVis' AutoencoderKL and
VQModelInterface.

    encoder.*  decoder.*  quant_conv.*  post_quant_conv.*       and, of a codebook, quantize.embedding.weight

The file has no configuration; ours is under `latentmill` (compvis.py of this room's parent).
"""

from __future__ import annotations

from pathlib import Path

import pipeline
from pipeline.config import ExportConfig, FirstStageConfig
from pipeline.config.loading.merge import to_dict
from pipeline.errors import ConfigError
from pipeline.inference.first_stage import TrainedAutoencoder
from pipeline.interchange.compvis import NORM_GROUPS, check, write
from pipeline.interchange.first_stage.scale import measure
from pipeline.interchange.folder import hash_file
from pipeline.log import show
from pipeline.models.encoders import compvis_vae
from pipeline.storage.base import Storage
from pipeline.storage.staging import staging_folder

CODEBOOK = "quantize.embedding.weight"
"""The same name in both layouts."""


def export_file(config: ExportConfig, trained: TrainedAutoencoder, dest: tuple[Storage, str]) -> str:
    """Write the file, whole or not at all. Its SHA-256 where it is to be pushed, else "". Raises ConfigError for what
    the layout cannot hold, and RunError where the scale of latents cannot be measured, before anything is written."""
    require_layout(trained.config)
    suffix = Path(config.dest).suffix
    storage, key = dest
    scale = measure(trained, config.scale_images)
    state = dict(trained.model.state_dict())
    codebook = {CODEBOOK: state.pop(CODEBOOK)} if CODEBOOK in state else {}
    named = compvis_vae.to_compvis(state) | codebook
    copies = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in named.items()}
    facts = {
        "version": pipeline.__version__,
        "n": trained.n,
        "weights": trained.weights,
        "autoencoder": to_dict(trained.config),
        "scale": scale.factor,
        "scale_images": scale.images,
    }
    with staging_folder(storage) as folder:
        staging = folder / f"autoencoder{suffix}"
        write(staging, suffix, copies, facts)
        if config.check:
            check(staging, suffix, copies)
        checked = hash_file(staging) if config.push else ""
        storage.put_file(key, staging)
    show(f"export: note: software that loads the file must be told ch_mult, z_channels and so on; {scale.words()}")
    if trained.config.norm_groups != NORM_GROUPS:
        show(
            f"export: note: CompVis' own code has {NORM_GROUPS} groups in every norm, and this autoencoder "
            f"{trained.config.norm_groups}: unless its Normalize is given {trained.config.norm_groups}, it loads the "
            "file without a word and reconstructs nonsense"
        )
    return checked


def require_layout(config: FirstStageConfig) -> None:
    """Raise ConfigError for an autoencoder that CompVis' code cannot build: it has attention in the middle, or none
    (attn_type: none)."""
    if config.attention and not config.middle_attention:
        raise ConfigError(
            f"format=compvis: autoencoder.attention={list(config.attention)} with autoencoder.middle_attention=false: "
            "CompVis' code has attention in the middle, or nowhere; export format=diffusers"
        )
