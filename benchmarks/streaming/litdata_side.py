"""LitData's side of the benchmark of the stream, in its own Python environment:

    python -m venv litdata && litdata/bin/pip install litdata psutil
    litdata/bin/python -m benchmarks.streaming.litdata_side JSON

Imports nothing of latentmill. {"do": "write", "tars": [...], "dest": folder} makes chunks of the samples of tars with
its `optimize`; {"do": "read", "local": folder, "remote": URL or null, ...} times its documented loader.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it would ask the network which version is the newest

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize
from litdata.streaming import downloader

from benchmarks.streaming.tars import samples_of
from benchmarks.streaming.timing import BATCH, timed

downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the store over loopback has no TLS, and it would refuse that


def tensors_of(tar: str) -> Iterator[dict[str, Any]]:
    """Samples as it reads them quickest: tensors, and the json as text."""
    for sample in samples_of(tar):
        yield {name: json.dumps(v) if name == "json" else torch.from_numpy(v) for name, v in sample.items()}


def write(tars: list[str], dest: str, shard_bytes: int = 1 << 26) -> dict[str, float]:
    """Samples of cached tars -> chunks of the size that its documentation takes. Returns their number."""
    optimize(fn=tensors_of, inputs=tars, output_dir=dest, num_workers=1, chunk_bytes=shard_bytes, verbose=False)
    return {"samples": len(StreamingDataset(dest))}


def read(local: str, remote: str | None, workers: int, warm: int, count: int) -> dict[str, float]:
    """What `timed` gives."""
    if remote is not None:
        atexit.register(shutil.rmtree, local, ignore_errors=True)  # its downloads
    began = time.perf_counter()
    place = {"input_dir": local} if remote is None else {"input_dir": remote, "cache_dir": local}
    dataset = StreamingDataset(**place, shuffle=True, seed=0, max_cache_size="100GB")
    loader: Any = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)

    def batches() -> Iterator[int]:
        while True:
            for batch in loader:
                yield len(next(iter(batch.values())))

    return timed(batches(), warm, count, began)


DO: dict[str, Callable[..., dict[str, float]]] = {"write": write, "read": read}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(DO[given.pop("do")](**given)))
