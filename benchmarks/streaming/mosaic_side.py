"""mosaicml-streaming's side of the benchmark of the stream, in its own Python environment, since it needs other
versions:

    python -m venv mosaic && mosaic/bin/pip install mosaicml-streaming psutil
    mosaic/bin/python -m benchmarks.streaming.mosaic_side JSON

Imports nothing of latentmill. {"do": "write", "tars": [...], "dest": folder} puts the samples of tars into its own
format; {"do": "read", "local": folder, "remote": folder or URL or null, ...} times its documented loader.
"""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

if torch.version.cuda is None:  # a torchvision built for CUDA needs two operators
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )

from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

from benchmarks.streaming.tars import samples_of
from benchmarks.streaming.timing import BATCH, timed


def write(tars: list[str], dest: str, shard_bytes: int = 1 << 26) -> dict[str, float]:
    """Samples of cached tars -> MDS shards of the size that its documentation takes. Returns their number."""
    writer: Any = None
    number = 0
    for tar in tars:
        for sample in samples_of(tar):
            if writer is None:
                columns = {name: _encoding(value) for name, value in sample.items()}
                writer = MDSWriter(out=dest, columns=columns, size_limit=shard_bytes)
            writer.write(sample)
            number += 1
    writer.finish()
    return {"samples": number}


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
    """What `timed` gives."""
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

    return timed(batches(), warm, count, began)


DO: dict[str, Callable[..., dict[str, float]]] = {"write": write, "read": read}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(DO[given.pop("do")](**given)))
