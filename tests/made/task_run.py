"""Makes a small run of any task, with one commit and encoders of its own, without a cache."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from made.cache import contract as make_contract
from made.commits import save_now
from made.first_stages import vq_folder
from pipeline.conditions.facts import Conditions
from pipeline.config import (
    DataConfig,
    DiffusionConfig,
    EncodersConfig,
    EvalConfig,
    ModelConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.config.loading.merge import to_dict
from pipeline.data.format.contract import Contract, TextFacts
from pipeline.data.format.manifest import Manifest, Statistics
from pipeline.data.format.members import arrays_of
from pipeline.distributed.world import World
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.autoencoder import load_autoencoder, load_network
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.models.tasks.choose import make_task
from pipeline.runs.directory import fixed_keys
from pipeline.runs.fragments import Fragment
from pipeline.storage.urls import open_storage
from pipeline.training.life import describe_run
from pipeline.training.saver import Stamp

Kind = Literal["kl", "vq", "pixels"]
SIDE = 16  # of the latents
MODEL = ModelConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=0, head_width=16, norm_groups=8)
N = 64
MANIFEST = "d" * 64


@dataclass(frozen=True)
class Made:
    """A run and what its contract names."""

    config: TrainConfig
    contract: Contract
    first_stage: FirstStage
    tower: TextTower | None


def autoencoder(folder: Path, channels: int, levels: int, shift: float = 0.0) -> EncodersConfig:
    """Writes a small autoencoder whose pictures differ from grey. levels: factors of two that it reduces by."""
    vae = folder / "own-vae"
    vae.mkdir()
    facts = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8] * levels + [16],
        "down_block_types": ["DownEncoderBlock2D"] * (levels + 1),
        "up_block_types": ["UpDecoderBlock2D"] * (levels + 1),
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "scaling_factor": 0.8,
        "shift_factor": shift or None,
    }
    (vae / "config.json").write_text(json.dumps(facts))
    stage = load_network(EncodersConfig(vae=str(vae), seed=5))
    state = dict(stage.model.state_dict())
    state["decoder.conv_out.weight"] = 4 * state["decoder.conv_out.weight"]
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, vae / "diffusion_pytorch_model.safetensors"
    )
    return EncodersConfig(name="own", vae=str(vae))


def quantised(folder: Path, channels: int, levels: int) -> EncodersConfig:
    """Writes a small VQModel, as diffusers does."""
    vae = vq_folder(
        folder / "own-vae",
        block_out_channels=(8,) * levels + (16,),
        down_block_types=("DownEncoderBlock2D",) * (levels + 1),
        up_block_types=("UpDecoderBlock2D",) * (levels + 1),
        latent_channels=channels,
        scaling_factor=0.8,
    )
    return EncodersConfig(name="own", vae=str(vae))


def first_stage_of(kind: Kind, folder: Path, channels: int, levels: int, shift: float) -> EncodersConfig:
    """Writes the first stage, where there is one."""
    if kind == "pixels":
        return EncodersConfig(name="own", vae="pixels")
    return autoencoder(folder, channels, levels, shift) if kind == "kl" else quantised(folder, channels, levels)


def make_task_run(
    folder: Path,
    task: TaskConfig,
    conditions: Conditions,
    *,
    channels: int = 4,
    levels: int = 2,
    shift: float = 0.0,
    text: bool = False,
    storage: Any = "full",
    model: ModelConfig = MODEL,
    name: str = "run",
    diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008  (frozen)
    kind: Kind = "kl",
) -> Made:
    """Writes folder/NAME. levels: of the autoencoder, which reduces by 2 ** levels. text: whether it has captions.
    kind: of its first stage."""
    (folder / name).mkdir(parents=True)
    encoders = first_stage_of(kind, folder / name, channels, levels, shift)
    stage = load_autoencoder(encoders)
    tower = load_text(encoders) if text else None
    facts = None
    if tower is not None:
        vocabulary = len(tower.tokenizer.vocabulary)
        named = {"layer": tower.layer, "length": tower.length, "width": tower.width, "pad": tower.pad, "eot": tower.eot}
        more = {"start": tower.tokenizer.sot, "vocabulary": vocabulary, "quick_gelu": tower.quick_gelu}
        facts = TextFacts(storage=storage, **named, **more)  # type: ignore[arg-type]
    side = SIDE * stage.downsampling
    contract = make_contract(
        encoders=to_dict(encoders),
        vae_sha256=stage.weights_sha256,
        text_sha256=tower.weights_sha256 if tower is not None else "",
        resolution=side,
        buckets=((side, side),),
        latent_shape=(channels, SIDE, SIDE),
        downsampling=stage.downsampling,
        scale=stage.scale,
        shift=stage.shift,
        stored=stage.stored,
        conditions=conditions,
        text=facts,
        caption_key="txt" if text else "",
    )
    contract = replace(contract, members=arrays_of(contract))
    width = (128 if task.takes_text else model.context_width) if task.makes_context else 0
    model = replace(
        model,
        in_channels=channels,
        out_channels=channels,
        context_width=width,
        vector_width=12 if task.makes_vector else 0,
    )
    config = TrainConfig(
        run=str(folder / name / "run"),
        data=DataConfig(train=str(folder / "cache")),
        model=model,
        task=task,
        diffusion=diffusion,
        eval=EvalConfig(),
        tracking=TrackingConfig(wandb="off"),
        samples=N,
    )
    empty = torch.zeros(facts.length, facts.width) if facts is not None else None
    state = seeded(Denoiser(model, make_task(task, model, contract, empty))).state_dict()
    run = open_storage(config.run)
    statistics = Statistics(mean=(0.0,) * channels, std=(1.0,) * channels)
    manifest = Manifest(
        contract=contract, units=(), shards=(), uncond_sha256="", statistics=statistics, sources=("none",)
    )
    describe_run(config, run, manifest, {"train": MANIFEST})
    kinds = {
        kind: [Fragment(key, 0, tensor.reshape(-1)) for key, tensor in state.items()] for kind in ("ema", "weights")
    }
    shapes = {key: tensor.shape for key, tensor in state.items()}
    save_now(run, World(), kinds, n=N, steps=1, stamp=Stamp("torch", fixed_keys(config), {"train": MANIFEST}, shapes))
    return Made(config, contract, stage, tower)


def seeded(denoiser: Denoiser) -> Denoiser:
    """Weights of which none is zero."""
    denoiser.reset_parameters(0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return denoiser


def noise(made: Made, images: int = 2) -> Tensor:
    """Standard normals (B, C, h, w)."""
    return torch.randn(images, *made.contract.latent_shape, generator=torch.Generator().manual_seed(9))
