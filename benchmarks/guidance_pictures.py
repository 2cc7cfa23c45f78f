"""The pictures of the how-to pages about guidance: what the demo's model without conditioning makes of the first
records that it never saw, with a guide, from an image, and around a region that is kept.

    .venv/bin/python -m benchmarks.guidance_pictures runs/guidance-pictures      # some minutes on two cores

Every step is a `latentmill eval` that one can also run by hand, as in benchmarks.guidance_figures, with the same
folders; a second run goes on where the first stopped. The pictures go into docs/images/.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.compression.runner import Listing, Runner, Step
from benchmarks.guidance import results
from benchmarks.guidance.plan import Places, Plan, copy_run, settle
from benchmarks.guidance.sheet import sheet
from benchmarks.guidance.steps import Figures
from benchmarks.guidance_figures import add_places
from pipeline.conditions.mask import unpack
from pipeline.data.format.manifest import load_manifest
from pipeline.distributed.exits import guarded
from pipeline.errors import RunError
from pipeline.evaluation.tasks.inpaint import HOLE, MEMBER
from pipeline.evaluation.validation import load_validation
from pipeline.log import show
from pipeline.models.tasks.task import pick_variant
from pipeline.storage.urls import open_storage

COLUMNS, SEED = 6, 0
PLAN = Plan(images=16, few=16, seeds=(SEED,), clip_seeds=(SEED,), clip=(0.5,))
"""As many pictures as an evaluation stores; the first of them are shown, whatever they are."""
LARGEST = 60_000
"""Bytes of a file at most."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guidance_pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_places(parser)
    parser.add_argument("--list", action="store_true", help="print the commands instead, with the time they may take")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    return guarded("benchmarks.guidance_pictures", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Run or list the steps, and write the pictures. Raises ConfigError, DestinationExists, StepFailed, RunError."""
    places = Places(options.folder, options.demo, options.classifier)
    if options.list:
        listing = Listing()
        for step in steps(Figures(PLAN, places, listing, lambda: PLAN.clip[0])):
            listing.step(step)
        show(f"\n# about {listing.spent_s / 60:.0f} minutes in all")
        return 0
    settle(PLAN, places.dest)
    places.require()
    copy_run(places)
    runner = Runner(places.dest, float("inf"))
    for step in steps(Figures(PLAN, places, runner, lambda: PLAN.clip[0])):
        runner.step(step)
    folder = options.root / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in drawn(places).items():
        if len(data) > LARGEST:
            raise RunError(f"{name}: {len(data):,} bytes, and {LARGEST:,} are the most of a picture of docs/")
        (folder / f"{name}.png").write_bytes(data)
        show(f"written: {folder / name}.png, {len(data):,} bytes")
    return 0


def steps(figures: Figures) -> Iterator[Step]:
    """The evaluations whose pictures are shown."""
    plan = figures.plan
    for guide, weights in weights_of(plan).items():
        for weight in weights:
            yield figures.guided(guide, weight, images=plan.images, seed=SEED)
    for strength in plan.strengths:
        heading, words = f"Start from the records' pictures, strength {strength:g}", [f"strength={strength:g}"]
        yield figures.evaluation(heading, words, images=plan.images, seed=SEED)
    yield figures.evaluation("Keep what the records' masks leave", ["keep=true"], images=plan.images, seed=SEED)


def weights_of(plan: Plan) -> dict[str, tuple[float, ...]]:
    """The weights of each guide whose pictures are shown. Without a guide the pictures are the same."""
    return {
        "image": (0.0, plan.image[0]),
        "classifier": (plan.classifier[0], plan.classifier[-1]),
        "clip": (plan.clip[0],),
    }


def drawn(places: Places) -> dict[str, bytes]:
    """PNG files by name."""
    weights, found = weights_of(PLAN), results.read(places.run)

    def guided(guide: str, weight: float) -> Path:
        return folder_of(found, {f"guide.{guide}": weight})

    alone = ("the model alone", tiles(guided("image", 0.0)))
    likeness, (most, least) = guided("image", weights["image"][1]), weights["classifier"]
    towards, clip = guided("classifier", most), guided("clip", weights["clip"][0])
    pictures, holes = records(places)
    begun = {strength: tiles(folder_of(found, {"strength": strength})) for strength in PLAN.strengths}
    kept = tiles(folder_of(found, {"keep": True}))
    hidden = [np.where(hole[..., None], np.uint8(HOLE["grey"]), one) for one, hole in zip(pictures, holes, strict=True)]
    return {
        "guided-picture": sheet(
            [("the target", tiles(likeness, "given.png")), alone, ("guided", tiles(likeness))],
        ),
        "guided-class": sheet(
            [
                alone,
                (f"guided, weight {most:g}", tiles(towards)),
                (f"led away, weight {least:g}", tiles(guided("classifier", least))),
            ],
            words(towards),
        ),
        "guided-caption": sheet([alone, ("guided", tiles(clip))], words(clip)),
        "start-from-image": sheet(
            [("the image", pictures), *((f"strength {strength:g}", row) for strength, row in begun.items())]
        ),
        "keep-region": sheet([("the image", pictures), ("its mask", hidden), ("made anew", kept)]),
    }


def folder_of(found: Sequence[results.Measured], steering: Mapping[str, Any]) -> Path:
    """The folder of an evaluation. Raises RunError."""
    known = results.of(found, dict(steering), PLAN.sampler, PLAN.images, (SEED,))
    if not known:
        raise RunError(f"no evaluation with {steering} is there: delete the folder and run the pictures again")
    return known[0].folder


def tiles(folder: Path, name: str = "grid.png") -> list[np.ndarray]:
    """The first pictures of an evaluation, (H, W, 3) uint8."""
    facts = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    width, height, columns = facts["width"], facts["height"], facts["columns"]
    with Image.open(io.BytesIO((folder / name).read_bytes())) as opened:
        whole = np.asarray(opened.convert("RGB"))
    found = []
    for i in range(COLUMNS):
        top, left = i // columns * (height + facts["gap"]), i % columns * (width + facts["gap"])
        found.append(whole[top : top + height, left : left + width])
    return found


def words(folder: Path) -> list[str]:
    """What the first pictures were led to."""
    captions: list[str] = json.loads((folder / "grid.json").read_text(encoding="utf-8"))["captions"]
    return captions[:COLUMNS]


def records(places: Places) -> tuple[list[np.ndarray], np.ndarray]:
    """The first records' pictures, (H, W, 3) uint8, and their holes (COLUMNS, H, W) bool as the evaluation takes
    them."""
    storage = open_storage(str(places.val))
    manifest = load_manifest(storage)
    facts = manifest.contract.conditions.mask
    assert facts is not None, "the demo's validation cache has masks"
    arrays = load_validation(storage, manifest, ("pixels", MEMBER), COLUMNS, None).arrays
    masks = pick_variant(torch.from_numpy(arrays[MEMBER]), facts.variants, SEED, torch.arange(COLUMNS)).numpy()
    pictures = np.ascontiguousarray(arrays["pixels"].transpose(0, 2, 3, 1))
    holes = unpack(masks, pictures.shape[2]) if facts.packed else masks
    return list(pictures), holes.astype(bool)


if __name__ == "__main__":
    raise SystemExit(main())
