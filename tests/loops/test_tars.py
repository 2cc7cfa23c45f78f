"""as_webdataset: a cache's records in a pipeline of webdataset, verified and without those that are excluded."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from latentmill import as_webdataset
from made.cache import make_cache
from made.captioned import SEVERAL, make_captioned
from made.columns import make_columns
from made.forged_cache import forge_excluded
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.records import npy_bytes
from pipeline.data.reading.captions import of_one_caption
from pipeline.data.reading.shards import first_records
from pipeline.errors import ConfigError, DatasetError, ShardCorrupt
from pipeline.storage.urls import open_storage

SIZES = [7, 12, 5, 9]
EXCLUDED = [[0, 3], [1, 0], [1, 11], [2, 0], [2, 1], [2, 2], [2, 3], [2, 4]]
"""Rows of three shards; all of the third."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loops") / "cache"
    make_cache(str(folder), SIZES)
    forge_excluded(folder, npy_bytes(np.array(EXCLUDED, dtype=np.int32)), len(EXCLUDED))
    return folder


def keys(samples: Any) -> list[str]:
    return [sample["__key__"] for sample in samples]


def test_samples_are_what_webdataset_reads_from_the_tars_but_for_excluded_ones(cache: Path) -> None:
    mine = list(as_webdataset(str(cache)))
    tars = [str(path) for path in sorted(cache.glob("*.tar"))]
    excluded = {f"{shard:06d}_{row:06d}" for shard, row in EXCLUDED}
    theirs = [one for one in wds.WebDataset(tars, shardshuffle=False).decode() if one["__key__"] not in excluded]
    assert keys(mine) == keys(theirs)
    assert len(mine) == sum(SIZES) - len(EXCLUDED)
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == {"__key__", "__url__", "caption", "moments", "text", "cond.labels"}
        assert (one["__url__"], one["caption"]) == (other["__url__"], other["json"]["caption"])
        for name in ("moments", "text", "cond.labels"):
            assert one[name].dtype == other[f"{name}.npy"].dtype
            assert np.array_equal(one[name], other[f"{name}.npy"])


def test_stages_of_webdataset_go_on_from_it(cache: Path) -> None:
    pipeline = as_webdataset(str(cache), members=("moments",)).shuffle(10).to_tuple("moments", "caption").batched(4)
    moments, captions = next(iter(pipeline))
    assert (moments.shape, len(captions)) == ((4, 8, 2, 2), 4)
    assert len(list(pipeline)) == 7
    assert len(list(pipeline.with_epoch(nbatches=11))) == 11, "ranks that wait for each other count on it"


def test_ranks_and_workers_share_the_tars(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tars hold records that are not excluded."""
    whole = keys(as_webdataset(str(cache), members=()))
    assert sorted(keys(DataLoader(as_webdataset(str(cache)), batch_size=None, num_workers=2))) == sorted(whole)
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts.append(keys(as_webdataset(str(cache))))
    assert sorted(key for part in parts for key in part) == sorted(whole)
    assert all(parts)
    with pytest.raises(DatasetError, match=r"3 tars with records, and none is left for worker 0 of 1 of rank 3 of 4"):
        next(iter(as_webdataset(str(cache), rank=3, world=4)))


def test_a_seed_shuffles_tars_anew_in_each_epoch_and_is_the_same_everywhere(cache: Path) -> None:
    def epochs() -> list[list[str]]:
        pipeline = as_webdataset(str(cache), members=(), seed=5)
        return [keys(pipeline) for _ in range(6)]

    whole = keys(as_webdataset(str(cache), members=()))
    mine = epochs()
    assert mine == epochs()
    assert len({tuple(epoch) for epoch in mine}) > 1
    assert all(sorted(epoch) == sorted(whole) for epoch in mine)


@pytest.mark.parametrize("storage", ["full", "trimmed", "tokens"])
def test_of_several_captions_the_first_is_read(storage: Any, tmp_path: Path) -> None:
    text = dataclasses.replace(SEVERAL, storage=storage)
    manifest = make_captioned(str(tmp_path), text, [5, 4])
    parts = ("moments", "captions") if storage == "tokens" else ("moments", "captions", "text")
    records = first_records(open_storage(str(tmp_path)), manifest, 99, parts)
    for mine, theirs in zip(as_webdataset(str(tmp_path)), of_one_caption(records, text), strict=True):
        assert (mine["__key__"], mine["caption"]) == (theirs.key, theirs.meta["caption"])
        for name, array in theirs.members.items():
            assert np.array_equal(mine[name], array)
    lots = list(as_webdataset(tmp_path).batched(4, collation_fn=None))
    assert [len(samples) for samples in lots] == [4, 4, 1]


def test_a_pickled_pipeline_is_the_same(cache: Path) -> None:
    pipeline = as_webdataset(str(cache), members=("text",), seed=5)
    assert keys(pickle.loads(pickle.dumps(pipeline))) == keys(pipeline)


def test_columns_are_arrays_of_their_records(cache: Path, tmp_path: Path) -> None:
    make_columns(str(tmp_path), load_manifest(open_storage(str(cache))))
    samples = list(as_webdataset(cache, columns=[tmp_path]))
    assert keys(samples) == keys(as_webdataset(cache, members=()))
    for sample in samples:
        assert sample["column.extra"].tolist() == [int(part) for part in sample["__key__"].split("_")]


def test_a_bucket_needs_no_pipe(s3: str, cache: Path) -> None:
    from ranks.faulty_run import upload

    upload(str(cache), f"{s3}/cache")
    assert keys(as_webdataset(f"{s3}/cache", members=())) == keys(as_webdataset(str(cache), members=()))


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    make_cache(str(tmp_path), [4, 4])
    path = tmp_path / "000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardCorrupt, match=r"000001\.tar was read twice"):
        list(as_webdataset(str(tmp_path)))


def test_what_a_cache_does_not_hold_is_refused_as_it_is_opened(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokens: its arrays are moments, text, cond\.labels; name some"):
        as_webdataset(str(cache), members=("tokens",))
    with pytest.raises(DatasetError, match="nothing is there: encode it first"):
        as_webdataset(str(tmp_path))
    assert load_manifest(open_storage(str(cache))).excluded == len(EXCLUDED)
