"""encode's stage beside its bare encoders on one device."""

from __future__ import annotations

from pathlib import Path

from benchmarks.encoding.encode_parts import Parts
from benchmarks.encoding.encode_rounds import STAGE_TARGET
from benchmarks.encoding.encode_verb import scratch
from benchmarks.encoding.presets import Preset
from benchmarks.machine import figure, median, spread, table
from benchmarks.whole.journal import Journal

SECTION = "encode's stage beside its bare encoders"


def measure(preset: Preset, folder: Path, journal: Journal) -> None:
    """Measure and note rates in images/s, in rounds of (limit, stage), as many as there is time for, but for the
    first. folder: for temporary files."""
    place = folder / "encoding"
    place.mkdir()
    parts = Parts(preset, place)
    limits, stages, seconds = list[float](), list[float](), 0.0
    for number in range(preset.rounds):
        left = journal.seconds_left
        if number and seconds > left:
            break
        limits.append(parts.limit())
        with scratch(place / "stage") as dest:
            stages.append(parts.stage(dest).per_second)
        seconds = left - journal.seconds_left
    ratio = median([stage / limit for stage, limit in zip(stages, limits, strict=True)])
    encoders = preset.encoders
    rows = [
        [name, figure(median(rates)), spread(rates), f"{median(rates) / median(limits):.2f}"]
        for name, rates in (("limit: bare encoders, batches in memory", limits), ("stage: read to written", stages))
    ]
    journal.note(
        SECTION,
        f"{encoders.vae} ({encoders.vae_dtype}) and {encoders.text} at {preset.resolution} pixels, batch "
        f"{preset.batch}; {preset.stage_images:,} JPEGs of {preset.width}x{preset.height}; {len(limits)} rounds:",
        "",
        table(("images/s", "median", "lowest to highest", "of the limit"), rows),
        "",
    )
    sentence = f"the stage is at least {STAGE_TARGET:g} of the limit"
    journal.check(SECTION, sentence, ratio >= STAGE_TARGET, f"{ratio:.2f}")
