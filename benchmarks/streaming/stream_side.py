"""One side of the benchmark of the stream, in a process of its own: `python -m benchmarks.streaming.stream_side JSON`.

Each side makes batches of tensors of the same samples and prints one line of JSON: samples, seconds, CPU seconds (of
its children too), seconds to the first batch, the memory that it took at most, and how that grew while it was timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.streaming.timing import BATCH, timed

WORLD = 8  # ranks that share a dataset
MEMORY = 1.5  # windows that the rank may hold


def main() -> int:
    """Run the side that the argument names."""
    order = json.loads(sys.argv[1])
    print(json.dumps(SIDES[order.pop("side")](**order)))
    return 0


def stream(url: str, workers: int, warm: int, count: int, start: float = 0.0) -> dict[str, float]:
    """latentmill's stream as the first of WORLD ranks. start: beginning in epochs."""
    from pipeline.data.format.manifest import load_manifest
    from pipeline.data.order.dataset import dataset_of
    from pipeline.data.reading.reader import Block, Reader
    from pipeline.data.reading.stream import Stream
    from pipeline.storage.urls import open_storage

    began = time.perf_counter()
    storage = open_storage(url)
    dataset = dataset_of(storage, load_manifest(storage))
    members = [member.name for member in dataset.contract.members]
    batch = BATCH * WORLD
    order = dataset.order(0, batch)
    fetched: list[int] = []
    read = Reader.read

    def counting(self: Reader, number: int) -> Block:
        block = read(self, number)
        fetched.append(len(block.rows))
        return block

    Reader.read = counting  # type: ignore[method-assign]
    with Stream(
        dataset,
        order,
        batch=batch,
        world=WORLD,
        members=members,
        workers=workers,
        memory_bytes=int(MEMORY * order.window_bytes(dataset.bytes, 0, BATCH)),
        start_n=int(start * dataset.parts[0].records) // batch * batch,
    ) as batches:

        def sizes() -> Iterator[int]:
            for batch in batches:
                if len(fetched_before) == 0 and sample_count[0] >= warm:
                    fetched_before.append(sum(fetched))
                sample_count[0] += len(batch.numbers)
                yield len(batch.numbers)

        sample_count, fetched_before = [0], list[int]()
        result = timed(sizes(), warm, count, began)
    return result | {"fetched": (sum(fetched) - fetched_before[0]) / result["samples"] if fetched_before else 0.0}


def webdataset(urls: list[str], workers: int, warm: int, count: int) -> dict[str, float]:
    """webdataset with the training loader of its documentation: npy and json decoded, arrays collated."""
    import webdataset as wds

    began = time.perf_counter()
    text = "tokens.npy" if "small" in urls[0] else "text.npy"
    samples = wds.WebDataset(urls, shardshuffle=100, seed=0, empty_check=False).shuffle(1000).decode()
    samples = samples.to_tuple("moments.npy", text, "json").batched(BATCH)
    loader = wds.WebLoader(samples, batch_size=None, num_workers=workers)

    def batches() -> Iterator[int]:
        while True:
            for moments, _, _ in loader:
                yield len(moments)

    return timed(batches(), warm, count, began)


def limit(url: str, workers: int, warm: int, count: int) -> dict[str, float]:
    """Read the bytes of whole blocks and hash each record, nothing else: local files into reused memory, objects by
    `workers` concurrent GETs."""
    from pipeline.data.format.manifest import load_manifest
    from pipeline.data.order.dataset import dataset_of
    from pipeline.storage.urls import open_storage

    began = time.perf_counter()
    storage = open_storage(url)
    dataset = dataset_of(storage, load_manifest(storage))
    entries = dataset.parts[0].manifest.shards
    records = [json.loads(storage.get(entry.index_name))["records"] for entry in entries]
    thread_local = threading.local()
    raw = _raw(url)

    def read(number: int) -> int:
        stretch = dataset[number]
        chosen = records[stretch.shard][stretch.first : stretch.first + stretch.count]
        start, end = chosen[0][0], chosen[-1][0] + chosen[-1][1]
        if not hasattr(thread_local, "memory"):
            thread_local.memory = memoryview(bytearray(64 << 20))
        view = raw(entries[stretch.shard].name, start, thread_local.memory[: end - start])
        for offset, size, digest in chosen:
            if hashlib.sha256(view[offset - start : offset - start + size]).hexdigest() != digest:
                raise SystemExit(f"{url}: a record is not what its index says")
        return len(chosen)

    def batches() -> Iterator[int]:
        while True:
            with ThreadPoolExecutor(workers) as pool:
                yield from pool.map(read, range(len(dataset)))

    return timed(batches(), warm, count, began)


def _raw(url: str) -> Callable[[str, int, memoryview], memoryview]:
    """A function (name, offset, memory to fill) -> the bytes, by the most direct calls."""
    if not url.startswith("s3://"):
        files: dict[str, int] = {}

        def from_file(name: str, offset: int, view: memoryview) -> memoryview:
            if name not in files:
                files[name] = os.open(os.path.join(url, name), os.O_RDONLY)
            done = 0
            while done < len(view):
                done += os.preadv(files[name], [view[done:]], offset + done)
            return view

        return from_file
    from pipeline.storage.s3 import s3_client

    bucket, _, prefix = url.removeprefix("s3://").partition("/")

    def from_bucket(name: str, offset: int, view: memoryview) -> memoryview:
        span = f"bytes={offset}-{offset + len(view) - 1}"
        return memoryview(s3_client().get_object(Bucket=bucket, Key=f"{prefix}/{name}", Range=span)["Body"].read())

    return from_bucket


SIDES: dict[str, Callable[..., dict[str, Any]]] = {"stream": stream, "webdataset": webdataset, "limit": limit}


if __name__ == "__main__":
    raise SystemExit(main())
