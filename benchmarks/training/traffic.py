"""Counts what a rank sends in PyTorch's collectives, and says what theory has it send."""

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
"""The argument of each that is the whole tensor, or its pieces."""


def _whole(value: Tensor | list[Tensor]) -> int:
    """Bytes."""
    return sum(piece.numel() * piece.element_size() for piece in ([value] if isinstance(value, Tensor) else value))


@contextmanager
def counting(ranks: int) -> Iterator[Counter[str]]:
    """Inside, every collective is counted: bytes that this rank sends, by name. DeepSpeed takes hold of the functions
    when it is first used, so all engines of a process are to be made inside."""
    sent: Counter[str] = Counter()
    before = {name: getattr(dist, name) for name in RING}
    inside: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(call)

        def counting(*arguments: Any, **options: Any) -> Any:
            if not inside:  # some are made of others
                whole = _whole(signature.bind(*arguments, **options).arguments[WHOLE[name]])
                sent[name] += round(RING[name] * whole * (ranks - 1) / ranks)
            inside.append(name)
            try:
                return call(*arguments, **options)
            finally:
                inside.pop()

        return counting

    for name, call in before.items():
        setattr(dist, name, counted(name, call))
    try:
        yield sent
    finally:
        for name, call in before.items():
            setattr(dist, name, call)
