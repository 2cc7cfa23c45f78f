"""The benchmarks of the data plane: same samples on all sides, proof of what they say, and nothing given away."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from benchmarks import machine, order, stream
from benchmarks.order import World, part_of_epoch
from benchmarks.streaming.latents import LATENTS, samples, write_cache
from pipeline.data.reading.shards import first_records
from pipeline.storage.urls import open_storage

WORLD = ["samples=20000", "shards=60", "blocks=2", "ranks=16", "ranks_per_node=4", "batch=64", "processes=2"]


def test_the_order_benchmark_proves_each_sample_once_and_prints_its_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    assert order.main([*WORLD, "--write"]) == 0
    said = capsys.readouterr().out
    for part in ("each once", "to start one rank", "its memory", "for each sample", "of 60", "4 nodes"):
        assert part in said, part
    assert "NOT EACH ONCE" not in said
    assert socket.gethostname() not in said
    assert (tmp_path / f"order-{machine.device_slug(__import__('torch').device('cpu'))}.md").read_text() in said


def test_its_simulation_finds_a_record_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    small = World(samples=2000, shards=10, blocks=2, ranks=4, ranks_per_node=2, batch=64, processes=1)
    honest = World.order

    def repeating(world: World, seed: int = 0) -> object:
        made = honest(world, seed)
        locate = made.locate

        def twice(n: np.ndarray) -> object:
            return locate(np.where(n == 700, 30, n))

        monkeypatch.setattr(made, "locate", twice)
        return made

    monkeypatch.setattr(World, "order", repeating)
    with pytest.raises(SystemExit, match="twice"):
        part_of_epoch(small, 0, 20)


def test_ranks_that_do_not_divide_the_batch_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert order.main(["samples=2000", "shards=10", "ranks=7", "batch=64"]) == 1
    assert "ranks=7 must divide batch=64" in capsys.readouterr().err


@pytest.mark.parametrize("name", LATENTS)
def test_the_benchmarks_cache_holds_the_samples_that_it_says(name: str, tmp_path: Path) -> None:
    from dataclasses import replace

    preset = replace(LATENTS[name], samples=5, shard_bytes=2 * LATENTS[name].sample_bytes)
    storage = open_storage(str(tmp_path))
    manifest = write_cache(preset, storage)
    found = list(first_records(storage, manifest, 99))
    assert len(manifest.shards) == 2
    assert len(found) == 5
    expected = [*samples(preset, 0, 0, 2), *samples(preset, 1, 2, 5)]
    for one, other in zip(found, expected, strict=True):
        assert (one.key, one.meta) == (other.key, other.meta)
        for member, array in other.members.items():
            assert (one.members[member] == array).all()
            assert np.isfinite(array.astype(np.float64)).all()


@pytest.mark.long
def test_the_stream_benchmark_prints_every_side_and_its_targets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["presets=small", "places=disk", "rounds=1", "seconds=0.02", "workers=1", "samples=2048"]
    assert stream.main([*given, f"folder={tmp_path}"]) == 0
    said = capsys.readouterr().out
    for part in ("limit, 1", "stream, 1", "webdataset, 1", "stream / webdataset", "stream / limit", "first batch: "):
        assert part in said, part
    assert str(tmp_path) not in said
    assert socket.gethostname() not in said
