"""device.py: batches arrive on the device as they were collated, ahead of their use and without waiting for the
host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from made.cache import make_cache
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.storage.urls import open_storage


def batches(folder: Path, device: torch.device, count: int) -> list[dict[str, torch.Tensor]]:
    manifest = make_cache(str(folder), [16] * 6)
    dataset = dataset_of(open_storage(str(folder)), manifest)
    with Stream(dataset, dataset.order(1, 8), batch=8, device=device, prefetch=3) as stream:
        return [next(stream).tensors for _ in range(count)]


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_the_cpu(tmp_path: Path) -> None:
    """Many batches, because memory could be reused while a copy from it is still running."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    there = batches(tmp_path / "a", torch.device("cuda"), 60)
    here = batches(tmp_path / "b", torch.device("cpu"), 60)
    for one, other in zip(there, here, strict=True):
        for name, tensor in one.items():
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), other[name])


def test_batches_on_a_cpu_keep_their_values_for_as_long_as_they_are_held(tmp_path: Path) -> None:
    held = batches(tmp_path / "a", torch.device("cpu"), 60)
    with_copies = []
    manifest = make_cache(str(tmp_path / "b"), [16] * 6)
    dataset = dataset_of(open_storage(str(tmp_path / "b")), manifest)
    with Stream(dataset, dataset.order(1, 8), batch=8) as stream:
        for _ in range(60):
            with_copies.append({name: tensor.clone() for name, tensor in next(stream).tensors.items()})
    for one, other in zip(held, with_copies, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
