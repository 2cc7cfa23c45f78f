"""`latentmill export format=diffusers`: a folder that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline.config import ExportConfig
from pipeline.inference.trained import Trained
from pipeline.interchange import clip
from pipeline.interchange import unet as convert
from pipeline.interchange.agreement import ExportDiffers as ExportDiffers
from pipeline.interchange.agreement import compare, judge
from pipeline.interchange.compvis import compvis_note as compvis_note
from pipeline.interchange.folder import MARKER, README, WEIGHTS, Destination
from pipeline.interchange.readme import WITH_TEXT, WITH_TEXT_ALONE, WITHOUT_INDEX, WITHOUT_TEXT, readme
from pipeline.interchange.scheduler import pipeline_runs, scheduler_config
from pipeline.log import log, show
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.autoencoder import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.weights import save_tensors
from pipeline.storage.staging import staging_folder, writing
from pipeline.storage.urls import open_storage

CHECKED_CAPTIONS = ["a large red circle left of a small blue square", ""]


NO_PIPELINE = """export: note: StableDiffusionPipeline cannot run prediction=flow, since its scheduler
has no init_noise_sigma: no model_index.json was written, and README.md of the folder shows how to sample"""

TRIMMED = (
    "the run attends to a caption's own tokens alone (text_storage=trimmed), and StableDiffusionPipeline to padding "
    "too, so its pictures differ: give the UNet an encoder_attention_mask"
)


def look_diffusers(config: ExportConfig) -> Destination:
    """The destination, with what of an earlier export lies there. Raises DestinationExists."""
    return Destination(open_storage(config.dest))


def export_diffusers(config: ExportConfig, trained: Trained, denoiser: Denoiser, dest: Destination) -> None:
    """Write the folder: every file of it is whole before the first is published."""
    with staging_folder(dest.storage) as folder:
        first_stage, tower = trained.encoders(override=config.encoders)
        save_unet(folder / "unet", denoiser, trained)
        save_vae(folder / "vae", first_stage)
        scheduler = scheduler_config(trained.info.config.diffusion, config.sampler)
        pipeline_can_run = pipeline_runs(trained.info.config.diffusion)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        with_text = denoiser.unet.config.context_width > 0 and clip.is_clip(tower)
        note = WITHOUT_TEXT
        if with_text:
            clip.save_text_model(tower, folder / "text_encoder")
            clip.save_tokenizer(tower, folder / "tokenizer")
            note = WITH_TEXT if pipeline_can_run else WITH_TEXT_ALONE
            note = WITHOUT_INDEX if first_stage.shift else note
        if with_text and pipeline_can_run and not first_stage.shift:
            _write_json(folder / "model_index.json", model_index(denoiser, scheduler["_class_name"]))
        trimmed = with_text and trained.contract.trimmed
        if trimmed:
            log.warning(TRIMMED)
        loop = "" if pipeline_can_run else scheduler["_class_name"]
        text = readme(pipeline.__version__, trained.weights, trained.n, note, trimmed=trimmed, loop=loop)
        with writing(folder / README):
            (folder / README).write_text(text, encoding="utf-8")
        facts = {"weights": trained.weights, "n": trained.n, "version": pipeline.__version__}
        _write_json(folder / MARKER, facts | {"contract": trained.info.contract})
        if config.check:
            check_unet(folder / "unet", denoiser, trained)
            if with_text:
                check_text(folder, tower)
        dest.publish(folder)
    if not pipeline_can_run:
        show(NO_PIPELINE)


def save_unet(folder: Path, denoiser: Denoiser, trained: Trained) -> None:
    """The UNet as diffusers' UNet2DConditionModel, or UNet2DModel without context."""
    import diffusers

    config = denoiser.unet.config
    facts = {"_class_name": convert.diffusers_class(config), "_diffusers_version": diffusers.__version__}
    _write_json(folder / "config.json", facts | convert.diffusers_config(config, trained.contract.latent_shape[-1]))
    state = {name: t.contiguous() for name, t in convert.to_diffusers(denoiser.unet.state_dict(), config).items()}
    save_tensors(state, folder / WEIGHTS)


def model_index(denoiser: Denoiser, scheduler: str) -> dict[str, Any]:
    """model_index.json, which StableDiffusionPipeline.from_pretrained reads first. scheduler: name of its class."""
    import diffusers

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", convert.diffusers_class(denoiser.unet.config)],
        "vae": ["diffusers", "AutoencoderKL"],
    }


@torch.no_grad()
def check_unet(folder: Path, denoiser: Denoiser, trained: Trained) -> float:
    """Load the UNet with diffusers, compare its output and return the largest relative difference. Raises
    ExportDiffers."""
    declare_torchvision_ops()
    import diffusers

    config = denoiser.unet.config
    loaded = getattr(diffusers, convert.diffusers_class(config)).from_pretrained(folder, local_files_only=True).eval()
    generator = torch.Generator().manual_seed(0)
    height, width = trained.contract.latent_shape[1:]
    x_BCHW = torch.randn(3, config.in_channels, height, width, generator=generator)
    timestep_B = torch.tensor([0, 999, 421]) % trained.info.config.diffusion.timesteps
    context_BLD = None
    if config.context_width:
        context_BLD = torch.randn(3, trained.contract.text.length, config.context_width, generator=generator)
    ours = denoiser.unet(x_BCHW, timestep_B, context_BLD)
    arguments = (x_BCHW, timestep_B) if context_BLD is None else (x_BCHW, timestep_B, context_BLD)
    return compare("the denoiser's output", loaded(*arguments).sample, ours)


def check_text(folder: Path, tower: TextTower) -> float:
    """Load text encoder and tokenizer with transformers and compare the states of captions. Raises ExportDiffers."""
    difference = clip.largest_difference(tower, folder / "text_encoder", folder / "tokenizer", CHECKED_CAPTIONS)
    return judge("the text states", difference)


def save_vae(folder: Path, first_stage: FirstStage) -> None:
    """The autoencoder as diffusers' AutoencoderKL."""
    model = first_stage.float32().model
    with writing(folder):
        model.save_config(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(state, folder / WEIGHTS)


def _write_json(path: Path, value: Any) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
