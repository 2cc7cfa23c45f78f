"""How fast the stream is, against webdataset, mosaicml-streaming, LitData, Hugging Face's datasets and bare reads.

.venv/bin/python -m benchmarks.stream [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, table, verdict
from benchmarks.streaming.latents import LATENTS, Latents, write_cache
from benchmarks.streaming.peers import PEERS, peer_sides, versions
from benchmarks.streaming.stream_side import MEMORY, WORLD
from benchmarks.streaming.timing import BATCH
from pipeline.data.format.manifest import MANIFEST, UNCOND, Manifest, commit_manifest, load_manifest
from pipeline.distributed.exits import guarded
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

EPILOG = """\
keys: presets=sd512,small places=disk,s3 rounds=3 workers=1,2 seconds=4 folder=FOLDER (for the caches; else a temporary
one) mosaic=PYTHON litdata=PYTHON datasets=PYTHON (each of an environment that has that loader, as
benchmarks/streaming/*_side.py say; without it that side is left out)

Rounds take turns: limit, stream, webdataset and the others, each in a process of its own and with each number of
workers (threads of the stream and of the limit, processes of the others). Every side is given the same samples, in
files of 64 MB; only the stream and the limit hash what they read. From a bucket each gives three quarters of the
samples and the clock runs from the start: what is read ahead of the first batch costs as much, and no sample comes
twice, which the copies on disk of mosaicml-streaming and LitData would serve.
"""
TARGETS = {"webdataset": 3.0, **{peer.name: 1.5 for peer in PEERS}, "limit": 0.85}
FIRST_BYTES = 256_000_000  # of a trial that tells how many samples fill the time
S3_SAMPLES = {"sd512": 16_384, "small": 98_304}  # of the cache in the bucket


@dataclass(frozen=True)
class Plan:
    """What to measure. seconds: approximate time of a side."""

    presets: str = "sd512,small"
    places: str = "disk,s3"
    rounds: int = 3
    workers: str = "1,2"
    seconds: float = 4.0
    samples: int = 0
    folder: str = ""
    mosaic: str = ""
    litdata: str = ""
    datasets: str = ""

    @property
    def pythons(self) -> dict[str, str]:
        """The Python of each peer by its name; "" for none."""
        return {peer.name: str(getattr(self, peer.name)) for peer in PEERS}


@dataclass
class Results:
    """Measurements by (side, workers)."""

    runs: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)

    def rate(self, side: str, workers: int) -> float:
        return median([run["samples"] / run["seconds"] for run in self.runs[side, workers]])

    def best(self, side: str) -> float:
        """The rate with the number of workers that suits the side best."""
        return max((self.rate(*key) for key in self.runs if key[0] == side), default=0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stream",
        description="How fast the stream is, against webdataset, three other loaders and the bytes alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    places = ("folder=", *(f"{peer.name}=" for peer in PEERS))
    shown_overrides = [override for override in options.overrides if not override.startswith(places)]
    command = " ".join(["python -m benchmarks.stream", *shown_overrides])
    return guarded("benchmarks.stream", lambda: run(changed(Plan(), options.overrides), command, write=options.write))


def run(plan: Plan, command: str, *, write: bool) -> int:
    """Measure and print."""
    import torch

    head = [
        f"# {command}",
        "",
        *machine(torch.device("cpu"), 1),
        *versions(plan.pythons, lambda said: _output(said, {})),
    ]
    parts = ["\n".join(head)]
    with ExitStack() as stack:
        folder = Path(plan.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="latentmill-benchmark-")))
        for place in plan.places.split(","):
            environment, root = served(place, folder, stack)
            for name in plan.presets.split(","):
                preset = LATENTS[name]
                if place == "s3":
                    preset = replace(preset, samples=S3_SAMPLES[name])
                if plan.samples:
                    few = min(preset.shard_bytes, preset.sample_bytes * plan.samples // 4)
                    preset = replace(preset, samples=plan.samples, shard_bytes=few)
                sides = prepared(preset, folder, place, root, environment, plan)
                fixed = preset.samples * 3 // 4 // BATCH * BATCH if place == "s3" else 0
                parts.append(report(preset, place, *measure(sides, plan, environment, preset.sample_bytes, fixed)))
                print(parts[-1], file=sys.stderr, flush=True)
    text = "\n\n".join(parts) + "\n"
    print(text)
    if write:
        path = keep(f"stream-{device_slug(torch.device('cpu'))}", text)
        _say(f"written to benchmarks/results/{path.name}")
    return 0


def has_memcached() -> bool:
    """Whether the S3 server can be given memcached, as it is deployed."""
    return shutil.which("memcached") is not None


def served(place: str, folder: Path, stack: ExitStack) -> tuple[dict[str, str], str]:
    """Environment and root of the URLs of a place: a folder, or a bucket of a real S3 server over loopback."""
    if place == "disk":
        return {}, str(folder)
    # The server of the tests, a real one. It is not imported as `tests.servers`, since installed packages may contain a
    # package `tests`.
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    swift = importlib.import_module("servers.swift")
    (folder / "swift").mkdir(parents=True)
    server = stack.enter_context(swift.Swift(folder / "swift", memcached=has_memcached()))
    os.environ.update(server.environment)
    from pipeline.storage.s3 import s3_client

    s3_client().create_bucket(Bucket="benchmark")
    return dict(server.environment), "s3://benchmark"


def prepared(
    preset: Latents, folder: Path, place: str, root: str, environment: dict[str, str], plan: Plan
) -> dict[str, Callable[[int, int], list[str]]]:
    """Side -> function (workers, samples) -> command. Data that the sides read is made unless it exists."""
    name = f"{preset.name}-{preset.samples}"
    local = open_storage(str(folder / name))
    if local.exists(MANIFEST):
        manifest = load_manifest(local)
    else:
        _say(f"making {preset.samples:,} samples of {preset.name}")
        manifest = write_cache(preset, local)
    tars = [str(local.local_path(shard.name)) for shard in manifest.shards]
    url, urls = str(folder / name), tars
    if place == "s3":
        url = f"{root}/{preset.name}"
        _say(f"uploading {preset.name}")
        urls = _upload(manifest, local, open_storage(url))

    def warm(count: int) -> int:
        """Samples before the clock starts. From a bucket none, since reading ahead of the first batch costs as much."""
        return count // 2 if place == "disk" else 0

    def own(side: str, workers: int, count: int, **options: Any) -> list[str]:
        order = {"side": side, "workers": workers, "warm": warm(count), "count": count, **options}
        return [sys.executable, "-m", "benchmarks.streaming.stream_side", json.dumps(order)]

    sides = {
        "limit": lambda workers, count: own("limit", workers, count, url=url),
        "stream": lambda workers, count: own("stream", workers, count, url=url),
        "webdataset": lambda workers, count: own("webdataset", workers, count, urls=urls),
    }
    bucket = root if place == "s3" else None
    return sides | peer_sides(preset, plan.pythons, folder, tars, bucket, warm, lambda said: _output(said, {}), _say)


def _upload(manifest: Manifest, source: Storage, dest: Storage) -> list[str]:
    """Copy a cache into a bucket and return URLs that webdataset reads."""
    from pipeline.storage.s3 import s3_client

    for shard in manifest.shards:
        for name in (shard.name, shard.index_name):
            dest.put(name, source.get(name))
    dest.put(UNCOND, source.get(UNCOND))
    commit_manifest(dest, manifest)
    bucket, _, prefix = dest.url.removeprefix("s3://").partition("/")
    signed = [
        s3_client().generate_presigned_url("get_object", {"Bucket": bucket, "Key": f"{prefix}/{shard.name}"})
        for shard in manifest.shards
    ]
    return [f"pipe:curl -s -f '{url}'" for url in signed]


def measure(
    sides: dict[str, Callable[[int, int], list[str]]],
    plan: Plan,
    environment: dict[str, str],
    sample_bytes: int,
    fixed: int,
) -> tuple[Results, Results]:
    """(results of each side, results of the stream's first batches at the start and in the middle of an epoch). fixed:
    samples of each side; 0 for as many as fill the time."""
    results, starts = Results(), Results()
    workers = [int(number_text) for number_text in plan.workers.split(",")]
    counts: dict[tuple[str, int], int] = {}
    first = max(FIRST_BYTES // sample_bytes // BATCH, 16) * BATCH  # more than threads read ahead
    for number in range(plan.rounds + 1):  # the first round tells how many samples fill the time, and warms caches
        if fixed and number == 0:
            continue
        for side, command in sides.items():
            for worker_count in workers:
                key = (side, worker_count)
                result = _measured(side, partial(command, worker_count, fixed or counts.get(key, first)), environment)
                rate = result["samples"] / result["seconds"]
                if number == 0:
                    counts[key] = max(int(rate * plan.seconds) // BATCH, 16) * BATCH
                else:
                    results.runs.setdefault(key, []).append(result)
                    _say(
                        f"{side} with {worker_count}: {figure(rate)} samples/s, "
                        f"the first batch after {result['first_s']:.1f} s"
                    )
    for _ in range(plan.rounds):
        for position, at in (("start", 0.0), ("middle", 0.5)):
            *program, last = sides["stream"](workers[0], BATCH)
            order = json.loads(last) | {"start": at, "warm": 0}
            result = json.loads(_output([*program, json.dumps(order)], environment))
            starts.runs.setdefault((position, 0), []).append(result)
    return results, starts


def report(preset: Latents, place: str, results: Results, starts: Results) -> str:
    """Tables and ratios of one preset at one place."""
    rows = []
    for (side, workers), runs in results.runs.items():
        rate = results.rate(side, workers)
        cpu = median([run["cpu_s"] / run["samples"] * 1e6 for run in runs])
        peak = median([run["peak_bytes"] for run in runs]) / 1e6
        spread = [run["samples"] / run["seconds"] for run in runs]
        rows.append(
            [
                f"{side}, {workers}",
                figure(rate),
                f"{figure(min(spread))} to {figure(max(spread))}",
                figure(rate * preset.sample_bytes / 1e6),
                figure(cpu),
                figure(peak),
            ]
        )
    beside = f" ({'with' if has_memcached() else 'without'} memcached)" if place == "s3" else ""
    head = ["side, workers", "samples/s", "lowest to highest", "MB/s", "CPU us a sample", "peak MB"]
    lines = [
        f"## {preset.name} ({preset.sample_bytes:,} bytes of arrays a sample) from {place}{beside}",
        "",
        table(head, rows),
        "",
    ]
    lines += [
        f"- stream / {side}, each with the workers that suit it best: {verdict(results.best('stream') / best, least)}"
        for side, least in TARGETS.items()
        if (best := results.best(side))
    ]
    fewest = min(workers for side, workers in results.runs if side == "stream")
    lines += [
        f"- stream / {side}, {fewest} worker each: "
        f"{verdict(results.rate('stream', fewest) / results.rate(side, fewest), least)}"
        for side, least in TARGETS.items()
        if (side, fewest) in results.runs
    ]
    fetched_ratios = [run["fetched"] for (side, _), runs in results.runs.items() if side == "stream" for run in runs]
    fetched = median(fetched_ratios)
    first = {position: median([run["first_s"] for run in starts.runs[position, 0]]) for position in ("start", "middle")}
    lines.append(
        f"- first batch: {first['start']:.2f} s at the start of an epoch, {first['middle']:.2f} s in its middle"
    )
    lines.append(
        f"- the stream is rank 0 of {WORLD}, with {BATCH} samples a step and memory for {MEMORY} of its windows;"
    )
    lines.append(f"  it fetched {fetched:.2f} samples for each that it gave")
    return "\n".join(lines)


def _measured(side: str, command: Callable[[], list[str]], environment: dict[str, str]) -> dict[str, float]:
    """Run a side and return its measurements."""
    tries = max((peer.tries for peer in PEERS if peer.name == side), default=1)
    for tries_left in reversed(range(tries if environment else 1)):
        try:
            result: dict[str, float] = json.loads(_output(command(), environment))
            return result
        except SystemExit as error:
            if not tries_left:
                raise
            _say(f"{side} failed, and is tried again: {str(error).strip().splitlines()[-1]}")
    raise AssertionError("unreachable")


def _output(command: list[str], environment: dict[str, str]) -> str:
    """The last line that a side prints. Raises SystemExit with its standard error when it fails."""
    threads = {"OMP_NUM_THREADS": "1", "S3_ENDPOINT_URL": environment.get("AWS_ENDPOINT_URL_S3", "")}
    threads |= {"AWS_ENDPOINT_URL": threads["S3_ENDPOINT_URL"]} if environment else {}
    done = subprocess.run(
        command, env=os.environ | environment | threads, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
