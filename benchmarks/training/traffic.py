"""Counts the bytes that a rank sends in PyTorch's collectives; the bytes that theory predicts."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Bytes that a rank of N sends for one collective over S bytes (of the whole tensor), by the ring algorithms, as a
# multiple of S (N - 1) / N.
RING = {
    "all_reduce": 2.0,
    "reduce": 1.0,
    "reduce_scatter_tensor": 1.0,
    "reduce_scatter": 1.0,
    "all_gather_into_tensor": 1.0,
    "all_gather": 1.0,
    "broadcast": 1.0,
}
THEORY = {0: 2.0, 1: 2.0, 2: 2.0, 3: 3.0}
"""Of ZeRO stages, in parameters' bytes times (N - 1) / N a step: one all-reduce of the gradients; one reduce-scatter of
the gradients and one all-gather of the weights; the same with the weights gathered twice (Rajbhandari et al. 2020,
section 7)."""


WHOLE = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "reduce_scatter_tensor": "input",
    "reduce_scatter": "input_list",
    "all_gather_into_tensor": "output_tensor",
    "all_gather": "tensor_list",
    "broadcast": "tensor",
}
"""The argument of each collective that is the whole tensor, or its pieces."""


def _whole(value: Tensor | list[Tensor]) -> int:
    """Size of the whole tensor in bytes."""
    return sum(piece.numel() * piece.element_size() for piece in ([value] if isinstance(value, Tensor) else value))


@contextmanager
def counting(ranks: int) -> Iterator[Counter[str]]:
    """Count the bytes that this rank sends in every collective inside the context, by name. DeepSpeed keeps references
    to the functions from its first use, so all engines of a process must be made inside."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in RING}
    active_calls: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(call)

        def counting(*arguments: Any, **options: Any) -> Any:
            if not active_calls:  # some collectives call others
                tensor_bytes = _whole(signature.bind(*arguments, **options).arguments[WHOLE[name]])
                sent[name] += round(RING[name] * tensor_bytes * (ranks - 1) / ranks)
            active_calls.append(name)
            try:
                return call(*arguments, **options)
            finally:
                active_calls.pop()

        return counting

    for name, call in originals.items():
        setattr(dist, name, counted(name, call))
    try:
        yield sent
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)
