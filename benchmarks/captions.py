"""What several captions of an image cost beside one: bytes of a record, rate of the stream, and rate of training.

.venv/bin/python -m benchmarks.captions [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, table
from benchmarks.streaming.latents import Latents, write_cache
from pipeline import train
from pipeline.config import (
    DataConfig,
    DeepSpeedConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    TextTask,
    TrackingConfig,
    TrainConfig,
)
from pipeline.data.format.manifest import load_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.distributed.exits import guarded
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import parse_rows

EPILOG = """\
keys: captions=5 records=4096 side=32 batch=64 samples=2048 (trained in a round) channels=32 rounds=5

Both caches hold the same random latents of side x side positions and token ids of 77 tokens, one of them of one caption
and the other of several. In each round, in turns, a new stream reads every record of each once, and a new run trains on
each: a small UNet, so that the stream's part of a step is larger than it ever is in earnest. The rate of training is
that of the rows of metrics, without the first; its CPU time is that of the whole run, its start included.
"""
KINDS = ("one", "several")
Rate = tuple[float, float]
"""Samples/s, and milliseconds of CPU a sample of all threads."""
WHAT = ("stream", "training")


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    captions: int = 5
    records: int = 4096
    side: int = 32
    batch: int = 64
    samples: int = 2048
    channels: int = 32
    rounds: int = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.captions",
        description="What several captions of an image cost beside one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the table to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.captions", *options.overrides])
    return guarded("benchmarks.captions", lambda: run(changed(Plan(), options.overrides), command, write=options.write))


def run(plan: Plan, command: str, *, write: bool) -> int:
    """Measure and print."""
    import torch

    facts = [f"# {command}", "", *machine(torch.device("cpu"), 1)]
    rates: dict[tuple[str, str], list[Rate]] = {(what, kind): [] for what in WHAT for kind in KINDS}
    sizes = {}
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as name:
        folder = Path(name)
        one = Latents(name="one", side=plan.side, text="tokens", samples=plan.records)
        for kind, preset in zip(KINDS, (one, replace(one, captions=plan.captions)), strict=True):
            manifest = write_cache(preset, open_storage(str(folder / kind)))
            sizes[kind] = sum(shard.bytes for shard in manifest.shards) / manifest.samples
        for turn in range(plan.rounds):
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                rates["stream", kind].append(stream_rate(plan, folder / kind))
                rates["training", kind].append(train_rate(plan, folder / kind, folder / f"run-{kind}-{turn}"))
    ids = 4 * 77 * (plan.captions - 1)
    middle = {key: [median([rate[i] for rate in found]) for i in range(2)] for key, found in rates.items()}
    rows = [
        [kind, f"{sizes[kind]:,.0f}", *(figure(value) for what in WHAT for value in middle[what, kind])]
        for kind in KINDS
    ]
    ratios = [
        f"{several / one:.3f}"
        for what in WHAT
        for one, several in zip(*(middle[what, kind] for kind in KINDS), strict=True)
    ]
    rows.append(["several / one", f"{sizes['several'] / sizes['one']:.3f}", *ratios])
    head = [
        "captions",
        "bytes a record",
        *(name for what in WHAT for name in (f"{what}, samples/s", "CPU ms a sample")),
    ]
    more = f"{sizes['several'] - sizes['one']:,.0f} more bytes a record, of which {ids:,} are ids of further captions"
    text = "\n".join([*facts, "", table(head, rows), "", more]) + "\n"
    print(text)
    if write:
        path = keep(f"captions-{plan.captions}-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def stream_rate(plan: Plan, cache: Path) -> Rate:
    """The rate of a new stream over one epoch."""
    storage = open_storage(str(cache))
    dataset = dataset_of(storage, load_manifest(storage))
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    members = ("moments", "tokens")
    with Stream(dataset, dataset.order(0, plan.batch), batch=plan.batch, members=members) as stream:
        for _ in range(plan.records // plan.batch):
            count += len(next(stream).tensors["tokens"])
    return count / (time.perf_counter() - began), 1000 * (time.process_time() - cpu) / count


def train_rate(plan: Plan, cache: Path, run: Path) -> Rate:
    """The rate of a new run, over all rows of metrics but the first, and its CPU time with its start."""
    config = TrainConfig(
        run=str(run),
        data=DataConfig(train=str(cache), workers=1),
        model=ModelConfig(
            channels=plan.channels, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, context_width=32
        ),
        task=TextTask(encoder="transformer", depth=1, heads=2, head_width=16),
        deepspeed=DeepSpeedConfig(engine="torch"),
        optim=OptimConfig(batch=plan.batch, warmup=0),
        eval=EvalConfig(loss_images=0),
        tracking=TrackingConfig(wandb="off", every=plan.batch * max(plan.samples // plan.batch // 8, 1)),
        samples=plan.samples,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )
    cpu = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        status = train.main(config)
    cpu = time.process_time() - cpu
    assert status == 0, "training failed"
    found = [row["images_per_s"] for row in parse_rows((run / "metrics.jsonl").read_bytes()) if row["kind"] == "train"]
    return len(found[1:]) / sum(1 / rate for rate in found[1:]), 1000 * cpu / plan.samples


if __name__ == "__main__":
    raise SystemExit(main())
