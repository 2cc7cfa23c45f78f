"""Draws a run's pictures for label maps that training never saw, alone and side by side in larger pictures, and judges
them map by map.

    .venv/bin/python -m benchmarks.latent_scale.measure run=RUN val=CACHE at=8000,16000 dest=FOLDER

A larger picture is denoised and decoded as a whole. FOLDER/figures.json has the figures, pictures.npz some pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.encoding.presets import changed
from benchmarks.latent_scale.judged import (
    Arrangement,
    Rows,
    decided,
    figures,
    greys,
    mosaics,
    repeated,
    rows_of,
    spread,
)
from pipeline.distributed.exits import guarded
from pipeline.errors import ConfigError
from pipeline.log import show

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.diffusion.conditioning import Conditioning
    from pipeline.inference.trained import Trained
    from pipeline.models.denoiser import Denoiser
    from pipeline.models.encoders.first_stage import FirstStage

TOGETHER = 64
"""Maps that are drawn in a batch, at least one picture."""
KEPT = {1: 8, 2: 4}
"""Pictures that are kept, by side; of larger ones 1."""
FIGURES, PICTURES = "figures.json", "pictures.npz"
MEMBER = "cond.labels"


@dataclass(frozen=True)
class Settings:
    """What to draw. at: samples of the checkpoints, with commas. maps: label maps, of which each size draws all.
    sides, large: pictures of so many maps along a side, at each checkpoint and at the last. repeated: maps that are
    drawn four times side by side, at the last. walk: maps whose pictures are looked at after each step, at the last."""

    run: str = ""
    val: str = ""
    at: str = "0"
    maps: int = 256
    sides: str = "1,2"
    large: str = ""
    repeated: int = 32
    walk: int = 64
    sampler: str = "unipc"
    steps: int = 12
    seed: int = 0
    dest: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, judge and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded("benchmarks.latent_scale.measure", lambda: run(changed(Settings(), words)))


def run(settings: Settings) -> int:
    """Draw, judge and store."""
    if not (settings.run and settings.val and settings.dest):
        raise ConfigError("run=, val= and dest= are missing: a run of task=semantic, a cache of label maps, a folder")
    sides, large = numbers(settings.sides), numbers(settings.large)
    if 1 not in sides or any(settings.maps % side**2 for side in (*sides, *large)):
        raise ConfigError(
            f"sides={settings.sides} large={settings.large} maps={settings.maps}: sides begin with 1, and the number "
            "of maps is a multiple of the square of each"
        )
    if settings.walk and settings.sampler == "heun":
        raise ConfigError("sampler=heun predicts twice a step, and steps are looked at: give walk=0 or another sampler")
    from pipeline.distributed.allocator import keep_memory

    keep_memory()
    labels = label_maps(settings)
    checkpoints, pictures = numbers(settings.at), dict[str, np.ndarray]()
    found: dict[str, Any] = {"sampler": settings.sampler, "steps": settings.steps, "maps": len(labels), "at": {}}
    for n in checkpoints:
        drawing, last = Drawing.load(settings, n), n == checkpoints[-1]
        arrangements = [mosaics(len(labels), side) for side in (*sides, *(large if last else ()))]
        arrangements += [repeated(settings.repeated)] if last and settings.repeated else []
        found["at"][str(drawing.n)] = sizes(drawing, labels, arrangements, pictures if last else None)
        if last and settings.walk:
            found["walk"], pictures["walk"] = walk(drawing, labels[: settings.walk])
    dest = Path(settings.dest)
    dest.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(dest / PICTURES, **pictures)  # type: ignore[arg-type]
    (dest / FIGURES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")  # last: it says that all is there
    return 0


def sizes(
    drawing: Drawing,
    labels: np.ndarray,
    arrangements: Sequence[Arrangement],
    pictures: dict[str, np.ndarray] | None,
) -> dict[str, dict[str, float]]:
    """Figures by arrangement. pictures: takes some of those that were drawn and asked for."""
    figures_of: dict[str, dict[str, float]] = {}
    alone: Rows = []
    for one in arrangements:
        asked = one.labels(labels)
        drawn = drawing.draw(asked)
        rows = rows_of(drawn, asked, one.side)
        alone = alone or rows  # the first is of single maps
        figures_of[one.name] = figures(rows, alone, one.numbers) | {"background_spread": spread(drawn, asked)}
        if one.side == 1:
            figures_of[one.name]["background_apart"] = float(np.nanstd(greys(drawn, asked), ddof=1))
        if pictures is not None:
            kept = KEPT.get(one.side, 1)
            pictures |= {f"drawn-{one.name}": drawn[:kept], f"asked-{one.name}": asked[:kept]}
        words = ", ".join(f"{name} {value:.4g}" for name, value in figures_of[one.name].items())
        show(f"{drawing.n:,} samples, {one.name}: {words}")
    return figures_of


def walk(drawing: Drawing, labels: np.ndarray) -> tuple[dict[str, list[float]], np.ndarray]:
    """What the pictures tell that the model predicts before each step, and pictures of it (maps, steps + 1, ...). The
    last are those that were drawn."""
    from pipeline.evaluation.shapes.match import mean_iou

    levels, steps = drawing.steps(labels)
    backgrounds = np.stack([greys(pictures, labels) for pictures in steps])
    ious = [mean_iou([row for own in rows_of(pictures, labels, 1) for row in own]) for pictures in steps]
    found = {
        "timestep": [float(level.timestep) for level in levels],
        "log_snr": [2 * level.log_snr for level in levels[:-1]],
        "background_decided": decided(backgrounds),
        "label_iou": [0.0 if iou is None else iou for iou in ious],
    }
    return found, np.stack(steps)[:, : KEPT[1]].swapaxes(0, 1)


def label_maps(settings: Settings) -> np.ndarray:
    """The first label maps of the cache, (K, h, w) uint8. Raises ConfigError where there are fewer."""
    from pipeline.data.format.manifest import load_manifest
    from pipeline.data.reading.shards import first_records
    from pipeline.storage.urls import open_storage

    storage = open_storage(settings.val)
    records = first_records(storage, load_manifest(storage), settings.maps, [MEMBER])
    labels = [np.array(record.members[MEMBER]) for record in records]
    if len(labels) < settings.maps:
        raise ConfigError(f"val={settings.val} has {len(labels)} records, and maps={settings.maps}: lower maps")
    return np.stack(labels)


@dataclass(frozen=True)
class Drawing:
    """A checkpoint's model, which draws pictures of label maps of any size."""

    settings: Settings
    trained: Trained
    denoiser: Denoiser
    first_stage: FirstStage

    @classmethod
    def load(cls, settings: Settings, n: int) -> Drawing:
        from pipeline.inference.trained import load_trained

        trained = load_trained(settings.run, n)
        if "labels" not in trained.info.config.task.conditions:
            raise ConfigError(f"run={settings.run} is of task={trained.info.config.task.name}: semantic is wanted")
        first_stage, _ = trained.encoders(beside=(settings.val,))
        return cls(settings, trained, trained.denoiser(None, packed=True), first_stage)

    @property
    def n(self) -> int:
        return self.trained.n

    def draw(self, asked: np.ndarray) -> np.ndarray:
        """A picture (H, W, 3) uint8 for each label map (B, h, w). Picture i begins with the noise of (seed, i)."""
        import torch

        from pipeline.config import SamplerConfig
        from pipeline.inference.pictures import draw

        settings, drawn = self.settings, []
        sampler = SamplerConfig(sampler=settings.sampler, steps=settings.steps, guidance=1.0)  # type: ignore[arg-type]
        batch = max(1, TOGETHER * self.cells // asked[0].size)
        for start in range(0, len(asked), batch):
            these = list(range(start, min(start + batch, len(asked))))
            conditioning, shape = self.conditioning(asked[these], these)
            pictures, _ = draw(
                self.denoiser,
                self.first_stage,
                self.trained.info.config.diffusion,
                sampler,
                conditioning,
                these,
                settings.seed,
                shape,
                torch.device("cpu"),
            )
            drawn.append(pictures)
        return np.concatenate(drawn)

    def steps(self, asked: np.ndarray) -> tuple[list[Any], list[np.ndarray]]:
        """The noise levels that sampling visits, and the pictures (B, H, W, 3) uint8 that the model predicts at each,
        then those that it draws in the end."""
        import torch

        from pipeline.diffusion.levels import levels_for
        from pipeline.diffusion.prediction import make_prediction
        from pipeline.diffusion.sampling import initial_noise, sample
        from pipeline.inference.pictures import to_uint8

        settings, diffusion = self.settings, self.trained.info.config.diffusion
        levels = levels_for(diffusion, settings.sampler, settings.steps)
        these = list(range(len(asked)))
        conditioning, shape = self.conditioning(asked, these)
        seen: list[tuple[Tensor, Tensor]] = []

        def denoise(x: Tensor, timestep: Tensor, inputs: Conditioning) -> Tensor:
            seen.append((x, self.denoiser(x, timestep, inputs)))
            return seen[-1][1]

        noise = initial_noise(settings.seed, torch.tensor(these), shape)
        with torch.no_grad():
            latents = sample(denoise, diffusion, noise, conditioning, sampler=settings.sampler, steps=settings.steps)
            to_x0 = make_prediction(diffusion).to_x0
            predicted = [
                to_x0(output, x, level.alpha, level.sigma)
                for (x, output), level in zip(seen, levels[:-1], strict=True)  # a sampler with one prediction a step
            ]
            return levels, [to_uint8(self.first_stage.decode(x0)) for x0 in (*predicted, latents)]

    @property
    def cells(self) -> int:
        """Labels of a map of the size that was trained on."""
        facts, (_, height, width) = self.trained.contract.conditions.labels, self.trained.contract.latent_shape
        assert facts is not None, "a run of this task was trained on a cache with label maps"
        return facts.grid**2 * height * width

    def conditioning(self, asked: np.ndarray, these: list[int]) -> tuple[Conditioning, tuple[int, int, int]]:
        """The conditioning of label maps (B, h, w), and the shape (C, h', w') of their latents."""
        import torch

        contract, task = self.trained.contract, self.denoiser.task
        facts = contract.conditions.labels
        assert facts is not None
        height, width = (side // facts.grid for side in asked.shape[1:])
        batch = {MEMBER: torch.from_numpy(np.ascontiguousarray(asked))}
        with torch.no_grad():
            prepared = task.prepare(
                batch, self.settings.seed, torch.tensor(these), sides=(height, width), training=False
            )
            return task(prepared), (contract.latent_shape[0], height, width)


def numbers(words: str) -> tuple[int, ...]:
    """1,2,4 -> (1, 2, 4). Raises ConfigError."""
    try:
        return tuple(int(word) for word in words.split(",") if word)
    except ValueError:
        raise ConfigError(f"{words}: whole numbers with commas between them are wanted") from None


if __name__ == "__main__":
    raise SystemExit(main())
