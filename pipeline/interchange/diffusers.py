"""`latentmill export format=diffusers`: a folder that diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline
from pipeline.config import ExportConfig
from pipeline.errors import ConfigError
from pipeline.inference.trained import Trained
from pipeline.interchange import clip
from pipeline.interchange import unet as convert
from pipeline.interchange.agreement import ExportDiffers as ExportDiffers
from pipeline.interchange.agreement import compare, judge
from pipeline.interchange.class_table import class_table, with_class_table
from pipeline.interchange.compvis import compvis_note as compvis_note
from pipeline.interchange.folded import folded
from pipeline.interchange.folder import MARKER, README, WEIGHTS, Destination
from pipeline.interchange.hub.card import BEGINS, card
from pipeline.interchange.scheduler import pipeline_runs, scheduler_config
from pipeline.interchange.tasks.base import TASK_FACTS, Plan, export_of
from pipeline.interchange.tasks.loops import with_autoencoder
from pipeline.log import show
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.encoders.text import TextTower
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.weights import save_tensors
from pipeline.storage.staging import staging_folder, writing
from pipeline.storage.urls import open_storage, without_folders

CHECKED_CAPTIONS = ["a large red circle left of a small blue square", ""]


NO_PIPELINE = """export: note: StableDiffusionPipeline cannot run prediction=flow, since its scheduler
has no init_noise_sigma: no model_index.json was written, and README.md of the folder shows how to sample"""


def look_diffusers(config: ExportConfig) -> Destination:
    """The destination, with what of an earlier export lies there. Raises DestinationExists."""
    return Destination(open_storage(config.dest))


def export_diffusers(config: ExportConfig, trained: Trained, denoiser: Denoiser, dest: Destination) -> None:
    """Write the folder: every file of it is whole before the first is published. Raises ConfigError for what diffusers
    cannot hold, before anything is written."""
    diffusion, unet = trained.info.config.diffusion, denoiser.unet.config
    convert.diffusers_config(unet, classes=1 if unet.vector_width and not unet.vector_time_ids else 0)
    scheduler = scheduler_config(diffusion, config.sampler)
    first_stage, tower = trained.encoders(override=config.encoders)
    if not isinstance(first_stage, NetworkStage):
        raise ConfigError(
            "the run draws pixels, without an autoencoder (stored=pixels), and a folder of diffusers holds one: sample "
            "it with `latentmill sample`, or export format=compvis, which holds the UNet alone"
        )
    plan = export_of(trained, denoiser).plan(scheduler, first_stage, tower)
    with staging_folder(dest.storage) as folder:
        save_unet(folder / "unet", denoiser, trained, plan.vectors)
        save_vae(folder / plan.vae, first_stage, plan)
        for part, facts in {"scheduler": scheduler, **plan.schedulers}.items():
            _write_json(folder / part / "scheduler_config.json", facts)
        if tower is not None and plan.text_encoder:
            clip.save_text_model(tower, folder / "text_encoder")
        if tower is not None and (plan.text_encoder or plan.tokenizer):
            clip.save_tokenizer(tower, folder / "tokenizer")
        if plan.pipeline:
            index = model_index(denoiser, scheduler["_class_name"], plan, first_stage.architecture)
            _write_json(folder / "model_index.json", index)
        for name, tensors in plan.tensors.items():
            save_tensors(dict(tensors), folder / name)
        if plan.facts:
            _write_json(folder / TASK_FACTS, plan.facts)
        with writing(folder / README):
            text = plan.readme(pipeline.__version__, trained.weights, trained.n)
            text = with_autoencoder(text, first_stage.architecture)
            if config.push:
                text = card(config, trained, f"{text}\n{BEGINS}")
            (folder / README).write_text(text, encoding="utf-8")
        marker = {"weights": trained.weights, "n": trained.n, "version": pipeline.__version__}
        _write_json(folder / MARKER, marker | {"contract": trained.info.contract})
        if config.check:
            check_unet(folder / "unet", denoiser, trained, plan.vectors)
            if tower is not None and plan.text_encoder:
                check_text(folder, tower)
        dest.publish(folder)
    if plan.why:
        show(
            f"export: note: no pipeline of diffusers runs it ({plan.why}): README.md of the folder has a loop that does"
        )
    elif not plan.pipeline and not pipeline_runs(diffusion):
        show(NO_PIPELINE)


def save_unet(folder: Path, denoiser: Denoiser, trained: Trained, vectors: Tensor | None = None) -> None:
    """The UNet as diffusers' UNet2DConditionModel, or UNet2DModel without context. vectors: as in Plan."""
    import diffusers

    config = denoiser.unet.config
    facts = {"_class_name": convert.diffusers_class(config), "_diffusers_version": diffusers.__version__}
    classes = 0 if vectors is None else len(vectors)
    sample_size = trained.contract.latent_shape[-1]
    _write_json(folder / "config.json", facts | convert.diffusers_config(config, sample_size, classes))
    state = {name: t.contiguous() for name, t in convert.to_diffusers(denoiser.unet.state_dict(), config).items()}
    if vectors is not None:
        state = with_class_table(state, class_table(denoiser.unet, vectors), "diffusers")
    save_tensors(state, folder / WEIGHTS)


def model_index(denoiser: Denoiser, scheduler: str, plan: Plan, autoencoder: str) -> dict[str, Any]:
    """model_index.json, which from_pretrained of the plan's pipeline reads first. scheduler, autoencoder: names of
    their classes."""
    import diffusers

    text = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    return {
        "_class_name": plan.pipeline,
        "_diffusers_version": diffusers.__version__,
        **plan.index,
        "scheduler": ["diffusers", scheduler],
        **(text if plan.text_encoder else {}),
        "unet": ["diffusers", convert.diffusers_class(denoiser.unet.config)],
        plan.vae: ["diffusers", autoencoder],
    }


@torch.no_grad()
def check_unet(folder: Path, denoiser: Denoiser, trained: Trained, vectors: Tensor | None = None) -> float:
    """Load the UNet with diffusers, compare its output and return the largest relative difference. vectors: as in
    Plan. Raises ExportDiffers."""
    declare_torchvision_ops()
    import diffusers

    config = denoiser.unet.config
    loaded = getattr(diffusers, convert.diffusers_class(config)).from_pretrained(folder, local_files_only=True).eval()
    generator = torch.Generator().manual_seed(0)
    height, width = trained.contract.latent_shape[1:]
    x_BCHW = torch.randn(3, config.in_channels, height, width, generator=generator)
    timestep_B = torch.tensor([0, 999, 421]) % trained.info.config.diffusion.timesteps
    context_BLD = vector_BV = None
    given: dict[str, Tensor] = {}
    if config.context_width:
        length = 3 if trained.contract.text is None else trained.contract.text.length
        context_BLD = torch.randn(3, length, config.context_width, generator=generator)
        given["encoder_hidden_states"] = context_BLD
    if vectors is not None:
        given["class_labels"] = torch.tensor([0, len(vectors) - 1, len(vectors) // 2])
        vector_BV = vectors[given["class_labels"]]
    ours = denoiser.unet(x_BCHW, timestep_B, context_BLD, None, vector_BV)
    return compare("the denoiser's output", loaded(x_BCHW, timestep_B, **given).sample, ours)


def check_text(folder: Path, tower: TextTower) -> float:
    """Load text encoder and tokenizer with transformers and compare the states of captions. Raises ExportDiffers."""
    difference = clip.largest_difference(tower, folder / "text_encoder", folder / "tokenizer", CHECKED_CAPTIONS)
    return judge("the text states", difference)


def save_vae(folder: Path, first_stage: NetworkStage, plan: Plan) -> None:
    """The autoencoder as diffusers' AutoencoderKL or VQModel, with the latents that the plan wants."""
    exact = first_stage.float32()
    assert isinstance(exact, NetworkStage)
    model = exact.model
    with writing(folder):
        model.save_config(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if plan.scale is not None or plan.mean_only:
        config, state = folded(first_stage, plan.scale, mean_only=plan.mean_only)
        stored = {name: config.get(name, value) for name, value in stored.items()}
    if "_name_or_path" in stored:  # where it was loaded from
        stored["_name_or_path"] = without_folders(str(stored["_name_or_path"]))
    _write_json(folder / "config.json", stored)
    save_tensors(state, folder / WEIGHTS)


def _write_json(path: Path, value: Any) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
