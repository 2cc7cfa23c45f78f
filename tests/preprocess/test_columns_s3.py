"""Columns in a bucket: of a cache in a bucket, from a source in a bucket, with the bytes that a folder gets."""

from __future__ import annotations

from pathlib import Path

from made.encode import files
from made.joining import COUNT, _tower, caption_of, make_cache, numbers_of, write_lines  # noqa: F401
from made.joining import run as run_here
from pipeline.config import ColumnsConfig, LaunchConfig
from pipeline.data.joined.opening import joined
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.storage.urls import open_storage
from preprocess import columns


def test_columns_in_a_bucket_have_the_bytes_of_those_in_a_folder(s3: str, tmp_path: Path) -> None:
    make_cache(tmp_path)
    for shard in range(2):
        write_lines(tmp_path / f"lines/{shard:05d}.jsonl", numbers_of(shard))
    run_here(tmp_path, "lines/*.jsonl")
    for folder in ("cache", "lines"):
        for key, data in files(tmp_path / folder).items():
            open_storage(f"{s3}/{folder}").put(key, data)
    config = ColumnsConfig(
        dataset=f"{s3}/cache",
        source=f"{s3}/lines/*.jsonl",
        dest=f"{s3}/columns",
        caption_key="json:long",
        batch=4,
        launch=LaunchConfig(threads=1),
        device="cpu",
    )
    assert columns.main(config) == 0
    dest = open_storage(config.dest)
    assert {info.key: dest.get(info.key) for info in dest.list("")} == files(tmp_path / "columns")
    cache = open_storage(config.dataset)
    dataset = dataset_of(cache, joined(cache, [config.dest]))
    with Stream(dataset, dataset.order(0, 4), batch=4, members=("pixels", "tokens")) as stream:
        seen = [caption for _ in range(3) for caption in next(stream).captions]
    assert sorted(seen) == sorted(caption_of(n) for n in range(2 * COUNT))
