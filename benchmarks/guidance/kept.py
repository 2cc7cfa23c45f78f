"""How near a kept region of pictures is to the given ones before it is pasted, measured in several ways.

    .venv/bin/python -m benchmarks.guidance.kept run=RUN val=CACHE mask=half images=64 dest=FILE

`latentmill eval keep=true` measures the same for the records' own masks, of all that is kept. Here the mask may be the
right half of each picture, and two ways to keep may be tried that cost more, and both together: again=N, which
begins N times more from the model's own result with fresh noise (as RePaint repeats its steps, by jumps of `strength`),
and guide=W, which leads the kept pixels, as they are decoded, to those of the picture. Neither sees what is hidden.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoding.presets import changed
from pipeline import eval as eval_verb
from pipeline.config import DataConfig, EvalRunConfig, GuideConfig
from pipeline.config.model import SamplerName
from pipeline.diffusion.hooks import Keep, Start, Steer
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.figures import standard_error
from pipeline.evaluation.metrics.error_bars import half_sample_error
from pipeline.evaluation.metrics.restoration import psnr, squared_error
from pipeline.evaluation.records import Records
from pipeline.evaluation.tasks.inpaint import holes_of
from pipeline.inference.pictures import conditionings, frozen, to_uint8
from pipeline.inference.steering.guide import make_guides
from pipeline.inference.steering.image import Target
from pipeline.inference.steering.images import made_anew
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.log import show
from pipeline.models.denoiser import Denoiser

FRESH = 1000
"""Added to the seed for the noise of each beginning after the first."""
FEWEST = 8
"""Pictures from which a pooled figure has an error bar."""
MASKS = ("half", "records")


@dataclass(frozen=True)
class Settings:
    """What to measure. val: a cache with pixels and masks. mask: half (the right half is made anew) or records (the
    records' own masks). again, strength: walks from the result of the one before, and their strength. guide: weight."""

    run: str = ""
    val: str = ""
    mask: str = "half"
    images: int = 64
    sampler: SamplerName = "dpmpp_2m"
    steps: int = 20
    again: int = 0
    strength: float = 0.5
    guide: float = 0.0
    batch: int = 64
    seed: int = 0
    dest: str = ""


@dataclass(frozen=True)
class Pictures:
    """drawn, before pasting; own: the records' through the autoencoder; given: the records'. (N, H, W, 3) uint8. holes:
    (N, H, W) bool. downsampling: pixels of a latent position along a side."""

    drawn: np.ndarray
    own: np.ndarray
    given: np.ndarray
    holes: np.ndarray
    downsampling: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded("benchmarks.guidance.kept", lambda: run(changed(Settings(), words)))


def run(settings: Settings) -> int:
    """Measure, print and store. Raises ConfigError."""
    if not (settings.run and settings.val) or settings.mask not in MASKS:
        raise ConfigError(f"run=, val= and mask={' or '.join(MASKS)} are wanted")
    torch.set_num_threads(cores())
    keep_memory()
    began = time.monotonic()
    figures = measured(drawn(settings)) | {"seed": settings.seed, "seconds": round(time.monotonic() - began, 2)}
    text = json.dumps(figures, indent=1)
    show(text)
    if settings.dest:
        path = Path(settings.dest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return 0


def measured(pictures: Pictures) -> dict[str, Any]:
    """kept: PSNR of all kept pixels, pooled over pictures. positions: of those of kept latent positions. away: of those
    of positions whose neighbours are all kept. mean: mean over pictures of the PSNR of their kept pixels. In dB, with
    NAME_error and NAME_reconstruction, the same of the autoencoder; None where nothing is kept. hidden: share of
    pixels."""
    figures: dict[str, Any] = {"images": len(pictures.drawn), "hidden": float(pictures.holes.mean())}
    regions = dict(zip(("kept", "positions", "away"), rings(pictures.holes, pictures.downsampling), strict=True))
    for name, where in regions.items():
        errors = _errors(pictures.drawn, pictures.given, where)
        figures[name] = _pooled(errors)
        figures[f"{name}_reconstruction"] = _pooled(_errors(pictures.own, pictures.given, where))
        if len(errors) >= FEWEST and figures[name] is not None:
            figures[f"{name}_error"] = _error(errors)
    values = _each(pictures.drawn, pictures.given, regions["kept"])
    own = _each(pictures.own, pictures.given, regions["kept"])
    return figures | {
        "mean": sum(values) / len(values),
        "mean_error": standard_error(values),
        "mean_reconstruction": sum(own) / len(own),
    }


def rings(holes: np.ndarray, downsampling: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of holes (N, H, W) bool: the kept pixels; those of latent positions without a hidden pixel; those of such
    positions all of whose eight neighbours are such. (N, H, W) bool each."""
    count, height, width = holes.shape
    rows, columns = height // downsampling, width // downsampling
    new = holes.reshape(count, rows, downsampling, columns, downsampling).any(axis=(2, 4))
    padded = np.pad(new, ((0, 0), (1, 1), (1, 1)))
    near = np.zeros_like(new)
    for down in range(3):
        for right in range(3):
            near |= padded[:, down : down + rows, right : right + columns]
    positions, away = (~cell.repeat(downsampling, 1).repeat(downsampling, 2) for cell in (new, near))
    return ~holes, positions, away


def drawn(settings: Settings) -> Pictures:
    """Draw the pictures as `latentmill eval keep=true` does, up to what `settings` adds."""
    config = EvalRunConfig(
        run=settings.run,
        data=DataConfig(val=settings.val),
        images=settings.images,
        guidance=(1.0,),
        sampler=(settings.sampler,),
        steps=(settings.steps,),
        seed=settings.seed,
        keep=True,
        guide=GuideConfig(image=settings.guide),  # so that weights are not packed
    )
    _, evaluator, denoiser, _ = eval_verb.prepare(config, measured=False)
    records, contract = Records(evaluator.validation, evaluator.first_stage), evaluator.validation.contract
    parts: list[tuple[np.ndarray, ...]] = []
    for first in range(0, settings.images, settings.batch):
        numbers = list(range(first, min(first + settings.batch, settings.images)))
        asked = evaluator.judging.given(numbers, settings.images)
        given = evaluator.steering.given(numbers, asked, settings.images)[0]  # of what is kept
        holes = holes_of(given, contract)
        if settings.mask == "half":
            holes = np.zeros_like(holes)
            holes[..., holes.shape[-1] // 2 :] = True
        steer: tuple[Steer, ...] = ()
        if settings.guide:
            guide = make_guides(config.guide, evaluator.first_stage, None, None, settings.seed, evaluator.world.device)
            pairs = zip(given.pictures, holes, strict=True)
            targets = [Target(picture, 1, (~hole).astype(np.uint8)) for picture, hole in pairs]
            steer = guide["image"].hooks(numbers, targets).steer
        new = made_anew(torch.from_numpy(holes[:, None].astype(np.uint8)), contract.downsampling)
        keep = Keep(records.latents(numbers), new.to(evaluator.world.device))
        latents = walked(settings, config, evaluator, denoiser, numbers, keep, steer)
        parts.append((to_uint8(evaluator.first_stage.decode(latents)), records.decoded(numbers), given.pictures, holes))
    made, own, truth, hidden = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Pictures(made, own, truth, hidden, contract.downsampling)


def walked(
    settings: Settings,
    config: EvalRunConfig,
    evaluator: Evaluator,
    denoiser: Denoiser | TiledDenoiser,
    numbers: list[int],
    keep: Keep,
    steer: tuple[Steer, ...],
) -> Tensor:
    """The latents of one batch, after the walk from noise and those from its result."""
    device = evaluator.world.device
    batch = denoiser.task.prepare(
        evaluator.judging.batch(numbers, settings.images, device),
        settings.seed,
        torch.tensor(numbers, device=device),
        training=False,
    )
    conditioning, _ = conditionings(denoiser, batch, eval_verb.settings(config)[0])
    latents: Tensor | None = None
    for walk in range(settings.again + 1):
        shape = evaluator.validation.contract.latent_shape
        noise = initial_noise(settings.seed + FRESH * walk, torch.tensor(numbers), shape, device)
        with frozen(denoiser):
            latents = sample(
                denoiser,
                evaluator.diffusion,
                noise,
                conditioning,
                sampler=settings.sampler,
                steps=settings.steps,
                start=None if latents is None else Start(latents, settings.strength),
                keep=keep,
                steer=steer,
            )
    assert latents is not None
    return latents


def _errors(pictures: np.ndarray, truth: np.ndarray, where: np.ndarray) -> np.ndarray:
    """(N, 2): squared error and number of values of each picture."""
    pairs = zip(pictures, truth, where, strict=True)
    return np.array([squared_error(picture, own, region) for picture, own, region in pairs], dtype=np.float64)


def _pooled(errors: np.ndarray) -> float | None:
    return psnr(float(errors[:, 0].sum()), int(errors[:, 1].sum()))


def _error(errors: np.ndarray) -> float:
    """Standard error of the pooled figure, as evaluations have it."""
    return half_sample_error(len(errors), lambda numbers: _pooled(errors[numbers.numpy()]) or float("nan"))


def _each(pictures: np.ndarray, truth: np.ndarray, where: np.ndarray) -> list[float]:
    """PSNR of each picture of which something is kept."""
    each = [psnr(error, int(count)) for error, count in _errors(pictures, truth, where)]
    return [value for value in each if value is not None]


if __name__ == "__main__":
    raise SystemExit(main())
