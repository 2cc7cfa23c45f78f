"""What cached pixels cost as arrays and as lossless PNGs: bytes a record, images/s of encode and of the stream, and the
stream's processor time.

.venv/bin/python -m benchmarks.pixels [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, table
from pipeline.config import EncodeConfig, LaunchConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.distributed.exits import guarded
from pipeline.storage.urls import open_storage
from preprocess import encode
from preprocess.shapes.shards import write_shards

EPILOG = """\
keys: source=SHARDS (else captioned shapes are drawn) resolution=64 images=4000 (drawn) flip=0 (1: store each picture a
second time, mirrored) batch=64 workers=1,2 rounds=3

Both kinds are encoded from the same shards. In each round a new stream reads each kind once, in this process: every
record is fetched from the page cache, hashed, and decoded if it is a PNG. Pixels of both are compared to the bit before
anything is timed.
"""
KINDS = ("array", "png")
Rate = tuple[float, float]
"""Images/s, and milliseconds of CPU an image."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    source: str = ""
    resolution: int = 64
    images: int = 4000
    flip: int = 0
    batch: int = 64
    workers: str = "1,2"
    rounds: int = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pixels",
        description="What cached pixels cost as arrays and as lossless PNGs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the table to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    shown = [override for override in options.overrides if not override.startswith("source=")]
    command = " ".join(["python -m benchmarks.pixels", *shown])
    return guarded("benchmarks.pixels", lambda: run(changed(Plan(), options.overrides), command, write=options.write))


def run(plan: Plan, command: str, *, write: bool) -> int:
    """Measure and print."""
    import torch

    facts = [f"# {command}", "", *machine(torch.device("cpu"), 1)]
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as name:
        folder = Path(name)
        source = plan.source
        if not source:
            write_shards(str(folder / "shapes"), plan.images, 1, "train", shard_size=max(plan.images // 4, 1))
            source = str(folder / "shapes" / "*.tar")
        rates = {kind: cached(plan, source, folder / kind, kind) for kind in KINDS}
        require_alike(plan, folder)
        numbers = list(map(int, plan.workers.split(",")))
        streamed: dict[tuple[str, int], list[Rate]] = {(kind, k): [] for k in numbers for kind in KINDS}
        for _ in range(plan.rounds):
            for kind, workers in streamed:
                streamed[kind, workers].append(stream_rate(plan, folder / kind, workers))
        rows = []
        for kind in KINDS:
            manifest = load_manifest(open_storage(str(folder / kind)))
            size = sum(shard.bytes for shard in manifest.shards) / manifest.samples
            found = [figure(value) for workers in numbers for value in middle(streamed[kind, workers])]
            rows.append([kind, f"{manifest.samples:,}", f"{size:,.0f}", figure(rates[kind]), *found])
        rows.append(ratios(rows, rates, streamed, numbers))
    head = [
        "pixels",
        "records",
        "bytes a record",
        "encode, images/s",
        *(name for k in numbers for name in (f"stream, workers={k}, images/s", "CPU ms an image")),
    ]
    text = "\n".join([*facts, "", table(head, rows)]) + "\n"
    print(text)
    if write:
        path = keep(f"pixels-{plan.resolution}-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def middle(rates: list[Rate]) -> tuple[float, float]:
    """Medians of images/s and of milliseconds of CPU an image."""
    return median([rate[0] for rate in rates]), median([rate[1] for rate in rates])


def ratios(
    rows: list[list[str]], rates: dict[str, float], streamed: dict[tuple[str, int], list[Rate]], numbers: list[int]
) -> list[str]:
    """A row of the PNGs' figures over those of the arrays."""
    array, png = (float(row[2].replace(",", "")) for row in rows)
    found = [
        png / array
        for k in numbers
        for png, array in zip(middle(streamed["png", k]), middle(streamed["array", k]), strict=True)
    ]
    return [
        "png / array",
        "",
        f"{png / array:.2f}",
        f"{rates['png'] / rates['array']:.2f}",
        *(f"{r:.2f}" for r in found),
    ]


def cached(plan: Plan, source: str, dest: Path, kind: str) -> float:
    """Encode one kind. Returns images/s, starting time included."""
    config = EncodeConfig(
        source=source,
        dest=str(dest),
        stored="pixels",
        pixels=kind,  # type: ignore[arg-type]
        resolution=(plan.resolution,),
        batch=plan.batch,
        flip=bool(plan.flip),
        launch=LaunchConfig(threads=1),
        device="cpu",
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        status = encode.main(config)
    assert status == 0, "encode failed"
    return load_manifest(open_storage(str(dest))).samples / (time.perf_counter() - began)


def open_stream(plan: Plan, folder: Path, workers: int) -> Stream:
    """The stream of a cache."""
    storage = open_storage(str(folder))
    dataset = dataset_of(storage, load_manifest(storage))
    return Stream(dataset, dataset.order(0, plan.batch), batch=plan.batch, members=("pixels",), workers=workers)


def require_alike(plan: Plan, folder: Path) -> None:
    """Assert that both kinds give the same pixels of the same records."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(open_stream(plan, folder / kind, 1)) for kind in KINDS]
        found = []
        for stream in streams:
            batches = [next(stream) for _ in range(4)]
            found.append({key: pixels for batch in batches for key, pixels in zip(batch.keys, batch.tensors["pixels"])})
        shared = found[0].keys() & found[1].keys()
        assert shared and all(bool((found[0][key] == found[1][key]).all()) for key in shared), "pixels differ"


def stream_rate(plan: Plan, folder: Path, workers: int) -> Rate:
    """Images/s of a new stream over one epoch, in which each record is read, hashed and decoded once, and milliseconds
    of CPU an image of all its threads."""
    began, cpu, images = time.perf_counter(), time.process_time(), 0
    with open_stream(plan, folder, workers) as stream:
        for _ in range(load_manifest(open_storage(str(folder))).samples // plan.batch):
            images += len(next(stream).tensors["pixels"])
    return images / (time.perf_counter() - began), 1000 * (time.process_time() - cpu) / images


if __name__ == "__main__":
    raise SystemExit(main())
