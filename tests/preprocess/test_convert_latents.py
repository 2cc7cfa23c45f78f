"""`latentmill index dest=`: latents of other software become a cache with the same values, rounded to float16, and what
is unusual about them is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from made.encode import files
from made.latents import CAPTIONS, bits, conversion, half, latent, logvar, made, npy, npz, tensors, write_records
from pipeline.config import VerifyConfig
from pipeline.data.format.records import npy_bytes
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.storage.urls import open_storage
from preprocess import index, verify

COUNT = 5
LENGTH, WIDTH = 3, 8


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


MOMENTS = [np.concatenate([latent(row), logvar(row)]) for row in range(COUNT)]


def widened(array: np.ndarray) -> np.ndarray:
    """What is left of float32 values in bfloat16."""
    return (bits(array).astype(np.uint32) << 16).view(np.float32)


SOURCES: dict[str, tuple[list[dict[str, bytes]], dict[str, Any], list[np.ndarray]]] = {
    "one npy": ([{"moments.npy": npy(one)} for one in MOMENTS], {}, MOMENTS),
    "mean and log-variance": (
        [{"mean.npy": npy(latent(row)), "lv.npy": npy(logvar(row))} for row in range(COUNT)],
        {"moments_member": "mean.npy", "logvar_member": "lv.npy"},
        MOMENTS,
    ),
    "bfloat16 as uint16": (
        [{"latent.npy": npy(bits(one))} for one in MOMENTS],
        {"moments_member": "latent.npy:bfloat16"},
        [widened(one) for one in MOMENTS],
    ),
    "npz": (
        [{"npz": npz(mean=latent(row), lv=logvar(row))} for row in range(COUNT)],
        {"moments_member": "npz:mean", "logvar_member": "npz:lv"},
        MOMENTS,
    ),
    "compressed npz of a batch of one": (
        [{"z.npz": npz(True, m=one[None].astype(np.float64))} for one in MOMENTS],
        {"moments_member": "z.npz:m"},
        MOMENTS,
    ),
    "safetensors": (
        [{"safetensors": tensors(mean=latent(row), lv=half(logvar(row)))} for row in range(COUNT)],
        {"moments_member": "safetensors:mean", "logvar_member": "safetensors:lv"},
        MOMENTS,
    ),
    "in Fortran order": ([{"moments.npy": npy(np.asfortranarray(one))} for one in MOMENTS], {}, MOMENTS),
}


@pytest.mark.parametrize("name", SOURCES)
def test_arrays_of_every_kind_of_file_are_stored_as_they_are_to_float16(tmp_path: Path, name: str) -> None:
    records, changes, wanted = SOURCES[name]
    source = write_records(tmp_path / "theirs", records, tars=2)
    before = files(source)
    assert index.main(conversion(f"{source}/*.tar", tmp_path / "cache", **changes)) == 0
    assert files(source) == before
    manifest, found = made(tmp_path / "cache")
    assert [record.meta["key"] for record in found] == ["0_0", "0_1", "0_2", "1_0", "1_1"]
    for record, array in zip(found, wanted, strict=True):
        assert record.members["moments"].dtype == np.float16
        assert (record.members["moments"] == half(array)).all()
    assert [unit.source for unit in manifest.units] == ["0.tar", "1.tar"]
    assert not manifest.adopted and manifest.contract.converted is not None
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "cache"), source=f"{source}/*.tar")) == 0


def test_bfloat16_of_safetensors_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    moments = [torch.from_numpy(one).to(torch.bfloat16) for one in MOMENTS]
    records = [{"safetensors": save({"m": one})} for one in moments]
    write_records(tmp_path / "theirs", records)
    index.main(conversion(f"{tmp_path}/theirs/*.tar", tmp_path / "cache", moments_member="safetensors:m"))
    for record, one in zip(made(tmp_path / "cache")[1], moments, strict=True):
        assert (torch.from_numpy(record.members["moments"].copy()) == one.to(torch.float16)).all()


def test_states_captions_classes_and_boxes_are_converted_and_streamed(tmp_path: Path) -> None:
    boxes = np.array([[1, 0.25, 0.25, 0.5, 0.75], [-1] * 5], np.float32)
    states = [np.random.default_rng(row).standard_normal((1, LENGTH, WIDTH)).astype(np.float32) for row in range(COUNT)]
    records = [
        {
            "npz": npz(m=MOMENTS[row], t=states[row], c=np.array([row % 3]), b=boxes),
            "txt": f"  {CAPTIONS[row]}\n".encode(),
        }
        for row in range(COUNT)
    ]
    write_records(tmp_path / "theirs", records)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "uncond.npy").write_bytes(npy_bytes(np.zeros((LENGTH, WIDTH), np.float16)))
    changes = {"text_member": "npz:t", "caption_key": "txt", "class_member": "npz:c", "classes": 3}
    changes |= {"boxes_member": "npz:b", "box_classes": 2}
    assert index.main(conversion(f"{tmp_path}/theirs/*.tar", cache, moments_member="npz:m", **changes)) == 0
    manifest, found = made(cache)
    names = tuple(member.name for member in manifest.contract.members)
    dataset = dataset_of(open_storage(str(cache)), manifest)
    with Stream(dataset, dataset.order(3, 1), batch=1, members=names) as stream:
        seen = {}
        for _ in range(COUNT):
            batch = next(stream)
            seen[batch.captions[0]] = {name: tensor[0].numpy() for name, tensor in batch.tensors.items()}
    for row in range(COUNT):
        one = seen[CAPTIONS[row]]
        assert (one["moments"] == half(MOMENTS[row])).all() and (one["text"] == half(states[row][0])).all()
        assert int(one["cond.class"]) == row % 3 and (one["cond.boxes"] == half(boxes)).all()
    assert [record.meta["caption"] for record in found] == list(CAPTIONS)
    assert verify.main(VerifyConfig(dataset=str(cache), source=f"{tmp_path}/theirs/*.tar")) == 0


@pytest.mark.parametrize(
    ("factor", "changes", "words"),
    [
        (1, {}, ""),
        (0.18215, {}, "scaled already: then give scale=1 shift=0, or convert them with dest= and scaled=true"),
        (0.18215, {"scaled": True}, ""),
        (1, {"scaled": True}, "as of latents that were not scaled: then leave scaled= out"),
        (1, {"scale": 1.0}, "unscaled latents of Stable Diffusion 1 and 2 are like this"),
        (0.18215 / 0.13025, {"scale": 1.0}, "unscaled latents of SDXL are like this"),
        (100, {}, ": scale=0.0018"),
    ],
)
def test_scaled_latents_are_known_by_their_deviation_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, changes: dict[str, Any], words: str
) -> None:
    write_records(tmp_path / "theirs", [{"moments.npy": npy(latent(row) * np.float32(factor))} for row in range(COUNT)])
    index.main(conversion(f"{tmp_path}/theirs/*.tar", tmp_path / "cache", stored="latents", **changes))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (3 if words else 2)
    assert "converted from 1 tars" in said[0] and words in said[-1]
