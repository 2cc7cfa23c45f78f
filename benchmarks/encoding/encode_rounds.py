"""Rounds of (limit, stage, script, decode) over one preset, and their tables."""

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
    """Measurements, one value per round. Rates are images/s. difference: see Parts.difference."""

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
        """The same as a share of Pillow's rate with a process for each core."""
        return _per_core(self.idle) / _per_core(self.pillow_on_all_cores)


def measure(preset: Preset, folder: Path, say: Callable[[str], None] = lambda line: None) -> Rounds:
    """Measure a preset. folder: for temporary files, removed by the caller. say: called with lines about progress.

    Raises DataError when stage and script have not done the same work.
    """
    started = time.perf_counter()
    say(f"{preset.name}: making {preset.images:,} source images, loading the encoders")
    parts = Parts(preset, folder)
    rounds = Rounds(preset, parts.device, machine(parts.device, parts.threads))
    last = 0.0
    for number in range(preset.rounds):
        begun = time.perf_counter()
        if number and preset.seconds and begun + last - started > preset.seconds:
            break
        _round(parts, rounds, say if number == 0 else lambda line: None)
        last = time.perf_counter() - begun
        say(
            f"{preset.name}: round {number + 1} of {preset.rounds}, {last:.0f} s: limit {figure(rounds.limit[-1])}, "
            f"stage {figure(rounds.stage[-1].per_second)}, script {figure(rounds.script[-1])} images/s"
        )
    return rounds


def _round(parts: Parts, rounds: Rounds, say: Callable[[str], None]) -> None:
    say("limit")
    rounds.limit.append(parts.limit())
    rounds.models.append(parts.models())
    with scratch(parts.folder / "stage") as stage, scratch(parts.folder / "script") as script:
        say("stage")
        rounds.stage.append(parts.stage(stage))
        say("script")
        rounds.script.append(parts.script(script))
        if not rounds.difference:
            rounds.difference = parts.difference(stage, script)
            limit = SAME[parts.preset.encoders.vae_dtype]
            if rounds.difference > limit:
                raise DataError(f"stage and script differ by {rounds.difference:.2g}, more than {limit:g} (relative)")
    if parts.preset.script_workers:
        with scratch(parts.folder / "script") as script:
            rounds.script_workers.append(parts.script(script, parts.preset.script_workers))
    say("decode")
    rounds.pillow.append(parts.pillow())
    rounds.pillow_on_all_cores.append(parts.pillow_on_all_cores())
    rounds.decoders.append(parts.decoders())
    idle = parts.idle_stage()
    rounds.idle.append(Rate(idle.images, idle.seconds, idle.cpu_seconds, rounds.pillow_on_all_cores[-1].cores))


def _per_core(rates: list[Rate]) -> float:
    return median([rate.per_core for rate in rates])


# --------------------------------------------------------------------------------------------------------------------
# Report


def report(rounds: Rounds, command: str) -> str:
    """A page of Markdown."""
    preset = rounds.preset
    stage = [run.per_second for run in rounds.stage]
    middle = sorted(rounds.stage, key=lambda run: run.per_second)[(len(rounds.stage) - 1) // 2]
    requested = f"of {preset.rounds} asked for, " if len(rounds.stage) < preset.rounds else ""
    encoders = preset.encoders
    weights = "random weights" if encoders.seed >= 0 else "trained weights"
    lines = [
        f"# encode, {preset.name}, {rounds.device.type}",
        "",
        f"- command: `{command}`",
        *rounds.facts,
        f"- encoders: {encoders.vae} ({encoders.vae_dtype}) and {encoders.text}, {weights}; resolution "
        f"{preset.resolution}, batch {preset.batch}",
        f"- source: {preset.images:,} JPEGs of {preset.width}x{preset.height} ({min(preset.distinct, preset.images):,} "
        f"of them different) in tars of {preset.shard:,}, in the page cache",
        f"- images a round: limit {preset.limit_images:,}, stage {preset.stage_images:,}, script "
        f"{preset.script_images:,}, stage without encoders {preset.images:,}",
        f"- rounds: {len(rounds.stage)}, {requested}medians; "
        f"stage and script agree to {rounds.difference:.1g} (relative)",
        "",
        table(("images/s", "median", "lowest to highest", "of the limit"), _encode_rows(rounds)),
        "",
        f"- stage / limit: {verdict(rounds.stage_of_limit, STAGE_TARGET)}",
        *_shared_cores(rounds),
        f"- stage / script: {median(stage) / median(rounds.script):.2f}",
        f"- start-up of the verb: {median([run.verb_seconds - run.seconds for run in rounds.stage]):.1f} s (loading "
        "and hashing the encoders, the contract, the manifest and the card; the imports of Python were done before)",
        f"- where the time went: `{middle.line}`",
        "",
        table(("decoding", "images/s", "per core", "of Pillow's", "per core-second of CPU"), _decode_rows(rounds)),
        "",
        "- stage without encoders / Pillow in one thread, the other cores idle, per core: "
        f"{verdict(rounds.decode_of_pillow, DECODE_TARGET)}",
        "- stage without encoders / Pillow with every core at it, per core: "
        f"{verdict(rounds.decode_of_busy_pillow, DECODE_TARGET)}",
        "",
    ]
    return "\n".join(lines)


def _encode_rows(rounds: Rounds) -> list[list[str]]:
    limit = median(rounds.limit)
    verb = [run.images / run.verb_seconds for run in rounds.stage]
    rows: list[tuple[str, list[float]]] = [
        ("both models alone, tensors on the device", rounds.models),
        ("limit: bare encoders, batches in memory", rounds.limit),
        ("stage: read, decode, encode, write", [run.per_second for run in rounds.stage]),
        ("the whole verb, start-up included", verb),
        ("script: one process", rounds.script),
    ]
    if rounds.script_workers:
        rows.append((f"script with {rounds.preset.script_workers} DataLoader workers", rounds.script_workers))
    return [[name, figure(median(values)), spread(values), f"{median(values) / limit:.2f}"] for name, values in rows]


def _shared_cores(rounds: Rounds) -> list[str]:
    """A line about the rate that is possible on a CPU, where decoding and encoding share the cores."""
    if rounds.device.type != "cpu":
        return []
    decoding = median([rate.per_second for rate in rounds.decoders])
    possible = 1 / (1 / median(rounds.limit) + 1 / decoding)
    stage = median([run.per_second for run in rounds.stage])
    return [
        f"- the same cores decode: limit and decoding workers, one after the other, would make {figure(possible)} "
        f"images/s; the stage reaches {stage / possible:.2f} of that"
    ]


def _decode_rows(rounds: Rounds) -> list[list[str]]:
    pillow = _per_core(rounds.pillow)
    rows = {
        "Pillow, one thread": rounds.pillow,
        "Pillow, a process for each core": rounds.pillow_on_all_cores,
        "decoding workers, samples in memory": rounds.decoders,
        "stage without encoders: read, decode, write": rounds.idle,
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
