"""Rounds of (limit, stage, script, decode) over one preset, and the tables that come of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.encoding.encode_parts import Parts
from benchmarks.encoding.encode_verb import StageRun, scratch
from benchmarks.encoding.pillow import Rate
from benchmarks.encoding.presets import Preset
from benchmarks.machine import figure, machine, median, spread, table, verdict
from pipeline.errors import DataError

STAGE_TARGET = 0.95  # of the limit
DECODE_TARGET = 0.9  # of Pillow's rate, per core
SAME = {"float32": 0.01, "bfloat16": 0.05}  # largest relative difference between the stage's records and the script's


@dataclass
class Rounds:
    """What was measured, a value per round. Rates are images/s. difference: see Parts.difference."""

    preset: Preset
    device: torch.device
    facts: list[str]
    limit: list[float] = field(default_factory=list)
    models: list[float] = field(default_factory=list)
    stage: list[StageRun] = field(default_factory=list)
    script: list[float] = field(default_factory=list)
    script_workers: list[float] = field(default_factory=list)
    pillow: list[Rate] = field(default_factory=list)
    pillow_on_all_cores: list[Rate] = field(default_factory=list)
    decoders: list[Rate] = field(default_factory=list)
    idle: list[Rate] = field(default_factory=list)
    difference: float = 0.0

    @property
    def stage_of_limit(self) -> float:
        """The stage's rate as a share of the bare encoders'."""
        return median([run.per_second for run in self.stage]) / median(self.limit)

    @property
    def decode_of_pillow(self) -> float:
        """The stage's reading, decoding and writing as a share of Pillow's rate in one thread, per core."""
        return _per_core(self.idle) / _per_core(self.pillow)

    @property
    def decode_of_busy_pillow(self) -> float:
        """The same as a share of what Pillow reaches with a process for each core."""
        return _per_core(self.idle) / _per_core(self.pillow_on_all_cores)


def measure(preset: Preset, folder: Path, say: Callable[[str], None] = lambda line: None) -> Rounds:
    """Measures a preset. folder: for all that is made on the way; the caller removes it. say: hears how far it is.

    Raises DataError when stage and script have not done the same work.
    """
    started = time.perf_counter()
    say(f"{preset.name}: making {preset.images:,} source images, loading the encoders")
    parts = Parts(preset, folder)
    found = Rounds(preset, parts.device, machine(parts.device, parts.threads))
    last = 0.0
    for number in range(preset.rounds):
        begun = time.perf_counter()
        if number and preset.seconds and begun + last - started > preset.seconds:
            break
        _round(parts, found, say if number == 0 else lambda line: None)
        last = time.perf_counter() - begun
        say(
            f"{preset.name}: round {number + 1} of {preset.rounds}, {last:.0f} s: limit {figure(found.limit[-1])}, "
            f"stage {figure(found.stage[-1].per_second)}, script {figure(found.script[-1])} images/s"
        )
    return found


def _round(parts: Parts, found: Rounds, say: Callable[[str], None]) -> None:
    say("limit")
    found.limit.append(parts.limit())
    found.models.append(parts.models())
    with scratch(parts.folder / "stage") as stage, scratch(parts.folder / "script") as script:
        say("stage")
        found.stage.append(parts.stage(stage))
        say("script")
        found.script.append(parts.script(script))
        if not found.difference:
            found.difference = parts.difference(stage, script)
            most = SAME[parts.preset.encoders.vae_dtype]
            if found.difference > most:
                raise DataError(f"stage and script differ by {found.difference:.2g}, more than {most:g} (relative)")
    if parts.preset.script_workers:
        with scratch(parts.folder / "script") as script:
            found.script_workers.append(parts.script(script, parts.preset.script_workers))
    say("decode")
    found.pillow.append(parts.pillow())
    found.pillow_on_all_cores.append(parts.pillow_on_all_cores())
    found.decoders.append(parts.decoders())
    idle = parts.idle_stage()
    found.idle.append(Rate(idle.images, idle.seconds, idle.cpu_seconds, found.pillow_on_all_cores[-1].cores))


def _per_core(rates: list[Rate]) -> float:
    return median([rate.per_core for rate in rates])


# --------------------------------------------------------------------------------------------------------------------
# What is said of them


def report(found: Rounds, command: str) -> str:
    """A page of Markdown."""
    preset = found.preset
    stage = [run.per_second for run in found.stage]
    middle = sorted(found.stage, key=lambda run: run.per_second)[(len(found.stage) - 1) // 2]
    asked = f"of {preset.rounds} asked for, " if len(found.stage) < preset.rounds else ""
    encoders = preset.encoders
    weights = "random weights" if encoders.seed >= 0 else "trained weights"
    lines = [
        f"# encode, {preset.name}, {found.device.type}",
        "",
        f"- command: `{command}`",
        *found.facts,
        f"- encoders: {encoders.vae} ({encoders.vae_dtype}) and {encoders.text}, {weights}; resolution "
        f"{preset.resolution}, batch {preset.batch}",
        f"- source: {preset.images:,} JPEGs of {preset.width}x{preset.height} ({min(preset.distinct, preset.images):,} "
        f"of them different) in tars of {preset.shard:,}, in the page cache",
        f"- images a round: limit {preset.limit_images:,}, stage {preset.stage_images:,}, script "
        f"{preset.script_images:,}, stage without encoders {preset.images:,}",
        f"- rounds: {len(found.stage)}, {asked}medians; stage and script agree to {found.difference:.1g} (relative)",
        "",
        table(("images/s", "median", "lowest to highest", "of the limit"), _encode_rows(found)),
        "",
        f"- stage / limit: {verdict(found.stage_of_limit, STAGE_TARGET)}",
        *_shared_cores(found),
        f"- stage / script: {median(stage) / median(found.script):.2f}",
        f"- start-up of the verb: {median([run.verb_seconds - run.seconds for run in found.stage]):.1f} s (loading and "
        "hashing the encoders, the contract, the manifest and the card; the imports of Python were done before)",
        f"- where the time went: `{middle.line}`",
        "",
        table(("decoding", "images/s", "per core", "of Pillow's", "per core-second of CPU"), _decode_rows(found)),
        "",
        "- stage without encoders / Pillow in one thread, the other cores idle, per core: "
        f"{verdict(found.decode_of_pillow, DECODE_TARGET)}",
        "- stage without encoders / Pillow with every core at it, per core: "
        f"{verdict(found.decode_of_busy_pillow, DECODE_TARGET)}",
        "",
    ]
    return "\n".join(lines)


def _encode_rows(found: Rounds) -> list[list[str]]:
    limit = median(found.limit)
    verb = [run.images / run.verb_seconds for run in found.stage]
    rows: list[tuple[str, list[float]]] = [
        ("both models alone, tensors on the device", found.models),
        ("limit: bare encoders, batches in memory", found.limit),
        ("stage: read, decode, encode, write", [run.per_second for run in found.stage]),
        ("the whole verb, start-up included", verb),
        ("script: one process", found.script),
    ]
    if found.script_workers:
        rows.append((f"script with {found.preset.script_workers} DataLoader workers", found.script_workers))
    return [[name, figure(median(values)), spread(values), f"{median(values) / limit:.2f}"] for name, values in rows]


def _shared_cores(found: Rounds) -> list[str]:
    """On a CPU decoding takes from the cores that encode: what is possible there at all."""
    if found.device.type != "cpu":
        return []
    decoding = median([rate.per_second for rate in found.decoders])
    possible = 1 / (1 / median(found.limit) + 1 / decoding)
    stage = median([run.per_second for run in found.stage])
    return [
        f"- the same cores decode: limit and decoding workers, one after the other, would make {figure(possible)} "
        f"images/s; the stage reaches {stage / possible:.2f} of that"
    ]


def _decode_rows(found: Rounds) -> list[list[str]]:
    pillow = _per_core(found.pillow)
    rows = {
        "Pillow, one thread": found.pillow,
        "Pillow, a process for each core": found.pillow_on_all_cores,
        "decoding workers, samples in memory": found.decoders,
        "stage without encoders: read, decode, write": found.idle,
    }
    return [
        [
            name,
            figure(median([rate.per_second for rate in rates])),
            figure(_per_core(rates)),
            f"{_per_core(rates) / pillow:.2f}",
            figure(median([rate.per_core_second for rate in rates])),
        ]
        for name, rates in rows.items()
    ]
