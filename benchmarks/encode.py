"""How fast `latentmill encode` is, against its own encoders, a straight script and Pillow.

.venv/bin/python -m benchmarks.encode [PRESET] [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

# Decoding workers import this module when it runs, so nothing heavy is imported at its top.
from benchmarks.encoding.presets import PRESETS, MemoryPreset, Preset, changed
from pipeline.distributed.exits import guarded

ABOUT = """\
presets:
{presets}

In one run it prints, as medians over rounds of (limit, stage, script, decode):
  limit    images/s of the bare encoders over batches in memory
  stage    images/s of `latentmill encode`, into a fresh folder each time
  script   images/s of benchmarks/encoding/encode_script.py: the same work as one writes it from the documentation of
           diffusers, open_clip and webdataset, in one process
  decode   images/s per core of the stage without encoders, and of Pillow alone
`memory` encodes many small images, and prints the memory of the process and of its workers over time.

keys of the presets (of demo, with its values):
{keys}

keys of memory:
{memory_keys}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encode",
        description="How fast `latentmill encode` is, against its own encoders, a straight script and Pillow.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=ABOUT.format(
            presets="\n".join(f"  {name:<12} {_description(preset)}" for name, preset in PRESETS.items())
            + "\n  memory       200,000 small images, encoders replaced by zeros",
            keys=_keys(PRESETS["demo"]),
            memory_keys=_keys(MemoryPreset()),
        ),
    )
    parser.add_argument("preset", nargs="?", default="demo", choices=[*PRESETS, "memory"], metavar="PRESET")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    if command_line and "=" in command_line[0]:
        command_line = ["demo", *command_line]
    options = parser.parse_intermixed_args(command_line)
    shown_overrides = [
        override for override in options.overrides if not override.startswith("folder=")
    ]  # a result does not name a folder
    command = " ".join(["python -m benchmarks.encode", options.preset, *shown_overrides])
    return guarded("benchmarks.encode", lambda: run(options.preset, options.overrides, command, write=options.write))


def run(name: str, overrides: Sequence[str], command: str, *, write: bool) -> int:
    """Measure a preset and print the tables."""
    from benchmarks.machine import device_slug, keep

    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as folder:
        if name == "memory":
            from benchmarks.encoding.encode_memory import told, watch

            watched = watch(changed(MemoryPreset(), overrides), Path(folder))
            text, device = told(watched, command), watched.device
        else:
            from benchmarks.encoding.encode_rounds import measure, report

            rounds = measure(changed(PRESETS[name], overrides), Path(folder), _say)
            text, device = report(rounds, command), rounds.device
    print(text)
    if write:
        path = keep(f"encode-{name}-{device_slug(device)}", text)
        _say(f"written to benchmarks/results/{path.name}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _description(preset: Preset) -> str:
    """A preset in one line."""
    encoders_text = "demo encoders" if preset.encoders.vae == "demo" else f"SD 1's sizes, {preset.encoders.vae_dtype}"
    return (
        f"{encoders_text}; {preset.stage_images:,} JPEGs of {preset.width}x{preset.height}, resolution "
        f"{preset.resolution}, batch {preset.batch}"
    )


def _keys(preset: Preset | MemoryPreset) -> str:
    """A preset's fields as a paragraph of key=value."""
    pairs = [f"{key.name}={getattr(preset, key.name)}" for key in fields(preset) if key.name != "name"]
    pairs = [pair for pair in pairs if "(" not in pair]
    return textwrap.fill(" ".join(pairs), 112, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


if __name__ == "__main__":
    raise SystemExit(main())
