"""latentmill export: a checkpoint's weights in other software's format.

format=diffusers: a folder that diffusers loads (unet, vae, scheduler, text encoder and tokenizer, model_index.json).
format=compvis: the UNet as one safetensors file in CompVis' names.
What was written is loaded again and compared with our own denoiser.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

import pipeline
from pipeline.config import DiffusionConfig, ExportConfig
from pipeline.diffusion.interchange import pipeline_runs, scheduler_config
from pipeline.errors import ConfigError, DestinationExists, LatentmillError
from pipeline.evaluation.trained import Trained, load_trained
from pipeline.models import convert, convert_clip
from pipeline.models.compat import declare_torchvision_ops
from pipeline.models.conditioning import Denoiser
from pipeline.models.text import TextTower
from pipeline.storage import LocalStorage, Storage, open_storage, split_url

TOLERANCE = 1e-4  # relative, of the denoiser's output and of the text states
MARKER = "latentmill.json"  # in every exported folder; one that has it may be written over
CHECKED_CAPTIONS = ["a large red circle left of a small blue square", ""]

README = """Exported by latentmill {version} from {weights} weights at {n:,} samples seen.

unet, vae and scheduler are in diffusers' format{text}.
"""
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
NO_PIPELINE = """export: note: StableDiffusionPipeline cannot run prediction=flow, since its scheduler
has no init_noise_sigma: no model_index.json was written, and README.md of the folder shows how to sample"""


class ExportDiffers(LatentmillError):
    """What was written does not compute what the checkpoint does."""


def main(config: ExportConfig) -> int:
    """The verb. Raises ExportDiffers when the check fails; the destination is then as it was."""
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format}: choose one of {', '.join(FORMATS)}")
    trained = load_trained(config.run, config.at, config.weights)
    empty = torch.zeros(trained.contract.text.length, trained.contract.text.width)  # not exported
    denoiser = trained.denoiser(empty)
    if learned := [name for name in trained.state if name.startswith("task.")]:
        raise ConfigError(
            f"task={trained.info.config.task.name} has weights of its own ({learned[0]}): no other software holds it"
        )
    FORMATS[config.format](config, trained, denoiser)
    print(f"export: {config.dest}: {config.weights} weights at {trained.n:,} samples, format {config.format}")
    return 0


# --------------------------------------------------------------------------------------------------------------------
# diffusers


def export_diffusers(config: ExportConfig, trained: Trained, denoiser: Denoiser) -> None:
    """Write the folder, whole or not at all."""
    dest = open_storage(config.dest)
    refuse_foreign(dest)
    first_stage, tower = trained.encoders(override=config.encoders)
    local = Path(config.dest).expanduser() if isinstance(dest, LocalStorage) else None
    if local is not None:
        local.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination, so that a rename completes it.
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=local.parent if local is not None else None))
    try:
        save_unet(folder / "unet", denoiser, trained)
        first_stage.model.save_pretrained(folder / "vae")
        scheduler = scheduler_config(trained.info.config.diffusion)
        runs = pipeline_runs(trained.info.config.diffusion)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        with_text = denoiser.unet.config.context_width > 0 and convert_clip.is_clip(tower)
        if with_text:
            convert_clip.save_text_model(tower, folder / "text_encoder")
            convert_clip.save_tokenizer(tower, folder / "tokenizer")
        if with_text and runs:
            _write_json(folder / "model_index.json", model_index(denoiser, scheduler["_class_name"]))
        facts = {"weights": config.weights, "n": trained.n, "version": pipeline.__version__}
        text = (WITH_TEXT if runs else WITH_TEXT_ALONE) if with_text else WITHOUT_TEXT
        readme = README.format(**facts, text=text) + ("" if runs else WITHOUT_PIPELINE)
        (folder / "README.md").write_text(readme)
        _write_json(folder / MARKER, facts | {"contract": trained.info.contract})
        if config.check:
            check_unet(folder / "unet", denoiser, trained)
            if with_text:
                check_text(folder, tower)
        _publish(folder, dest, local)
        if not runs:
            print(NO_PIPELINE)
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
    """What StableDiffusionPipeline.from_pretrained reads first. scheduler: name of diffusers' class."""
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
    """Load the UNet with diffusers and compare; returns the largest relative difference. Raises ExportDiffers."""
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
    return _compare("the denoiser's output", loaded(*arguments).sample, ours)


def check_text(folder: Path, tower: TextTower) -> float:
    """Load text encoder and tokenizer with transformers and compare the states of captions. Raises ExportDiffers."""
    difference = convert_clip.largest_difference(tower, folder / "text_encoder", folder / "tokenizer", CHECKED_CAPTIONS)
    return _judge("the text states", difference)


def refuse_foreign(dest: Storage) -> None:
    """Raise DestinationExists unless dest is empty or an earlier export."""
    if dest.list("") and not dest.exists(MARKER):
        raise DestinationExists(f"{dest.url} is not empty and no earlier export: choose another dest")


def _publish(folder: Path, dest: Storage, local: Path | None) -> None:
    """Move a finished folder to its destination: one rename on a disk; on S3 the marker goes up last."""
    folder.chmod(0o755)
    if local is not None:
        if local.exists():
            shutil.rmtree(local)  # an earlier export, or empty
        folder.rename(local)
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == MARKER):
        dest.put(path.relative_to(folder).as_posix(), path.read_bytes())


# --------------------------------------------------------------------------------------------------------------------
# CompVis


def export_compvis(config: ExportConfig, trained: Trained, denoiser: Denoiser) -> None:
    """Write the file, whole or not at all."""
    if not config.dest.endswith(".safetensors"):
        raise ConfigError(f"dest={config.dest}: format=compvis writes one .safetensors file")
    root, key = split_url(config.dest)
    unet = denoiser.unet
    state = {name: t.contiguous() for name, t in convert.to_compvis(unet.state_dict(), unet.config).items()}
    data = save_bytes(state, {"format": "pt"})
    if config.check:
        back = convert.from_compvis(load_bytes(data), unet.config)
        worst = max(float((back[name] - tensor).abs().max()) for name, tensor in unet.state_dict().items())
        _judge("weights read back", worst)
    open_storage(root).put(key, data)
    if note := compvis_note(trained.info.config.diffusion):
        print(note)


def compvis_note(config: DiffusionConfig) -> str:
    """What a file of weights alone does not say, when it is not what Stable Diffusion 1's says by itself; "" else."""
    assumed = DiffusionConfig()
    discrete = ["schedule", "beta_start", "beta_end", "timesteps", "zero_terminal_snr"]
    names = ["prediction", *{"flow": ["timesteps"], "edm": ["sigma_data"]}.get(config.prediction, discrete)]
    if all(getattr(config, name) == getattr(assumed, name) for name in names):
        return ""
    facts = ", ".join(f"{name}={getattr(config, name)}" for name in names)
    return f"export: note: the file holds weights alone; software that loads it must be told {facts}"


FORMATS: dict[str, Callable[[ExportConfig, Trained, Denoiser], None]] = {
    "diffusers": export_diffusers,
    "compvis": export_compvis,
}


# --------------------------------------------------------------------------------------------------------------------


def _compare(what: str, theirs: Tensor, ours: Tensor) -> float:
    return _judge(what, float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-30)))


def _judge(what: str, difference: float) -> float:
    """Say the largest relative difference; raise ExportDiffers when it is beyond TOLERANCE, or not a number."""
    print(f"check: {what} differ by {difference:.2g} at most (relative; {TOLERANCE:g} is allowed)")
    if not difference <= TOLERANCE:
        raise ExportDiffers(f"{what} differ by {difference:.2g} (relative); nothing was written to the destination")
    return difference


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["export", *sys.argv[1:]]))
