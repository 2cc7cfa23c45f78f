"""How fast `latentmill encode` reads a folder of small files, against tars of the same samples on the same disk.

.venv/bin/python -m benchmarks.folders [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.encoding.presets import changed
from pipeline.distributed.exits import guarded

EPILOG = """\
keys: samples=10000 (two files each: 20,000 small files) side=64 unit_size=1000 rounds=3 workers=0 (cores)
encoders=none (zeros of the right shapes, so that reading and decoding are all there is) or demo; folder= (where the
files are kept and found again)
It prints samples/s of `encode` from tars and from the folder, by turns, their ratio, and the seconds that listing the
folder takes.
"""
WANTED = 0.9
"""Of the rate from tars, at the least."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    samples: int = 10_000
    side: int = 64
    unit_size: int = 1000
    rounds: int = 3
    workers: int = 0
    encoders: Literal["none", "demo"] = "none"
    folder: str = ""


@dataclass(frozen=True)
class Measured:
    """Samples/s of each round, and seconds of listing."""

    tars: list[float]
    folder: list[float]
    listing: float

    @property
    def ratio(self) -> float:
        """Of the medians."""
        from benchmarks.machine import median

        return median(self.folder) / median(self.tars)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.folders",
        description="How fast `latentmill encode` reads a folder of small files, against tars of the same samples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the table to benchmarks/results/")
    options = parser.parse_intermixed_args(command_line)
    shown = [override for override in options.overrides if not override.startswith("folder=")]
    command = " ".join(["python -m benchmarks.folders", *shown])
    return guarded("benchmarks.folders", lambda: run(options.overrides, command, write=options.write))


def run(overrides: Sequence[str], command: str, *, write: bool) -> int:
    """Measure and print."""
    import torch

    from benchmarks.machine import device_slug, keep

    settings = changed(Settings(), overrides)
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as scratch:
        measured = measure(settings, Path(scratch))
    text = told(settings, measured, command)
    print(text)
    if write:
        keep(f"folders-{device_slug(torch.device('cpu'))}", text)
    return 0


def write_samples(settings: Settings, place: Path) -> tuple[Path, str]:
    """A folder of NNNNNNNNN.jpg and NNNNNNNNN.txt, and the pattern of tars of the same, unit by unit."""
    from benchmarks.encoding.encode_memory import write_small
    from pipeline.config import LimitsConfig
    from pipeline.storage.local import LocalStorage
    from preprocess.source.shard import SourceShard

    pattern = write_small(place, settings.samples, settings.unit_size)
    photos = place / f"photos-{settings.samples}"
    if not (place / f"complete-{settings.samples}").exists():
        photos.mkdir(parents=True, exist_ok=True)
        for tar in sorted((place / f"small-{settings.samples}-{settings.unit_size}").glob("*.tar")):
            with SourceShard(LocalStorage(tar.parent), tar.name, LimitsConfig()) as shard:
                for sample in shard.samples():
                    for suffix, data in sample.members.items():
                        (photos / f"{sample.key}.{suffix}").write_bytes(data)
        (place / f"complete-{settings.samples}").touch()
    return photos, pattern


def measure(settings: Settings, scratch: Path) -> Measured:
    """Encode the tars and the folder by turns, each into a fresh destination."""
    import time
    from unittest import mock

    from benchmarks.encoding.encode_verb import IdleEncoder, ReadyDecoders, run_verb
    from benchmarks.encoding.encode_verb import scratch as fresh
    from pipeline.config import EncodeConfig, LaunchConfig
    from pipeline.distributed.place import cores
    from preprocess import encode
    from preprocess.units.given import Cut, look

    photos, pattern = write_samples(settings, Path(settings.folder).expanduser() if settings.folder else scratch)
    started = time.perf_counter()
    look(str(photos), Cut(settings.unit_size)).units()
    listing = time.perf_counter() - started
    rates: dict[str, list[float]] = {"tars": [], "folder": []}
    encoder = IdleEncoder if settings.encoders == "none" else encode.Encoder
    sources = {"tars": pattern, "folder": str(photos)}
    for number in range(settings.rounds):
        for name in ("tars", "folder") if number % 2 == 0 else ("folder", "tars"):
            with fresh(scratch / f"cache-{name}") as dest:
                config = EncodeConfig(
                    source=sources[name],
                    dest=str(dest),
                    resolution=(settings.side,),
                    unit_size=settings.unit_size,
                    workers=settings.workers or cores(),
                    max_rejects=0.0,
                    launch=LaunchConfig(threads=cores()),
                    device="cpu",
                )
                with mock.patch.multiple(encode, Encoder=encoder, Decoders=ReadyDecoders):
                    rates[name].append(run_verb(config).per_second)
    return Measured(rates["tars"], rates["folder"], listing)


def told(settings: Settings, measured: Measured, command: str) -> str:
    """A page of Markdown."""
    import torch

    from benchmarks.machine import figure, machine, median, spread, table
    from pipeline.distributed.place import cores

    rows = [
        [name, figure(median(rates)), spread(rates)]
        for name, rates in (("tars", measured.tars), ("folder", measured.folder))
    ]
    verdict = "yes" if measured.ratio >= WANTED else "NO"
    return "\n".join(
        [
            "# encode from a folder of small files",
            "",
            f"- command: `{command}`",
            *machine(torch.device("cpu"), cores()),
            f"- {settings.samples:,} JPEGs of 64x64 with a text each; tars and units of {settings.unit_size:,}; "
            f"encoders: {settings.encoders}",
            "",
            table(("source", "samples/s", "lowest to highest"), rows),
            "",
            f"- folder / tars: {measured.ratio:.3f} (at least {WANTED}: {verdict})",
            f"- listing the folder: {measured.listing:.2f} s, once per process",
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
