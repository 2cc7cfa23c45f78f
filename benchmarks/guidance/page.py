"""The page of what guidance reached, written by a run of the figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compression.page import broken, wrapped
from benchmarks.guidance.plan import Places, Plan
from benchmarks.guidance.results import (
    ATTRIBUTES,
    CLASS,
    CLASS_KEPT,
    KEPT,
    LIKENESS,
    START,
    WHOLE,
    Measured,
    Value,
    claims,
    together,
)
from benchmarks.guidance.steps import AGAIN, AGAIN_STRENGTH
from benchmarks.guidance.verdicts import Read, verdicts
from benchmarks.machine import table

PAGE = Path("docs") / "measured" / "guidance.md"
CASE_WORDS = {
    "plain": "the model alone",
    "again": f"begun {AGAIN} times more from its own result, strength {AGAIN_STRENGTH:g}",
    "guide": "led to the kept pixels",
    "both": "both",
}
ABOUT = (
    "Shares have 95 % intervals (Wilson) of the pictures of both seeds together; figures in dB are means over seeds "
    "with a standard error. Seeds change the noise; captions, classes and pictures are those of the same held-out "
    "records for both, so that error bars say nothing of other records. How it is done: "
    "[guide](../how_to/guide_without_retraining.md), [start from an image](../how_to/start_from_an_image.md), "
    "[keep a region](../how_to/keep_a_region.md)."
)
OF_CLASSES = (
    "Permuted is the share of the same pictures that show the next picture's class. A weight below 0 leads away."
)
OF_CAPTIONS = (
    "by the mean over kinds of claims of the share that is right, and measured on other captions with other seeds, by "
    "pixels: CLIP's own score, which the guide climbs, is not looked at."
)
OF_KEPT = (
    "PSNR of what is kept before it is pasted, in dB; after pasting it is the given picture to the bit. Pooled is of "
    "squared errors over all pictures; mean is the mean over pictures of their own PSNR, which is higher, since "
    "pictures that are easy count as much. Away from the rim are the latent positions whose neighbours are all kept, "
    "too. What is kept in the latent is kept exactly, so what is lost beyond the autoencoder's own loss is lost by the "
    "decoder, which makes kept pixels from their neighbours as well. None of the ways sees what is hidden."
)
OF_MASKS = "strokes and rectangles; every kept pixel counts, those at the rim too"


@dataclass(frozen=True)
class Facts:
    """What the page says besides figures. machine: lines of benchmarks.machine. command: of the figures. commands: of
    the steps, with their seconds."""

    machine: Sequence[str]
    command: str
    commands: Sequence[tuple[str, float]]


def write(root: Path, plan: Plan, places: Places, facts: Facts) -> Path:
    """Write the page below `root`, the checkout; returns its path."""
    path = root / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(Read(plan, places), facts), encoding="utf-8")
    return path


def page(read: Read, facts: Facts) -> str:
    """The page's Markdown."""
    plan, rows = read.plan, verdicts(read)
    met, known = sum(one.met is True for one in rows), sum(one.met is not None for one in rows)
    seeds, halves = _seeds(plan.seeds), ("pooled", "mean", "away from the rim")
    parts = [
        "# Guidance without retraining, measured",
        wrapped(
            "A model of captioned shapes that was never told of classes, captions or pictures is led to them: of "
            f"{known} figures that were asked for, {met} are reached."
        ),
        f"    {facts.command}",
        wrapped(f"{_of_model(read)} {ABOUT}"),
        "\n".join(facts.machine),
        "## Asked and measured",
        table(("figure", "asked", "measured", "reached"), [one.row for one in rows]),
        "## A classifier of noisy latents",
        wrapped(f"{plan.images} pictures a seed, `{plan.sampler}` with {plan.steps} steps. {OF_CLASSES}"),
        table(("weight", *seeds, "both: right class", "permuted", "whole shapes"), _class_rows(read)),
        "## A small picture",
        wrapped(
            f"{plan.few} pictures a seed, {plan.steps} steps, each led to its record's picture divided by 4; PSNR of "
            "the pictures, made as small, against it, in dB."
        ),
        table(("sampler", "weight", *seeds, "both", "whole shapes"), _image_rows(read)),
        "## A caption, by CLIP",
        wrapped(
            f"`{plan.sampler}` with {plan.steps} steps. The weight was chosen by {plan.few} captions of one cache with "
            f"seed {plan.choice_seed}, {OF_CAPTIONS}"
        ),
        table(("weight, to choose", "claims right", "all right", "whole shapes"), _choice_rows(read)),
        table(
            ("weight, measured", *_seeds(plan.clip_seeds), "both: all right", "by objects named", "whole shapes"),
            _clip_rows(read),
        ),
        "## Start from an image",
        wrapped(f"{plan.images} held-out pictures a seed, {plan.steps} steps; chance is about 0.04."),
        table(("sampler", "strength", *seeds, "both: class kept", "PSNR to the start, dB"), _start_rows(read)),
        "## Keep a region",
        wrapped(OF_KEPT),
        table(("the right half is made anew", *halves), _half_rows(read)),
        table(("the records' masks", *seeds, "both: pooled", "of the autoencoder"), _mask_rows(read)),
        "## Commands",
        "\n\n".join(broken(command, seconds) for command, seconds in facts.commands),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _of_model(read: Read) -> str:
    found = read.guided("classifier", 0.0)
    seen = f" ({found[0].metrics['n']:,} samples seen)" if found else ""
    return (
        f"The model is `task=unconditional` of `latentmill demo tasks=all`{seen}, the classifier that of "
        "`experiment=shapes_classifier`."
    )


def _seeds(seeds: Sequence[int]) -> list[str]:
    return [f"seed {seed}" for seed in seeds]


def _cells(measured: Sequence[Measured], seeds: Sequence[int], name: str) -> list[str]:
    """A figure of each seed, and of all together."""
    by_seed = {one.seed: one for one in measured}
    each = [_plain(together([by_seed[seed]], name)) if seed in by_seed else "" for seed in seeds]
    return [*each, _plain(together(measured, name))]


def _plain(value: Value | None) -> str:
    return "" if value is None else str(value)


def _number(measured: Sequence[Measured], name: str) -> str:
    """A mean over seeds, without its bar."""
    values = [one.metrics[name] for one in measured if isinstance(one.metrics.get(name), float | int)]
    return f"{sum(values) / len(values):.3f}" if values else ""


def _class_rows(read: Read) -> list[list[str]]:
    rows = []
    for weight in sorted({0.0, *read.plan.classifier}):
        found = read.guided("classifier", weight)
        cells = _cells(found, read.plan.seeds, CLASS)
        rows.append([f"{weight:g}", *cells, _number(found, f"{CLASS}_permuted"), _number(found, WHOLE)])
    return rows


def _image_rows(read: Read) -> list[list[str]]:
    rows = []
    for sampler, weights in (("ddim", read.plan.image), (read.plan.sampler, read.plan.image[:1])):
        for weight in (0.0, *weights):
            found = read.guided("image", weight, sampler)
            rows.append([sampler, f"{weight:g}", *_cells(found, read.plan.seeds, LIKENESS), _number(found, WHOLE)])
    return rows


def _choice_rows(read: Read) -> list[list[str]]:
    rows = []
    for weight in read.plan.clip:
        for one in read.choice(weight):
            name = f"{weight:g}{', chosen' if weight == read.weight else ''}"
            rows.append([name, f"{claims(one):.3f}", _plain(together([one], ATTRIBUTES)), _number([one], WHOLE)])
    return rows


def _clip_rows(read: Read) -> list[list[str]]:
    rows = []
    for weight in (0.0, read.weight):
        found = read.guided("clip", weight)
        by_objects = [one.metrics.get(f"{ATTRIBUTES}_by_objects") or {} for one in found]
        names = sorted({name for one in by_objects for name in one})
        shares = {name: sum(one.get(name, 0.0) for one in by_objects) / len(by_objects) for name in names}
        words = ", ".join(f"{name}: {share:.3f}" for name, share in shares.items())
        rows.append(
            [f"{weight:g}", *_cells(found, read.plan.clip_seeds, ATTRIBUTES), words, _number(found, WHOLE)],
        )
    return rows


def _start_rows(read: Read) -> list[list[str]]:
    rows = []
    for sampler in read.plan.samplers:
        for strength in read.plan.strengths:
            found = read.starts(strength, sampler)
            cells = _cells(found, read.plan.seeds, CLASS_KEPT)
            rows.append([sampler, f"{strength:g}", *cells, _plain(together(found, START))])
    found = read.starts(read.plan.strengths[0], read.plan.samplers[0])
    own = [_number(found, f"{CLASS_KEPT}_reconstruction"), _number(found, f"{START}_reconstruction")]
    return [*rows, ["the autoencoder alone", "", *([""] * len(read.plan.seeds)), *own]] if found else rows


def _half_rows(read: Read) -> list[list[str]]:
    rows, plan, names = [], read.plan, ("kept", "mean", "away")
    for case, words in CASE_WORDS.items():
        if not read.halves[case]:
            continue
        images = read.halves[case][0]["images"]
        weight = f", weight {plan.kept_guide:g}" if case == "guide" else ""
        figures = [_plain(read.half(case, name)) for name in names]
        rows.append([f"{words}{weight} (`{plan.sampler}`, {plan.steps} steps, {images} pictures a seed)", *figures])
    own = [read.half("plain", f"{name}_reconstruction") for name in names]
    return [*rows, ["the autoencoder alone", *(f"{one.value:.1f}" if one else "" for one in own)]] if rows else rows


def _mask_rows(read: Read) -> list[list[str]]:
    found = read.masks()
    own = _number(found, f"{KEPT}_reconstruction")
    return [[OF_MASKS, *_cells(found, read.plan.seeds, KEPT), own]] if found else []
