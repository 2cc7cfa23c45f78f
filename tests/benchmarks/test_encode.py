"""The benchmarks of encode measure the same work on both sides, say all that they promise, and give nothing away."""

from __future__ import annotations

import io
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import encode, gpu_encode, machine
from benchmarks.encoding.encode_memory import Watched
from benchmarks.encoding.encode_parts import Parts, read_script
from benchmarks.encoding.encode_verb import StageRun
from benchmarks.encoding.photos import photo, read_photos
from benchmarks.encoding.pillow import decode
from benchmarks.encoding.presets import PRESETS, MemoryPreset, changed
from pipeline.config import EncodersConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.storage.urls import open_storage
from preprocess.encoding.stage import Tally

SMALL = ["images=32", "distinct=16", "shard=16", "limit_images=32", "stage_images=32", "batch=8"]
SMALL += ["script_images=16", "threads=1", "workers=2", "rounds=1", "script_workers=2"]


def test_demo_prints_every_row_its_targets_and_the_machine_without_naming_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    assert encode.main(["demo", *SMALL, f"folder={tmp_path}", "--write"]) == 0
    said = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in said.splitlines() if "|" in line)}
    for row in (
        "both models alone, tensors on the device",
        "limit: bare encoders, batches in memory",
        "stage: read, decode, encode, write",
        "the whole verb, start-up included",
        "script: one process",
        "script with 2 DataLoader workers",
        "Pillow, one thread",
        "Pillow, a process for each core",
        "decoding workers, samples in memory",
        "stage without encoders: read, decode, write",
    ):
        assert float(rows[row][0].replace(",", "")) > 0, row
    for line in (
        "stage / limit: ",
        "stage / script: ",
        "Pillow in one thread",
        "encode: 32 images in",
        "CPU",
        "torch ",
    ):
        assert line in said
    assert "target >= 0.95" in said
    assert str(tmp_path) not in said
    assert socket.gethostname() not in said
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.startswith("encode-demo-")
    assert written.read_text() == said.removesuffix("\n")


def test_stage_script_and_limit_make_the_same_latents_and_states(tmp_path: Path) -> None:
    preset = replace(
        PRESETS["demo"], images=36, distinct=24, shard=12, limit_images=24, stage_images=24, script_images=24, batch=4
    )
    parts = Parts(replace(preset, workers=1, threads=1), tmp_path)
    parts.stage(tmp_path / "stage")
    parts.script(tmp_path / "script")
    assert parts.difference(tmp_path / "stage", tmp_path / "script") < 1e-3
    storage = open_storage(str(tmp_path / "stage"))
    records = list(first_records(storage, load_manifest(storage), 99))
    theirs = read_script(tmp_path / "script")
    assert len(records) == len(theirs) == 24
    for record in records:
        other = theirs[record.meta["key"]]
        for name in ("moments", "text"):
            assert other[name].dtype == np.float16
            np.testing.assert_allclose(record.members[name], other[name], atol=0.02, rtol=0.01)
    limit = np.concatenate([parts.encoder.encode(batch).images for batch in parts.batches])
    assert np.array_equal(limit, np.stack([record.members["moments"] for record in records]))


def test_memory_tells_the_peaks_of_each_tenth_and_whether_they_grew(capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main(["memory", "samples=400", "shard=100", "every=0.02", "workers=1"]) == 0
    said = capsys.readouterr().out
    assert "400 JPEGs of 64x64 in tars of 100" in said
    assert "encoders: replaced by zeros" in said
    assert "encode: 400 images in" in said
    rows = [line.split("|") for line in said.splitlines() if " s |" in line]
    assert len(rows) >= 5
    assert all(
        100 < float(process) < 20_000 and float(together) >= float(process) for *_, process, _, together, _ in rows
    )
    growing = [(float(second), 10_000_000 * second, 0) for second in range(101)]
    run = StageRun(0, 1.0, 1.0, 1.0, Tally(), "")
    watched = Watched(MemoryPreset(), run, growing, torch.device("cpu"))
    assert watched.growth_mb == pytest.approx(900)
    assert len(watched.tenths()) == 10


def test_without_a_gpu_the_gpu_benchmark_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_encode.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "sees no CUDA device" in said.err


def test_the_gpu_benchmark_keeps_a_table_for_each_preset_within_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with the demo encoders."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_encode, "SECONDS", 1)
    presets = [replace(changed(PRESETS["demo"], SMALL), name=name, rounds=3, script_workers=0) for name in "ab"]
    encoders = EncodersConfig()
    assert gpu_encode.measure_all(torch.device("cpu"), encoders, (64,), dict.fromkeys(presets, 1.0)) == 0
    kept = sorted(tmp_path.iterdir())
    assert [path.name[:9] for path in kept] == ["encode-a-", "encode-b-"]
    for path in kept:
        text = path.read_text()
        assert "rounds: 1, of 3 asked for" in text
        assert "bfloat16 against float32 moments, 64x64: relative error 0.0" in text
        assert "stage / limit" in text
    assert kept[0].read_text() in capsys.readouterr().out


def test_bfloat16_moments_are_compared_with_float32_ones() -> None:
    (error,) = gpu_encode.precision(EncodersConfig(), torch.device("cpu"), (64,)).values()
    assert 1e-5 < error < gpu_encode.MOST_ERROR


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["image=3"], "the keys are width, height,"),
        (["demo", "images=many"], "images is a number"),
        (["sd1-256", "device=tpu"], "choose one of auto, cpu, cuda"),
        (["memory", "encoders=sd1"], "choose one of none, demo"),
    ],
)
def test_an_unknown_key_or_value_is_named_with_what_there_is(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode.main(words) == 2
    said = capsys.readouterr().err
    assert words[-1] in said
    assert hint in said


def test_source_images_weigh_what_photographs_weigh_and_are_found_again(tmp_path: Path) -> None:
    from benchmarks.encoding.photos import write_photos

    sizes = {"width": 512, "height": 384, "distinct": 3, "images": 5, "shard": 4}
    paths = write_photos(tmp_path, **sizes)
    jpegs = read_photos(paths, 9)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar"]
    assert len(jpegs) == 5
    assert all(40_000 < len(data) < 100_000 for data in jpegs)
    assert jpegs[3] == jpegs[0] == photo(0, 512, 384) != jpegs[1]
    assert Image.open(io.BytesIO(jpegs[0])).size == (512, 384)
    decode(jpegs[:1], 64)
    before = paths[0].stat().st_mtime_ns
    assert write_photos(tmp_path, **sizes) == paths
    assert paths[0].stat().st_mtime_ns == before
