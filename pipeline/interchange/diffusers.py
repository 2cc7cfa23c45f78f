"""`latentmill export format=diffusers`: a folder that diffusers loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pipeline
from pipeline.config import ExportConfig
from pipeline.errors import DestinationExists
from pipeline.inference.trained import Trained
from pipeline.interchange import clip
from pipeline.interchange import unet as convert
from pipeline.interchange.agreement import ExportDiffers as ExportDiffers
from pipeline.interchange.agreement import compare, judge
from pipeline.interchange.compvis import compvis_note as compvis_note
from pipeline.interchange.scheduler import pipeline_runs, scheduler_config
from pipeline.log import log, show
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.text import TextTower
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage

MARKER = "latentmill.json"  # in every exported folder; a folder that has it may be overwritten


CHECKED_CAPTIONS = ["a large red circle left of a small blue square", ""]


README = """Exported by latentmill {version} from {weights} weights at {n:,} samples seen.

unet, vae and scheduler are in diffusers' format{text}.
"""


WITHOUT_INDEX = """, text_encoder and tokenizer in transformers'. There is no
model_index.json: the run's latents are shifted, which StableDiffusionPipeline does not undo"""


WITH_TEXT = """, text_encoder and tokenizer in transformers': load all of it with
StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)"""


WITHOUT_TEXT = """. There is no text encoder, since transformers' CLIPTextModel cannot
hold this run's: encode captions as run.json of the run says, and give them as prompt_embeds"""


WITH_TEXT_ALONE = ", text_encoder and tokenizer in transformers'"


WITHOUT_PIPELINE = """
StableDiffusionPipeline cannot run this model, so there is no model_index.json: the model predicts rectified flow, and
that pipeline does not take its scheduler. This samples it, from noise and the states of captions and of the empty one:

```python
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
x = noise
scheduler.set_timesteps(steps)
with torch.no_grad():
    for t in scheduler.timesteps:
        conditional, null = unet(torch.cat([x, x]), t, torch.cat([text, empty])).sample.chunk(2)
        x = scheduler.step(null + guidance * (conditional - null), t, x).prev_sample
    images = vae.decode(x / vae.config.scaling_factor).sample
```
"""


EULER = "FlowMatchEulerDiscreteScheduler"  # in that example; replaced by the exported scheduler, whose loop is the same


NO_PIPELINE = """export: note: StableDiffusionPipeline cannot run prediction=flow, since its scheduler
has no init_noise_sigma: no model_index.json was written, and README.md of the folder shows how to sample"""


TRIMMED = (
    "the run attends to a caption's own tokens alone (text_storage=trimmed), and StableDiffusionPipeline to padding "
    "too, so its pictures differ: give the UNet an encoder_attention_mask"
)


TRIMMED_WORDS = """

The UNet was trained to attend to a caption's own tokens alone: give it an
encoder_attention_mask, which StableDiffusionPipeline does not"""


def export_diffusers(config: ExportConfig, trained: Trained, denoiser: Denoiser) -> None:
    """Write the folder, whole or not at all."""
    dest = open_storage(config.dest)
    refuse_foreign(dest)
    first_stage, tower = trained.encoders(override=config.encoders)
    local_dest = Path(config.dest).expanduser() if isinstance(dest, LocalStorage) else None
    if local_dest is not None:
        local_dest.parent.mkdir(parents=True, exist_ok=True)
    # Next to its destination, so that one rename completes it.
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=local_dest.parent if local_dest is not None else None))
    try:
        save_unet(folder / "unet", denoiser, trained)
        first_stage.float32().model.save_pretrained(folder / "vae")
        scheduler = scheduler_config(trained.info.config.diffusion, config.sampler)
        pipeline_can_run = pipeline_runs(trained.info.config.diffusion)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        with_text = denoiser.unet.config.context_width > 0 and clip.is_clip(tower)
        text_note = WITHOUT_TEXT
        if with_text:
            clip.save_text_model(tower, folder / "text_encoder")
            clip.save_tokenizer(tower, folder / "tokenizer")
            text_note = WITH_TEXT if pipeline_can_run else WITH_TEXT_ALONE
            text_note = WITHOUT_INDEX if first_stage.shift else text_note
        if with_text and pipeline_can_run and not first_stage.shift:
            _write_json(folder / "model_index.json", model_index(denoiser, scheduler["_class_name"]))
        if with_text and trained.contract.trimmed:
            log.warning(TRIMMED)
            text_note += TRIMMED_WORDS
        facts = {"weights": trained.weights, "n": trained.n, "version": pipeline.__version__}
        readme = README.format(**facts, text=text_note) + (
            "" if pipeline_can_run else WITHOUT_PIPELINE.replace(EULER, scheduler["_class_name"])
        )
        (folder / "README.md").write_text(readme)
        _write_json(folder / MARKER, facts | {"contract": trained.info.contract})
        if config.check:
            check_unet(folder / "unet", denoiser, trained)
            if with_text:
                check_text(folder, tower)
        _publish(folder, dest, local_dest)
        if not pipeline_can_run:
            show(NO_PIPELINE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_unet(folder: Path, denoiser: Denoiser, trained: Trained) -> None:
    """The UNet as diffusers' UNet2DConditionModel, or UNet2DModel without context."""
    import diffusers

    folder.mkdir(parents=True)
    config = denoiser.unet.config
    facts = {"_class_name": convert.diffusers_class(config), "_diffusers_version": diffusers.__version__}
    _write_json(folder / "config.json", facts | convert.diffusers_config(config, trained.contract.latent_shape[-1]))
    state = {name: t.contiguous() for name, t in convert.to_diffusers(denoiser.unet.state_dict(), config).items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


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


def refuse_foreign(dest: Storage) -> None:
    """Raise DestinationExists unless dest is empty or an earlier export."""
    if dest.list("") and not dest.exists(MARKER):
        raise DestinationExists(f"{dest.url} is not empty and no earlier export: choose another dest")


def _publish(folder: Path, dest: Storage, local: Path | None) -> None:
    """Move a finished folder to its destination: by one rename on a disk; on S3 the marker is uploaded last."""
    folder.chmod(0o755)
    if local is not None:
        if local.exists():
            shutil.rmtree(local)  # an earlier export, or empty
        folder.rename(local)
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == MARKER):
        dest.put(path.relative_to(folder).as_posix(), path.read_bytes())


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
