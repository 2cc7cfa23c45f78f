"""The benchmarks of the data plane: same samples on all sides, proof of what they say, and nothing given away."""

from __future__ import annotations

import ast
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import machine, order, stream
from benchmarks.order import World, part_of_epoch
from benchmarks.streaming import timing
from benchmarks.streaming.latents import LATENTS, samples, write_cache
from benchmarks.streaming.peers import PEERS
from benchmarks.streaming.tars import samples_of
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


def test_every_peer_is_given_the_same_samples_and_its_ratio_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = []

    def answered(command: list[str], environment: dict[str, str]) -> str:
        if command[1] == "-c":
            return "1.2.3"
        python, _, module, order = command
        asked.append((python, module.rpartition(".")[2], json.loads(order)))
        if asked[-1][2].get("do") == "write":
            Path(asked[-1][2]["dest"]).mkdir()
        rate = {"stream": 3000.0}.get(asked[-1][2].get("side", ""), 1000.0)
        taken = {"samples": rate, "seconds": 1.0, "cpu_s": 0.5, "first_s": 0.1, "peak_bytes": 1.0, "fetched": 1.0}
        return json.dumps(taken)

    monkeypatch.setattr(stream, "_output", answered)
    few = ["presets=small", "places=disk", "rounds=1", "workers=1,2", "samples=64", f"folder={tmp_path}"]
    assert stream.main([*few, *(f"{peer.name}=/python/of/{peer.name}" for peer in PEERS)]) == 0
    said = capsys.readouterr().out
    own = [given for _, module, given in asked if module == "stream_side" and given["side"] == "webdataset"]
    for peer in PEERS:
        orders = [
            given
            for python, module, given in asked
            if (python, module) == (f"/python/of/{peer.name}", f"{peer.name}_side")
        ]
        made, reads = orders[0], orders[1:]
        assert made["tars"] == own[0]["urls"]
        assert [given["do"] for given in orders] == ["write", *["read"] * len(own)]
        for given, beside in zip(reads, own, strict=True):
            assert [given[name] for name in ("workers", "warm", "count")] == [
                beside[name] for name in ("workers", "warm", "count")
            ]
            assert Path(given["local"]).is_dir() and given["remote"] is None
        assert f"stream / {peer.name}, each with the workers that suit it best: 3.00 (target >= 1.5: met)" in said
        assert f"{peer.package} 1.2.3" in said
    assert "/python/of" not in said and str(tmp_path) not in said
    asked.clear()
    assert stream.main(few) == 0
    assert {module for _, module, _ in asked} == {"stream_side"}


def test_the_sides_of_peers_import_nothing_of_latentmill_and_read_what_tars_hold(tmp_path: Path) -> None:
    folder = Path(timing.__file__).parent
    for name in ("timing", "tars", *(f"{peer.name}_side" for peer in PEERS)):
        tree = ast.parse((folder / f"{name}.py").read_text())
        froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names = {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
        ours = {one for one in froms | names if one.partition(".")[0] in ("pipeline", "preprocess", "benchmarks")}
        assert ours <= {"benchmarks.streaming.timing", "benchmarks.streaming.tars"}, name
    from dataclasses import replace

    preset = replace(LATENTS["small"], samples=3)
    write_cache(preset, open_storage(str(tmp_path)))
    expected = list(samples(preset, 0, 0, 3))
    for one, other in zip(samples_of(str(tmp_path / "000000.tar")), expected, strict=True):
        assert one.pop("json")["caption"] == other.meta["caption"]
        assert set(one) == set(other.members)
        assert all((one[name] == other.members[name]).all() for name in one)


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
