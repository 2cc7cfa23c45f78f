"""mosaicml-streaming's side of the benchmark of the stream, with a Python of its own, for its versions of others differ:

    python -m venv mosaic && mosaic/bin/pip install mosaicml-streaming
    mosaic/bin/python benchmarks/mosaic_side.py JSON

Imports nothing of latentmill. {"do": "write", "tars": [...], "dest": folder} puts the samples of tars into its own
format; {"do": "read", "local": folder, "remote": folder or URL or null, ...} times its documented loader.
"""

import io
import json
import resource
import sys
import tarfile
import time

import numpy as np
import psutil
import torch

if torch.version.cuda is None:  # a torchvision that was built for CUDA asks for two operators
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )

from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

BATCH = 64


def write(tars, dest, shard_bytes=1 << 26):
    """Samples of cached tars -> MDS shards of the size that its documentation takes. Returns their number."""
    writer, number = None, 0
    for tar in tars:
        sample = {}
        for member in tarfile.open(tar):
            key, _, name = member.name.partition(".")
            data = tar_file.read() if (tar_file := tarfile.TarFile.extractfile(_opened(tar), member)) else b""
            if sample and sample["key"] != key:
                writer, number = _add(writer, sample, dest, shard_bytes), number + 1
                sample = {}
            sample["key"] = key
            sample[name.removesuffix(".npy")] = np.load(io.BytesIO(data)) if name.endswith(".npy") else json.loads(data)
        writer, number = _add(writer, sample, dest, shard_bytes), number + 1
    writer.finish()
    return {"samples": number}


_tars = {}


def _opened(tar):
    return _tars.setdefault(tar, tarfile.open(tar))


def _add(writer, sample, dest, shard_bytes):
    sample = dict(sample)
    sample.pop("key")
    if writer is None:
        columns = {
            name: "json" if name == "json" else f"ndarray:{value.dtype}:{','.join(map(str, value.shape))}"
            for name, value in sample.items()
        }
        writer = MDSWriter(out=dest, columns=columns, size_limit=shard_bytes)
    writer.write(sample)
    return writer


class Tensors(StreamingDataset):
    """Its arrays are read-only; a copy makes tensors of them."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {name: torch.from_numpy(v.copy()) for name, v in sample.items() if name != "json"}


def read(local, remote, workers, warm, count, cache_limit=None):
    """Seconds for `count` samples after the first `warm`."""
    began = time.perf_counter()
    dataset = Tensors(
        local=local, remote=remote, shuffle=True, shuffle_seed=0, batch_size=BATCH, cache_limit=cache_limit
    )
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers)

    def batches():
        while True:
            for batch in loader:
                yield len(next(iter(batch.values())))

    batches = batches()
    seen = next(batches)
    first = time.perf_counter() - began
    while seen < warm:
        seen += next(batches)
    seen, cpu, began = 0, _cpu(), time.perf_counter()
    while seen < count:
        seen += next(batches)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"samples": seen, "seconds": seconds, "cpu_s": _cpu() - cpu, "first_s": first, "peak_bytes": peak}


def _cpu():
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps({"write": write, "read": read}[given.pop("do")](**given)))
