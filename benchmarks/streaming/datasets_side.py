"""The side of Hugging Face's datasets of the benchmark of the stream, in its own Python environment:

    python -m venv datasets && datasets/bin/pip install datasets s3fs torch psutil
    datasets/bin/python -m benchmarks.streaming.datasets_side JSON

Imports nothing of latentmill. {"do": "write", "tars": [...], "dest": folder} makes a Parquet file of each tar;
{"do": "read", "local": folder, "remote": URL or null, ...} times `load_dataset(..., streaming=True)` in a DataLoader.
Arrays are columns of bytes: its own columns of arrays are nested lists in Parquet, with levels to decode for each
value.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader

from benchmarks.streaming.tars import samples_of
from benchmarks.streaming.timing import BATCH, timed

GROUP = 100
"""Rows of a row group, as it writes datasets of images."""
BUFFER = 1000
"""Samples among which it shuffles."""


def write(tars: list[str], dest: str) -> dict[str, float]:
    """Samples of cached tars -> a Parquet file for each, uncompressed. Returns their number."""
    Path(dest).mkdir(parents=True)
    number = 0
    for tar in tars:
        rows = [
            {name: json.dumps(v) if name == "json" else v.tobytes() for name, v in sample.items()}
            for sample in samples_of(tar)
        ]
        name = f"{dest}/{Path(tar).stem}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), name, row_group_size=GROUP, compression="none", use_dictionary=False)
        number += len(rows)
    return {"samples": number}


def read(
    local: str, remote: str | None, workers: int, warm: int, count: int, members: dict[str, tuple[str, list[int]]]
) -> dict[str, float]:
    """What `timed` gives. members: dtype and shape of each array by its name."""
    began = time.perf_counter()
    options = {"client_kwargs": {"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]}} if remote else None
    files = f"{remote or local}/*.parquet"
    rows: Any = load_dataset("parquet", data_files=files, split="train", streaming=True, storage_options=options)

    def tensors(batch: list[dict[str, Any]]) -> dict[str, Any]:
        arrays = {
            name: np.stack([np.frombuffer(row[name], dtype).reshape(shape) for row in batch])
            for name, (dtype, shape) in members.items()
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
            "json": [row["json"] for row in batch]
        }

    shuffled = rows.shuffle(seed=0, buffer_size=BUFFER)
    loader: Any = DataLoader(shuffled, batch_size=BATCH, num_workers=workers, collate_fn=tensors)

    def batches() -> Iterator[int]:
        while True:
            for batch in loader:
                yield len(batch["json"])

    return timed(batches(), warm, count, began)


DO: dict[str, Callable[..., dict[str, float]]] = {"write": write, "read": read}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(DO[given.pop("do")](**given)))
