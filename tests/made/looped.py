"""Batches of a dataset that a loop of one's own reads, and whether two lots of them are the same."""

from __future__ import annotations

import itertools
from typing import Any

import torch

BATCH, SEED, STEPS = 8, 7, 8


def first(dataset: Any, count: int = STEPS) -> list[dict[str, Any]]:
    return list(itertools.islice(dataset, count))


def require_same(batches: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Both hold the same arrays and text, to the bit."""
    assert [int(batch["seen"]) for batch in batches] == [int(batch["seen"]) for batch in others]
    for one, another in zip(batches, others, strict=True):
        assert one.keys() == another.keys()
        for name, value in one.items():
            same = torch.equal(value, another[name]) if isinstance(value, torch.Tensor) else value == another[name]
            assert same, name
