"""Pictures larger than a model was trained on: how right they are beside those of training's size, whole and in tiles.

.venv/bin/python -m benchmarks.larger runs=FOLDER [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.encoding.presets import changed
from pipeline.distributed.exits import guarded
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import SampleConfig
    from pipeline.data.format.contract import Contract

EPILOG = """\
keys: runs=FOLDER (with a run of each task in a folder of its name) tasks=semantic,superres,inpaint sides=64,128
      tiles=off,64 images=48 steps=8 seed=0 cut=0

A picture of 128 x 128 pixels is four scenes of captioned shapes of 64 x 64, on one background. Its label map, the
picture made small, or the picture and the holes of its four scenes are given to `latentmill sample`, which draws one
image for each.
cut=1 moves the scenes by half of one, so that objects lie across the borders of tiles and of the picture, as no model
of whole scenes has seen them.

Right: semantic: mean IoU of labels by the pixel judge; superres: PSNR in dB, beside bicubic enlargement; inpaint: PSNR
inside of holes, pooled. The error is the standard error. The jump is the mean difference of neighbouring pixels across
the borders of tiles over that elsewhere, and beside it that of the true pictures.
"""
SCENE = 64
SHARES = ("semantic",)
"""Tasks whose figure is a share; that of others is in dB."""
LEAST, JUMP = {"semantic": 0.95, "superres": 1.5, "inpaint": 1.5}, 1.5
"""What is asked of a picture twice as large: a part of the IoU, or dB that it may lose; and its jump at most."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    runs: str = ""
    tasks: str = "semantic,superres,inpaint"
    sides: str = "64,128"
    tiles: str = "off,64"
    images: int = 48
    steps: int = 8
    seed: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Scenes:
    """Pictures that are made of scenes. pictures: (n, S, S, 3) uint8. labels: (n, S, S) uint8. holes: (n, S, S) uint8,
    1 where a scene has its hole."""

    pictures: np.ndarray
    labels: np.ndarray
    holes: np.ndarray


@dataclass(frozen=True)
class Right:
    """A figure, its standard error, and that of a trivial method."""

    value: float
    error: float
    baseline: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.larger",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    shown = [override for override in options.overrides if not override.startswith("runs=")]
    command = " ".join(["python -m benchmarks.larger", *shown])
    return guarded("benchmarks.larger", lambda: run(changed(Plan(), options.overrides), command, options.write))


def run(plan: Plan, command: str, write: bool) -> int:
    """Measure and print. Raises ConfigError."""
    import torch

    from benchmarks.machine import device_slug, keep, machine

    if not plan.runs:
        raise ConfigError("runs is missing: give the folder that `latentmill demo task=all` made")
    head = f"# {command}\n\n" + "\n".join(machine(torch.device("cpu"), torch.get_num_threads()))
    page = "\n\n".join([head, *(of_task(plan, task) for task in plan.tasks.split(","))]) + "\n"
    print(page)
    if write:
        path = keep(f"larger{'-cut' * plan.cut}-{device_slug(torch.device('cpu'))}", page)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def of_task(plan: Plan, task: str) -> str:
    """The table of one task."""
    from benchmarks.machine import table
    from pipeline.data.format.contract_json import contract_from_json
    from pipeline.runs.checkpoint import load_run

    contract = contract_from_json(load_run(f"{plan.runs}/{task}").contract)
    facts = contract.conditions.mask
    rows, first = [], None
    for side, tile in ways(plan):
        scenes = composed(plan, side, facts)
        began = time.perf_counter()
        drawn = drawn_by(plan, task, contract, scenes, tile)
        seconds = (time.perf_counter() - began) / len(drawn)
        right = RIGHT[task](drawn, scenes, contract)
        first = right if first is None else first
        jumps = ["", ""]
        if tile != "off":
            jumps = [f"{jump_of(each, int(tile)):.2f}" for each in (drawn, scenes.pictures)]
        baseline = "" if right.baseline is None else f"{right.baseline:.2f}"
        kept = _kept(task, right, first)
        cells = [tile, f"{right.value:.3f} +- {right.error:.3f}", baseline, kept, *jumps, f"{seconds:.2f}"]
        rows.append([f"{side} x {side}", *cells])
    head = ["pictures", "tile=", "right", "trivial", "against the first", "jump", "jump of the truth", "s an image"]
    asked = f"at least {LEAST[task]} of it" if task in SHARES else f"at most {LEAST[task]} dB less"
    return f"## {task}, {plan.images} images\n\n{table(head, rows)}\n\nAsked: {asked}; a jump of at most {JUMP}."


def ways(plan: Plan) -> Iterator[tuple[int, str]]:
    """Sides and tiles: whole pictures of each side, and tiles that are smaller."""
    for side in map(int, plan.sides.split(",")):
        for tile in plan.tiles.split(","):
            if tile == "off" or int(tile) < side:
                yield side, tile


def _kept(task: str, right: Right, first: Right) -> str:
    return f"{right.value / first.value:.3f}" if task in SHARES else f"{right.value - first.value:+.2f} dB"


def composed(plan: Plan, side: int, mask: Any) -> Scenes:
    """Pictures of side x side pixels, each of scenes that no other picture has."""
    from pipeline.conditions.mask import masks
    from preprocess.shapes.drawing import label_map, render, scene

    shift = SCENE // 2 if plan.cut else 0
    across = side // SCENE + bool(shift)

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        grid = [np.concatenate(parts[i : i + across], axis=1) for i in range(0, across**2, across)]
        return np.concatenate(grid)[shift : shift + side, shift : shift + side]

    found: list[list[np.ndarray]] = [[], [], []]
    for number in range(plan.images):
        numbers = range(number * across**2, (number + 1) * across**2)
        truths = [scene(plan.seed + 1000, i, "val") for i in numbers]
        truths = [replace(truth, background=truths[0].background) for truth in truths]
        found[0].append(joined([render(truth) for truth in truths]))
        found[1].append(joined([label_map(truth) for truth in truths]))
        found[2].append(joined([_one(masks(f"larger-{i}", (SCENE, SCENE), mask)) for i in numbers]))
    return Scenes(*map(np.stack, found))


def _one(holes: np.ndarray) -> np.ndarray:
    """The first variant of a mask."""
    return holes.reshape(-1, SCENE, SCENE)[0].astype(np.uint8)


def smaller(scenes: Scenes, contract: Contract) -> dict[str, list[np.ndarray]]:
    """The pictures made smaller, as superres is given them."""
    from pipeline.conditions.lowres import lowres

    facts = contract.conditions.lowres
    assert facts is not None
    plain = replace(facts, degradation="bicubic", variants=1)
    small = [lowres(picture, plain, "").transpose(1, 2, 0) for picture in scenes.pictures]
    return {"image": [np.ascontiguousarray(one) for one in small]}


GIVEN: dict[str, Callable[[Scenes, Contract], dict[str, list[np.ndarray]]]] = {
    "semantic": lambda scenes, contract: {"labels": list(scenes.labels)},
    "superres": smaller,
    "inpaint": lambda scenes, contract: {"image": list(scenes.pictures), "mask": list(255 * scenes.holes)},
}
"""What `latentmill sample` is given for each task, an array of pixels for each picture, by key."""


def drawn_by(plan: Plan, task: str, contract: Contract, scenes: Scenes, tile: str) -> np.ndarray:
    """What `latentmill sample` draws, (n, S, S, 3) uint8, an image for each."""
    from PIL import Image

    from pipeline import sample
    from pipeline.config import SampleConfig, SamplerConfig

    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as folder:

        def saved(name: str, arrays: Sequence[np.ndarray]) -> tuple[str, ...]:
            paths = [str(Path(folder) / f"{name}-{i}.png") for i in range(len(arrays))]
            for path, array in zip(paths, arrays):
                Image.fromarray(array).save(path)
            return tuple(paths)

        keys: dict[str, Any] = {key: saved(key, arrays) for key, arrays in GIVEN[task](scenes, contract).items()}
        sampler = SamplerConfig(sampler="unipc", steps=plan.steps, guidance=1.0, batch=16)
        config = SampleConfig(
            run=f"{plan.runs}/{task}", dest=f"{folder}/out.png", n=1, sampler=sampler, tile=tile, **keys
        )
        return np.concatenate([row.images for part in _parts(config) for row in sample.sample_rows(part)])


def _parts(config: SampleConfig, rows: int = 16) -> Iterator[SampleConfig]:
    """The configuration in parts of a few rows, whose picture may be written. Row r of each part has noise r."""
    for first in range(0, config.rows, rows):
        asked: dict[str, Any] = {key: values[first : first + rows] for key, values in config.asked.items()}
        yield replace(config, seed=first, **asked)


def jump_of(pictures: np.ndarray, tile: int) -> float:
    """The jump across the borders of windows of `tile` pixels (with the overlap of inference/tiles/choice.py)."""
    from pipeline.evaluation.metrics.seams import jump
    from pipeline.inference.tiles.windows import borders, spans

    side, latent, unit = pictures.shape[1], 8, 16
    overlap = max(unit, tile // 4 // unit * unit)
    at = borders(side, tile, spans(side, tile, overlap, unit))
    assert tile % latent == 0
    return jump(pictures, at, at).ratio


# --------------------------------------------------------------------------------------------------------------------
# How right pictures are


def labels_right(drawn: np.ndarray, scenes: Scenes, contract: Contract) -> Right:
    """Mean IoU over all labels."""
    from pipeline.conditions.labels import sample_labels
    from pipeline.evaluation.metrics.error_bars import half_sample_error
    from pipeline.evaluation.shapes import match

    facts = contract.conditions.labels
    assert facts is not None
    cells = drawn.shape[1] // contract.downsampling * facts.grid
    asked = [sample_labels(labels, (cells, cells)) for labels in scenes.labels]
    counts = [match.labels(picture, labels) for picture, labels in zip(drawn, asked)]
    rows = [{name: value for name, value in row.items() if name != "accuracy"} for row in counts]

    def iou(numbers: Sequence[int]) -> float:
        found = match.mean_iou([rows[i] for i in numbers])
        return float("nan") if found is None else found

    return Right(iou(range(len(rows))), half_sample_error(len(rows), lambda chosen: iou(chosen.tolist())))


def larger_right(drawn: np.ndarray, scenes: Scenes, contract: Contract) -> Right:
    """PSNR, mean over pictures, and that of bicubic enlargement."""
    from pipeline.conditions.lowres import enlarge, lowres
    from pipeline.evaluation.metrics.restoration import psnr, squared_error

    facts = contract.conditions.lowres
    assert facts is not None
    plain, size = replace(facts, degradation="bicubic", variants=1), drawn.shape[2:0:-1]
    values = [psnr(*squared_error(one, truth)) or math.nan for one, truth in zip(drawn, scenes.pictures)]
    bicubic = [enlarge(lowres(truth, plain, ""), (size[0], size[1])) for truth in scenes.pictures]
    trivial = [psnr(*squared_error(one, truth)) or math.nan for one, truth in zip(bicubic, scenes.pictures)]
    return Right(float(np.mean(values)), float(np.std(values) / len(values) ** 0.5), float(np.mean(trivial)))


def inside_right(drawn: np.ndarray, scenes: Scenes, contract: Contract) -> Right:
    """PSNR inside of holes, of squared errors over all pictures."""
    from pipeline.evaluation.metrics.error_bars import half_sample_error
    from pipeline.evaluation.metrics.restoration import psnr, squared_error

    pairs = [
        squared_error(one, truth, hole.astype(bool)) for one, truth, hole in zip(drawn, scenes.pictures, scenes.holes)
    ]

    def pooled(numbers: Sequence[int]) -> float:
        error, values = (sum(pairs[i][part] for i in numbers) for part in (0, 1))
        found = psnr(error, int(values))
        return math.nan if found is None else found

    return Right(pooled(range(len(pairs))), half_sample_error(len(pairs), lambda chosen: pooled(chosen.tolist())))


RIGHT: dict[str, Callable[[np.ndarray, Scenes, Any], Right]] = {
    "semantic": labels_right,
    "superres": larger_right,
    "inpaint": inside_right,
}


if __name__ == "__main__":
    raise SystemExit(main())
