"""The table of the study of latent scales, and the pictures that docs/explained/signal_to_noise.md shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.compression.picture import picture
from benchmarks.latent_scale.measure import FIGURES, PICTURES
from benchmarks.latent_scale.plan import PIXELS, Arm, Plan, equal_at, log_ratio, mismatch
from benchmarks.latent_scale.steps import Places
from benchmarks.machine import table
from pipeline.inference.shown import coloured
from pipeline.report.charts import Series
from pipeline.report.grid import captioned, png, tile
from preprocess.shapes.captions import CLASS_NAMES

IMAGES, STEM = Path("docs") / "images", "signal-to-noise"
MOST_BYTES = 60_000
"""Of a picture."""
STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
"""Levels of 255 to whose multiples a picture's are rounded, tried in turn until its PNG is small enough."""
SHOWN_STEPS = 4
ACROSS = 2
"""Pictures of 128 x 128 pixels in a row."""
NAMES = ("background", *CLASS_NAMES)
"""Of the labels, for their colours."""


@dataclass(frozen=True)
class Found:
    """What was found of one run. figures: of measure.py. folder: where its pictures lie."""

    arm: Arm
    seed: int
    figures: Mapping[str, Any]
    folder: Path

    @property
    def last(self) -> Mapping[str, Mapping[str, float]]:
        """Figures by size, of the last checkpoint."""
        return self.figures["at"][max(self.figures["at"], key=int)]

    def pictures(self, name: str) -> np.ndarray:
        with np.load(self.folder / PICTURES, allow_pickle=False) as arrays:
            return arrays[name]


def read(plan: Plan, places: Places) -> list[Found]:
    """What there is, by arm and then by seed."""
    found = []
    for arm in plan.chosen:
        for seed in plan.seeds:
            folder = places.measured(arm, seed)
            if (path := folder / FIGURES).is_file():
                found.append(Found(arm, seed, json.loads(path.read_text(encoding="utf-8")), folder))
    return found


# --------------------------------------------------------------------------------------------------------------------
# Text


def page(
    plan: Plan, found: Sequence[Found], command: str, machine: Sequence[str], commands: Sequence[tuple[str, float]]
) -> str:
    """Everything in Markdown. commands: of the steps, with their seconds."""
    arms = list(dict.fromkeys(one.arm for one in found))
    names = list(dict.fromkeys(name for one in found for name in one.last))
    return "\n\n".join(
        [
            f"# {command}",
            "\n".join(machine),
            f"{plan.samples:,} samples of {plan.train_images:,} pictures a run, batch {plan.batch}; the same "
            f"{plan.maps} label maps for each size and run, {plan.sampler} with {plan.steps} steps, no guidance. "
            "+- is a standard error over pictures.",
            "## Schedules",
            table(SCHEDULE_HEAD, [schedule_row(arm) for arm in arms]),
            "## mIoU by size, each picture denoised as a whole",
            table(["run", *map(called, names)], [size_row(one, names, "label_iou") for one in found]),
            "## Retention: mIoU beside that of the same maps drawn alone",
            table(["run", *map(called, names)], [size_row(one, names, "retention") for one in found]),
            "## Background: standard deviation between the quarters of a picture, in levels of 255",
            table(["run", *map(called, names), "between pictures"], [spread_row(one, names) for one in found]),
            "## As training goes on",
            table(TIME_HEAD, [row for one in found for row in time_rows(one)]),
            "## What is decided before each step",
            table(walk_head(plan), [row for one in found for row in walk_rows(one)]),
            "## Commands",
            "\n".join(f"    {line}  # {seconds:.0f} s" for line, seconds in commands),
        ]
    )  # fmt: skip


SCHEDULE_HEAD = ("arm", "betas", "SNR at T", "SNR at T / 2", "last timestep with SNR >= 1", "factor from x1, at most")
TIME_HEAD = ("run", "samples", "mIoU at 64", "mIoU at 128", "retention")


def schedule_row(arm: Arm) -> list[str]:
    timesteps = arm.diffusion.timesteps
    ends = [f"{np.exp(log_ratio(arm, timestep)):.3g}" for timestep in (timesteps - 1, timesteps // 2 - 1)]
    return [arm.name, f"{arm.betas[0]:g} to {arm.betas[1]:g}", *ends, str(equal_at(arm)), f"{mismatch(arm):.2f}"]


def size_row(one: Found, names: Sequence[str], figure: str) -> list[str]:
    cells = [one.last.get(name, {}) for name in names]
    return [_run(one), *(with_error(cell, figure) for cell in cells)]


def spread_row(one: Found, names: Sequence[str]) -> list[str]:
    cells = [one.last.get(name, {}) for name in names]
    apart = one.last[str(PIXELS)]["background_apart"]
    return [_run(one), *(f"{cell['background_spread']:.2f}" if cell else "" for cell in cells), f"{apart:.2f}"]


def time_rows(one: Found) -> list[list[str]]:
    rows = []
    for n, sizes in sorted(one.figures["at"].items(), key=lambda item: int(item[0])):
        alone, larger = sizes[str(PIXELS)], sizes.get(str(2 * PIXELS), {})
        cells = (with_error(alone, "label_iou"), with_error(larger, "label_iou"), with_error(larger, "retention"))
        rows.append([_run(one), f"{int(n):,}", *cells])
    return rows


def walk_head(plan: Plan) -> list[str]:
    return ["run", "", *map(str, range(1, plan.steps + 1))]


def walk_rows(one: Found) -> list[list[str]]:
    """The share of the background that is decided, the mIoU and the SNR before each step."""
    walk = one.figures.get("walk")
    if not walk:
        return []
    factor = 2 * np.log(one.arm.factor)
    ratios = [f"{np.exp(log_snr + factor):.2g}" for log_snr in walk["log_snr"]]
    return [
        [_run(one), "SNR", *ratios],
        ["", "background", *(f"{share:.2f}" for share in walk["background_decided"][:-1])],
        ["", "mIoU", *(f"{iou:.2f}" for iou in walk["label_iou"][:-1])],
    ]


def called(name: str) -> str:
    """A size as a heading."""
    return f"{name} x {name}" if name.isdigit() else "128 x 128, one map four times"


def with_error(cell: Mapping[str, float], figure: str) -> str:
    return f"{cell[figure]:.3f} +- {cell[f'{figure}_error']:.3f}" if figure in cell else ""


def _run(one: Found) -> str:
    return f"{one.arm.name}, seed {one.seed}"


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(found: Sequence[Found], folder: Path) -> list[Path]:
    """Write the pictures of the first seed of each arm; returns their paths."""
    firsts = list({one.arm.name: one for one in reversed(found)}.values())[::-1]
    files = {
        f"{STEM}-background.svg": decided_chart(firsts).encode(),
        f"{STEM}-ratio.svg": decided_chart(firsts, by_ratio=True).encode(),
        f"{STEM}-steps.png": steps_picture(firsts),
        f"{STEM}-128.png": larger_picture(firsts, str(2 * PIXELS)),
        f"{STEM}-256.png": larger_picture(firsts, str(4 * PIXELS)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, data in files.items():
        if data:
            paths.append(folder / name)
            paths[-1].write_bytes(data)
    return paths


def decided_chart(found: Sequence[Found], by_ratio: bool = False) -> str:
    """How much of the background is decided before each step; by_ratio: by the signal-to-noise ratio there. "" without
    figures."""
    curves = []
    for i, one in enumerate(found):
        if walk := one.figures.get("walk"):
            shares = walk["background_decided"][:-1]
            ratios = np.exp(np.array(walk["log_snr"]) + 2 * np.log(one.arm.factor)).tolist()
            xs = ratios if by_ratio else range(1, len(shares) + 1)
            curves.append(Series(one.arm.words, list(zip(xs, shares, strict=True)), i, dots=True))
    return picture(
        curves,
        title="Share of the background that is decided",
        x_label="signal-to-noise ratio Var(z) alpha^2 / sigma^2" if by_ratio else "before denoising step",
        y_range=(0, 1.2),  # a sampler may overshoot
        log_x=by_ratio,
    )


def steps_picture(found: Sequence[Found]) -> bytes:
    """For each arm what the model predicts before each of some steps, and in the end, of two pictures: those that end
    with the darkest and the lightest background of the ones that were kept."""
    walks = [(one, one.pictures("walk")) for one in found if one.figures.get("walk")]
    if not walks:
        return b""
    count = walks[0][1].shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(SHOWN_STEPS, count)).round().astype(int))
    before = ", ".join(str(step + 1) for step in chosen[:-1].tolist())
    rows = []
    for _, walk in walks:
        greys = np.median(walk[:, -1].reshape(len(walk), -1), axis=1)
        two = walk[[int(greys.argmin()), int(greys.argmax())]][:, chosen]
        rows.append(np.asarray(tile(two.reshape(-1, *two.shape[2:]), len(chosen)))[None])
    return small(captioned(rows, [f"{one.arm.words}: before steps {before}, and in the end" for one, _ in walks]))


def larger_picture(found: Sequence[Found], size: str) -> bytes:
    """A row for each arm: what was asked for, and pictures of this size that were drawn; of large ones all arms in one
    row."""
    drawn = [one.pictures(f"drawn-{size}") for one in found if size in one.last]
    if not drawn:
        return b""
    if int(size) > 2 * PIXELS:
        row = np.stack([_asked(found[0], size)[0], *(pictures[0] for pictures in drawn)])
        words = ", ".join(one.arm.words for one in found)
        return small(captioned([row], [f"asked for; {words}"]))
    shown = [_asked(one, size)[0] for one in found]
    rows = [pictures[:ACROSS] for pictures in drawn]
    return small(captioned(rows, [one.arm.words for one in found], shown))


def _asked(one: Found, size: str) -> np.ndarray:
    """The label maps of a size in colours, (B, H, W, 3) uint8."""
    maps, side = one.pictures(f"asked-{size}"), int(size)
    return np.stack([coloured(labels, (side, side), NAMES) for labels in maps])


def small(image: Image.Image) -> bytes:
    """The picture as a PNG of at most MOST_BYTES where that can be, with levels as fine as fit. Fewer levels keep every
    colour near its place; a palette of few colours does not."""
    pixels = np.asarray(image).astype(np.int64)
    data = b""
    for step in STEPS:
        rounded = ((pixels + step // 2) // step * step).clip(0, 255).astype(np.uint8)
        data = png(Image.fromarray(rounded))
        if len(data) <= MOST_BYTES:
            break
    return data
