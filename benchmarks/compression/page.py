"""The page of the compression study: tables and charts of what was found, written by a run of the study alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compression.picture import picture
from benchmarks.compression.plan import Plan
from benchmarks.compression.results import ACCURACY, CLIP, FID, Found, Measured, missing
from benchmarks.machine import figure, table
from pipeline.report.charts import Series

PAGE, IMAGES = Path("docs") / "measured" / "compression.md", Path("docs") / "images"
MEASURES = {FID: "FID", ACCURACY: "attribute accuracy", CLIP: "CLIP score"}
WIDTH = 118


@dataclass(frozen=True)
class Facts:
    """What the page says besides figures. machine: lines of benchmarks.machine. command: of the study. commands: of its
    steps, with their seconds."""

    machine: Sequence[str]
    command: str
    commands: Sequence[tuple[str, float]]


def write(root: Path, plan: Plan, found: Sequence[Found], facts: Facts) -> list[Path]:
    """Write the page and its charts below `root`, the checkout; returns their paths."""
    paths = []
    drawn = {name: svg for name, svg in charts(plan, found).items() if svg}
    for name, svg in drawn.items():
        paths.append(root / IMAGES / f"compression-{name}.svg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text(svg, encoding="utf-8")
    paths.append(root / PAGE)
    paths[-1].parent.mkdir(parents=True, exist_ok=True)
    paths[-1].write_text(page(plan, found, facts, list(drawn)), encoding="utf-8")
    return paths


# --------------------------------------------------------------------------------------------------------------------
# Charts


def charts(plan: Plan, found: Sequence[Found]) -> dict[str, str]:
    """SVG by name; "" for one that has nothing to show."""
    factors = [one.level.f for one in found]
    ends = [(one.level.f, end) for one in found if (end := one.final(plan.steps))]
    by_f = [
        _curve("pictures drawn", [(f, end) for f, end in ends], FID, 0),
        Series(
            "reconstructions of real pictures",
            [
                (f, float(end.metrics[name]))
                for f, end in ends
                if (name := f"{FID}_floor_reconstruction") in end.metrics
            ],
            1,
            dots=True,
        ),
    ]
    right = [
        _curve("pictures drawn", [(f, end) for f, end in ends], ACCURACY, 0),
        Series(
            "reconstructions of real pictures",
            [(f, float(end.metrics[name])) for f, end in ends if (name := f"{ACCURACY}_reconstruction") in end.metrics],
            1,
            dots=True,
        ),
    ]
    axis: dict[str, Any] = {"x_label": "f: pixels per latent position, along a side", "log_x": True, "x_ticks": factors}
    minutes: dict[str, Any] = {"x_label": "minutes of training the denoiser"}
    speed: dict[str, Any] = {"x_label": "images/s", "log_x": True}
    over_time = [(one, [(m.seconds / 60, m) for m in one.over_time(plan.steps)]) for one in found]
    over_speed = [
        (one, [(one.speed[m.steps], m) for m in one.over_steps() if m.steps in one.speed])  # fewer steps are faster
        for one in found
    ]
    lower = "lower is better"
    return {
        "f": picture(by_f, title="FID after equal time", y_label=lower, log_y=True, **axis),
        "accuracy": picture(
            right, title="Attribute accuracy after equal time", y_label="higher is better", y_range=(0, 1), **axis
        ),
        "time": picture(_curves(over_time, FID), title="FID as training goes on", y_label=lower, log_y=True, **minutes),
        "accuracy-time": picture(
            _curves(over_time, ACCURACY),
            title="Attribute accuracy as training goes on",
            y_label="higher is better",
            y_range=(0, 1),
            **minutes,
        ),
        "speed": picture(
            _curves(over_speed, FID),
            title="FID against the speed of drawing",
            y_label=lower,
            log_y=True,
            **speed,
        ),
    }


def _curves(points: Sequence[tuple[Found, Sequence[tuple[float, Measured]]]], name: str) -> list[Series]:
    return [_curve(f"f = {one.level.f}", at, name, i) for i, (one, at) in enumerate(points)]


def _curve(label: str, points: Sequence[tuple[float, Measured]], name: str, colour: int) -> Series:
    """A curve of a figure with its error bars."""
    known = [(x, one) for x, one in points if name in one.metrics]
    bars = {x: bar for x, one in known if (bar := one.bar(name))}
    return Series(label, [(x, float(one.metrics[name])) for x, one in known], colour, dots=True, bars=bars)


def _steps(plan: Plan) -> str:
    numbers = sorted({plan.steps, *plan.sweep})
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


# --------------------------------------------------------------------------------------------------------------------
# Text


def page(plan: Plan, found: Sequence[Found], facts: Facts, drawn: Sequence[str]) -> str:
    """The page's Markdown. drawn: names of the charts that there are."""
    shown = {name: f"![{words}](../images/compression-{name}.svg)" for name, words in PICTURES.items() if name in drawn}
    first = shown.pop("f", f"    {facts.command}")
    parts = [
        "# Measured: how much compression serves a denoiser",
        summary(plan, found),
        first,
        f"    {facts.command}" if first.startswith("!") else "",
        "\n".join(facts.machine),
        "## What is compared\n" + compared(plan),
        table(LEVEL_HEAD, [level_row(one) for one in found]),
        "## First stages\n"
        + wrapped(
            f"Trained for {_minutes(plan.stage_seconds)} each on the same pictures, with the losses of "
            "conf/experiment/kl_small.yaml (squared error, a little absolute error, KL 1e-3 a pixel value; neither "
            "perceptual distance nor discriminator); f = 1 has none. Figures are of the reconstructions of "
            f"{plan.val_images:,} pictures that training never saw; rFID is against the real pictures of the "
            "denoisers' FID. This time is not counted below."
        ),
        table(STAGE_HEAD, [row for one in found if (row := stage_row(one))]),
        f"## After {_minutes(plan.denoiser_seconds)} of training\n"
        + wrapped(
            f"{plan.val_images:,} captions that training never saw, {plan.sampler} with {plan.steps} steps, guidance 2 "
            "above noise level 1. Of FID +- is one standard error; of the accuracy the 95 % interval is given. Floors: "
            "the same figure of reconstructions by the first stage, and of other real pictures."
        ),
        table(END_HEAD, [end_row(one, end) for one in found if (end := one.final(plan.steps))]),
        shown.get("accuracy", ""),
        "\n".join(f"- {line}" for line in readings(plan, found)),
        "## As training goes on",
        table(TIME_HEAD, [time_row(one, m) for one in found for m in one.over_time(plan.steps)]),
        *(shown[name] for name in ("time", "accuracy-time") if name in shown),
        "## Against the speed of drawing\n"
        + wrapped(
            f"The trained denoisers with {_steps(plan)} steps of {plan.sampler}; images/s from text states to pixels, "
            f"guidance and decoder included, batches of {plan.speed_images}, the median of {plan.speed_rounds}."
        ),
        table(SPEED_HEAD, [speed_row(one, m) for one in found for m in one.over_steps()]),
        shown.get("speed", ""),
        left_out(missing(plan, list(found))),
        "## The commands\n"
        + wrapped(
            f"Each ran in a process of its own; all took {_minutes(sum(seconds for _, seconds in facts.commands))}."
        ),
        "\n".join(broken(command, seconds) for command, seconds in facts.commands),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


PICTURES = {
    "f": "FID after equal training time at each f, with the floor of reconstructions",
    "accuracy": "attribute accuracy after equal training time at each f",
    "time": "FID over minutes of training, for each f",
    "accuracy-time": "attribute accuracy over minutes of training, for each f",
    "speed": "FID against images/s, for each f",
}
LEVEL_HEAD = ("f", "latent", "numbers", "levels", "parameters", "GFLOP an image", "images/s", "samples", "GB")
STAGE_HEAD = ("f", "samples", "images/s", "PSNR, dB", "SSIM", "rFID", "standard deviation")
END_HEAD = ("f", "FID", "floor: reconstructed", "floor: real", "accuracy", "reconstructed", "CLIP score")
TIME_HEAD = ("f", "minutes", "samples", "FID", "accuracy", "CLIP score")
SPEED_HEAD = ("f", "steps", "images/s", "FID", "accuracy")


def summary(plan: Plan, found: Sequence[Found]) -> str:
    """The page's first sentence."""
    parameters = sum(one.parameters for one in found) / len(found) / 1e6
    factors = ", ".join(str(one.level.f) for one in found)
    return wrapped(
        f"One size of denoiser ({parameters:.1f} million parameters) trained for {_minutes(plan.denoiser_seconds)} at "
        f"f = {factors} on captioned shapes of 64 pixels: {best(plan, found)}."
    )


def best(plan: Plan, found: Sequence[Found]) -> str:
    """Where FID is lowest and the accuracy highest, and which others cannot be told from that."""
    ends = {one.level.f: end for one in found if (end := one.final(plan.steps))}
    words = []
    for name, sign in ((FID, 1.0), (ACCURACY, -1.0)):
        known = {f: end for f, end in ends.items() if name in end.metrics}
        if not known:
            continue
        f = min(known, key=lambda one: sign * known[one].metrics[name])
        bar = known[f].bar(name)
        near = [str(other) for other in known if other != f and _overlap(bar, known[other].bar(name))]
        beside = f" (the error bar reaches that of f = {' and '.join(near)})" if near else ""
        words.append(f"{'the lowest FID' if sign > 0 else 'the highest accuracy'} is at f = {f}{beside}")
    return ", ".join(words) or "nothing was measured"


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]


def compared(plan: Plan) -> str:
    """What is the same for each f, and what is not."""
    lines = (
        "Equal time, not equal samples: each denoiser trained on as many samples as pass it in the same number of "
        "minutes when it has the machine to itself. A short run of the same command measured that rate before; it is "
        "the images/s below, and all minutes of training follow from it, whatever else the machine did later.",
        "Equal size: the same two levels of 8x8 and 4x4 positions inside, and a level of 32 channels around them for "
        "each halving of f, as Rombach et al. have more levels at small f.",
        f"Equal settings: batch {plan.batch}, Muon at 4e-3 with a cosine to 0 at the end of each run, v-prediction, "
        "the scaled linear schedule of 1,000 steps, averages over the last twentieth of the samples.",
        "Equal judgement: the same captions and noise numbers, FID with features of real pictures (never of "
        "reconstructions), and the attributes that the pixels show.",
        "Latents have the channels of Rombach et al.'s table 8 and are divided by their standard deviation. At f = 1 a "
        "latent is the picture, from -1 to 1; its noise schedule is not shifted, as theirs is not.",
        "One run each: the error bars are those of the pictures drawn, and do not say how another run would end.",
        "Before the end of a run its learning rate has not fallen yet: points of equal time compare with one another, "
        "and not with what a shorter run would reach.",
    )
    return "\n".join(wrapped(line, "- ", "  ") for line in lines)


def readings(plan: Plan, found: Sequence[Found]) -> list[str]:
    """What the figures say of why, in sentences that hold them."""
    lines = []
    fast = max(found, key=lambda one: one.denoiser.n)
    for one in found:
        end = one.final(plan.steps)
        if end is None:
            continue
        parts = [f"f = {one.level.f}: {one.denoiser.n:,} samples in the time"]
        if one.denoiser.n < fast.denoiser.n:
            parts[0] += f", {fast.denoiser.n / one.denoiser.n:.1f} times fewer than f = {fast.level.f}"
        floor, value = end.metrics.get(f"{FID}_floor_reconstruction"), end.metrics.get(FID)
        if floor and value is not None:
            parts.append(f"FID is {value / floor:.2f} times that of its reconstructions")
        if (ceiling := end.metrics.get(f"{ACCURACY}_reconstruction")) is not None and ACCURACY in end.metrics:
            parts.append(f"its pictures could be right in {ceiling:.3f}, and are in {end.metrics[ACCURACY]:.3f}")
        lines.append(wrapped("; ".join(parts) + ".", "", "  "))
    return lines


def level_row(one: Found) -> list[str]:
    level, numbers = one.level, one.level.side**2 * one.level.latent_channels
    widths = "-".join(str(level.channels * factor) for factor in level.multipliers)
    return [
        *(str(level.f), f"{level.side}x{level.side}x{level.latent_channels}", f"{numbers:,}", widths),
        *(f"{one.parameters / 1e6:.2f} M", f"{one.flops / 1e9:.2f}", figure(one.denoiser.images_per_s)),
        *(f"{one.denoiser.n:,}", f"{one.denoiser.memory_gb:.2f}"),
    ]


def stage_row(one: Found) -> list[str]:
    """Cells; [] for no first stage."""
    if one.stage is None:
        return []
    values = one.stage_figures
    rfid = f"r{FID}"
    return [
        *(str(one.level.f), f"{one.stage.n:,}", figure(one.stage.images_per_s), with_error(values, "psnr", 2)),
        *(with_error(values, "ssim", 4), with_error(values, rfid, 2)),
        _number(values, "latent_std", 3),
    ]


def end_row(one: Found, end: Measured) -> list[str]:
    values = end.metrics
    return [
        *(str(one.level.f), with_error(values, FID, 2), _number(values, f"{FID}_floor_reconstruction", 2)),
        *(_number(values, f"{FID}_floor_real", 2), with_interval(values, ACCURACY)),
        *(_number(values, f"{ACCURACY}_reconstruction", 3), with_error(values, CLIP, 1)),
    ]


def time_row(one: Found, measured: Measured) -> list[str]:
    values = measured.metrics
    return [
        *(str(one.level.f), f"{measured.seconds / 60:.1f}", f"{measured.n:,}", with_error(values, FID, 2)),
        *(with_interval(values, ACCURACY), with_error(values, CLIP, 1)),
    ]


def speed_row(one: Found, measured: Measured) -> list[str]:
    rate = one.speed.get(measured.steps)
    values = measured.metrics
    return [
        *(str(one.level.f), str(measured.steps), "" if rate is None else figure(rate)),
        *(with_error(values, FID, 2), with_interval(values, ACCURACY)),
    ]


def with_error(values: dict[str, Any], name: str, digits: int) -> str:
    """12.3 +- 0.4"""
    error = values.get(f"{name}_error")
    return _number(values, name, digits) + (f" +- {error:.{digits}f}" if isinstance(error, float) else "")


def with_interval(values: dict[str, Any], name: str) -> str:
    """0.684, 0.642 to 0.722"""
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    beside = f", {low:.3f} to {high:.3f}" if isinstance(low, float) and isinstance(high, float) else ""
    return _number(values, name, 3) + beside


def _number(values: dict[str, Any], name: str, digits: int) -> str:
    value = values.get(name)
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else ""


def left_out(evaluations: Sequence[str]) -> str:
    """What was not measured."""
    return wrapped(f"Left out, as the time was over: {'; '.join(evaluations)}.") if evaluations else ""


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def broken(command: str, seconds: float) -> str:
    """A command as code, on as many lines as it needs, after the seconds that it took."""
    lines = [f"    # {seconds:.0f} s"]
    line = "   "
    for word in shlex.split(command):
        key, equals, value = word.partition("=")
        quoted = f"{key}={shlex.quote(value)}" if equals else shlex.quote(word)
        if len(line) + 1 + len(quoted) > WIDTH - 2:
            lines.append(f"{line} \\")
            line = "       "
        line = f"{line} {quoted}"
    return "\n".join([*lines, line])


def wrapped(words: str, first: str = "", later: str = "") -> str:
    """Words in lines that fit a page. first, later: what the first and each later line begin with."""
    lines, line = [], first
    for word in words.split():
        joined = f"{line}{'' if line in (first, later) else ' '}{word}"
        if len(joined) > WIDTH and line.strip():
            lines.append(line)
            joined = later + word
        line = joined
    return "\n".join([*lines, line])
