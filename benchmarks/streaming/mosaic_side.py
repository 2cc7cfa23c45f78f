"""mosaicml-streaming's side of the benchmark of the stream, in its own Python environment, since it needs other
versions:

    python -m venv mosaic && mosaic/bin/pip install mosaicml-streaming psutil
    mosaic/bin/python benchmarks/streaming/mosaic_side.py JSON

Imports nothing of latentmill. {"do": "write", "tars": [...], "dest": folder} puts the samples of tars into its own
format; {"do": "read", "local": folder, "remote": folder or URL or null, ...} times its documented loader.
"""

from __future__ import annotations

import atexit
import io
import json
import resource
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import torch

if torch.version.cuda is None:  # a torchvision built for CUDA needs two operators
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )

from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

BATCH = 64


def write(tars: list[str], dest: str, shard_bytes: int = 1 << 26) -> dict[str, float]:
    """Samples of cached tars -> MDS shards of the size that its documentation takes. Returns their number."""
    writer: Any = None
    number = 0
    for tar in tars:
        for sample in _samples(tar):
            if writer is None:
                columns = {name: _encoding(value) for name, value in sample.items()}
                writer = MDSWriter(out=dest, columns=columns, size_limit=shard_bytes)
            writer.write(sample)
            number += 1
    writer.finish()
    return {"samples": number}


def _samples(tar: str) -> Iterator[dict[str, Any]]:
    """Dicts of arrays and of the json, one for each key."""
    previous_key = None
    sample: dict[str, Any] = {}
    with tarfile.open(tar) as file:
        for member in file:
            key, _, name = member.name.partition(".")
            if previous_key not in (None, key):
                yield sample
                sample = {}
            previous_key, data = key, file.extractfile(member).read()  # type: ignore[union-attr]
            sample[name.removesuffix(".npy")] = np.load(io.BytesIO(data)) if name.endswith(".npy") else json.loads(data)
    yield sample


def _encoding(value: Any) -> str:
    """MDS' name of the value's type."""
    return "json" if isinstance(value, dict) else f"ndarray:{value.dtype}:{','.join(map(str, value.shape))}"


class Tensors(StreamingDataset):  # type: ignore[misc]
    """Samples as tensors. The dataset's arrays are read-only, so they are copied."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        return {name: torch.from_numpy(v.copy()) for name, v in sample.items() if name != "json"}


def read(
    local: str, remote: str | None, workers: int, warm: int, count: int, cache_limit: str | None = None
) -> dict[str, float]:
    """Seconds for `count` samples after the first `warm`; without any, the time to the first batch included."""
    if remote is not None:
        atexit.register(shutil.rmtree, local, ignore_errors=True)  # its downloads
    began = time.perf_counter()
    dataset = Tensors(
        local=local, remote=remote, shuffle=True, shuffle_seed=0, batch_size=BATCH, cache_limit=cache_limit
    )
    loader: Any = DataLoader(dataset, batch_size=BATCH, num_workers=workers)

    def batches() -> Iterator[int]:
        while True:
            for batch in loader:
                yield len(next(iter(batch.values())))

    loaded = batches()
    sample_count = next(loaded)
    first = time.perf_counter() - began
    while sample_count < warm:
        sample_count += next(loaded)
    cpu = 0.0
    if warm:
        sample_count, cpu, began = 0, _cpu(), time.perf_counter()
    while sample_count < count:
        sample_count += next(loaded)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"samples": sample_count, "seconds": seconds, "cpu_s": _cpu() - cpu, "first_s": first, "peak_bytes": peak}


def _cpu() -> float:
    this_process = psutil.Process()
    times = [process.cpu_times() for process in (this_process, *this_process.children(recursive=True))]
    ended = times[0].children_user + times[0].children_system
    return float(sum(process_times.user + process_times.system for process_times in times) + ended)


DO: dict[str, Callable[..., dict[str, float]]] = {"write": write, "read": read}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(DO[given.pop("do")](**given)))
