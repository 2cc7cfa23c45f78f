"""What joined columns cost the stream, against the cache alone.

.venv/bin/python -m benchmarks.columns [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, spread, table, verdict
from benchmarks.streaming.latents import LATENTS, write_cache
from pipeline.data.format.contract import Member, TextFacts, canonical_json
from pipeline.data.format.manifest import UNCOND, Manifest, load_manifest
from pipeline.data.format.members import text_member
from pipeline.data.format.records import Record, npy_bytes, record_key
from pipeline.data.joined.columns import COLUMNS, Columns, ColumnsContract, ColumnShard, ColumnUnit, columns_bytes
from pipeline.distributed.exits import guarded
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from preprocess.encoding.writer import ShardWriter

EPILOG = """\
keys: preset=sd512 rounds=5 workers=2 samples=16384 batches=120 rate=0 folder=FOLDER

The same samples in the same order are read from the cache alone (its own text states), and from the cache with columns
(token ids of other captions in place of the states, and a score). Rounds take turns, each in a process of its own. The
first figure is what the stream gives when nothing else limits it, the second its CPU time, of all threads, which also
a busy machine tells; the third is what a trainer gets that takes `rate` samples/s (0 = a tenth of what the stream gives
alone, which is more than any GPU takes of SD-512).
"""
TARGET = 0.97
BATCH = 64


@dataclass(frozen=True)
class Plan:
    """What to measure. batches: that are timed in a round, after as many that are not."""

    preset: str = "sd512"
    rounds: int = 5
    workers: int = 2
    samples: int = 16_384
    batches: int = 120
    rate: float = 0.0
    folder: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.columns",
        description="What joined columns cost the stream, against the cache alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(side(**json.loads(options.side))))
        return 0
    return guarded("benchmarks.columns", lambda: run(changed(Plan(), options.keys), options.write))


def run(plan: Plan, write: bool) -> int:
    """Make the caches, take turns, and print the ratio. Returns 0 where the target is met, else 1."""
    head = machine(torch.device("cpu"), plan.workers)
    with tempfile.TemporaryDirectory(dir=plan.folder or None) as folder:
        cache, beside = f"{folder}/cache", f"{folder}/columns"
        storage = open_storage(cache)
        write_cache(replace(LATENTS[plan.preset], samples=plan.samples), storage)
        make_columns(open_storage(beside), load_manifest(storage))
        sides = {"cache alone": "", "with columns": beside}
        free, cpu = ({name: list[float]() for name in sides} for _ in range(2))
        for _ in range(plan.rounds):
            for name, url in sides.items():
                found = measure(cache, url, plan, 0.0)
                free[name].append(found["rate"])
                cpu[name].append(1e6 * found["cpu_s"])
        rate = plan.rate or 0.1 * median(free["cache alone"])
        paced = {name: list[float]() for name in sides}
        for _ in range(plan.rounds):
            for name, url in sides.items():
                paced[name].append(measure(cache, url, plan, rate)["rate"])
    rows = [
        [name, *(text for of in (free, cpu, paced) for text in (figure(median(of[name])), spread(of[name])))]
        for name in sides
    ]
    ratios = [median(of["with columns"]) / median(of["cache alone"]) for of in (free, cpu, paced)]
    lines = [
        "# Joined columns",
        "",
        *head,
        f"- {plan.preset}, {plan.samples:,} samples, batches of {BATCH}, {plan.workers} workers, {plan.rounds} rounds",
        "",
        table(["side", "samples/s", "spread", "CPU us", "spread", f"at {rate:,.0f} samples/s", "spread"], rows),
        "",
        f"- the stream by itself: {ratios[0]:.3f} of the rate without columns; CPU a sample: {ratios[1]:.3f}",
        f"- training, share of the rate without columns: {verdict(ratios[2], TARGET)}",
    ]
    print("\n".join(lines))
    if write:
        keep(f"columns-{device_slug(torch.device('cpu'))}", "\n".join(lines) + "\n")
    return 0 if ratios[2] >= TARGET else 1


def measure(cache: str, columns: str, plan: Plan, rate: float) -> dict[str, float]:
    """One side in a process of its own. rate: samples/s that a trainer takes; 0 = as many as come."""
    order = {"cache": cache, "columns": columns, "workers": plan.workers, "batches": plan.batches, "rate": rate}
    command = [sys.executable, "-m", "benchmarks.columns", "--side", json.dumps(order)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def side(cache: str, columns: str, workers: int, batches: int, rate: float) -> dict[str, float]:
    """Samples/s of a loop over `batches` batches, after as many that are not timed, and CPU seconds of a sample."""
    from pipeline.data.joined.opening import joined
    from pipeline.data.order.dataset import dataset_of
    from pipeline.data.reading.stream import Stream

    storage = open_storage(cache)
    dataset = dataset_of(storage, joined(storage, [columns] if columns else []))
    members = ("moments", "tokens", "column.score") if columns else ("moments", "text")
    with Stream(
        dataset, dataset.order(0, BATCH), batch=BATCH, members=members, workers=workers, memory_bytes=2 << 30
    ) as stream:
        for _ in range(batches):
            next(stream)
        began, cpu, busy = time.perf_counter(), time.process_time(), BATCH / rate if rate else 0.0
        for _ in range(batches):
            next(stream)
            if busy:
                time.sleep(busy)
        count = batches * BATCH
        return {"rate": count / (time.perf_counter() - began), "cpu_s": (time.process_time() - cpu) / count}


def make_columns(storage: Storage, manifest: Manifest) -> Columns:
    """Columns with random token ids and scores for each record of a cache."""
    text = TextFacts(storage="tokens", layer="last", length=77, width=768, pad=49407, eot=49407, vocabulary=49408)
    rng = np.random.default_rng(0)
    units, shards = [], []
    for entry in manifest.shards:
        tar = io.BytesIO()
        writer = ShardWriter(tar)
        for row in range(entry.samples):
            arrays = {
                "tokens": rng.integers(0, 49408, 77, dtype=np.int32),
                "column.score": np.array(rng.random(), dtype=np.float32),
            }
            meta = {"key": f"{entry.unit:05d}{row:05d}", "caption": f"caption {row} of shard {entry.unit}", "tokens": 9}
            writer.add(Record(record_key(entry.unit, row), arrays, meta))
        facts = writer.finish()
        index = canonical_json(facts)
        storage.put(entry.name, tar.getvalue())
        storage.put(entry.index_name, index)
        sizes = {"size": entry.size, "samples": entry.samples, "bytes": facts["bytes"], "unit": entry.unit}
        hashes = {"sha256": facts["sha256"], "index_sha256": hashlib.sha256(index).hexdigest(), "of": entry.sha256}
        shards.append(ColumnShard(name=entry.name, **sizes, **hashes))
        counts: dict[str, Any] = {"read": entry.samples, "unused": 0, "joined": entry.samples, "rejected": {}}
        units.append(ColumnUnit(unit=entry.unit, source=entry.name, source_sha256="0" * 64, source_bytes=1, **counts))
    contract = ColumnsContract(
        encoders={},
        text_sha256="0" * 64,
        caption_key="txt",
        text=text,
        members=(text_member(text), Member(name="column.score", shape=(), dtype="float32")),
        scores=("score",),
        limits={},
        batch=0,
        device="",
        threads=0,
        versions={},
    )
    uncond = npy_bytes(np.zeros((text.length, text.width), dtype=np.float16))
    storage.put(UNCOND, uncond)
    columns = Columns(
        dataset=manifest.digest,
        version=manifest.version,
        contract=contract,
        uncond_sha256=hashlib.sha256(uncond).hexdigest(),
        units=tuple(units),
        shards=tuple(shards),
    )
    storage.put(columns.name, columns_bytes(columns))
    storage.put(COLUMNS, columns_bytes(columns))
    return columns


if __name__ == "__main__":
    raise SystemExit(main())
