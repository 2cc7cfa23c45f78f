"""How a network's time follows from its layers: rates by kind and size of a layer, and what lies between layers.

A layer's rate depends on its kind, on its size, which is the geometric mean of the numbers that an output sums and of
the channels of its output, and on the positions that it is applied to. Rates are measured at a few sizes and taken
between them in proportion of their logarithms; beyond the largest and the smallest they stay as they are there.

What lies between layers (norms, activations, sums, copies) takes time in proportion to the numbers that layers keep for
the backward pass, which planning/memory.py counts, and each piece of a network takes some time to be started.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.config.values.bounds import Ge, Gt
from pipeline.planning.memory import BYTES, Precision, kept_bytes
from pipeline.planning.parts import KINDS, Cost, Kind, Layer

Pass = Literal["training", "forward"]
"""training: forward and backward. forward: prediction."""
NAMES = ("layers", "elements", "pieces")
"""What a pass over a network takes time for, in the order of Terms."""
FUSED = {"qkv": 3, "kv": 2, "up": 2}
"""Matrices in the rows of a weight, by the last part of its layer's name; Muon steps each by itself."""
ITERATIONS = 5  # of Newton and Schulz (training/engines/muon.py)


@dataclass(frozen=True, kw_only=True)
class LayerRate:
    """The measured rate of layers of one kind and size."""

    kind: Kind
    """Kind of operation."""
    size: Annotated[float, Gt(0)]
    """Geometric mean of the numbers that an output sums and of the channels of its output; of attention, the keys."""
    rows: Annotated[float, Gt(0)]
    """Positions of its output in the batch."""
    training: Annotated[float, Gt(0)]
    """FLOP/s of forward and backward pass together."""
    forward: Annotated[float, Gt(0)]
    """FLOP/s of a forward pass in float32 without gradients, as `sample` and evaluations run it."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds that a pass takes, per unit of each thing that it takes time for."""

    layers: Annotated[float, Ge(0)]
    """Seconds per second that its layers would take at the measured rates of layers alone."""
    elements: Annotated[float, Ge(0)]
    """Seconds per number that is kept for the backward pass."""
    pieces: Annotated[float, Ge(0)]
    """Seconds per piece of the network (planning/parts.py)."""


class Layers:
    """A table of rates of layers."""

    def __init__(self, rates: Iterable[LayerRate]) -> None:
        self._rates: dict[Kind, dict[float, dict[float, LayerRate]]] = {kind: {} for kind in KINDS}
        for rate in rates:
            self._rates[rate.kind].setdefault(rate.size, {})[rate.rows] = rate

    def rate(self, kind: Kind, size: float, rows: float, which: Pass) -> float:
        """FLOP/s of a layer. size, rows: as LayerRate has them; 0 = not known, for which the table's largest stand."""
        by_size = self._rates[kind] or next(rates for rates in self._rates.values() if rates)
        points = [
            (at, between([(own, getattr(rate, which)) for own, rate in sorted(by_rows.items())], rows or math.inf))
            for at, by_rows in sorted(by_size.items())
        ]
        return between(points, size or math.inf)

    def seconds(self, layer: Layer, which: Pass) -> float:
        """Time of a layer alone."""
        flops = layer.flops + (layer.backward_flops if which == "training" else 0)
        return flops / self.rate(layer.kind, size_of(layer), layer.rows, which) if flops else 0.0

    def amounts(self, cost: Cost, which: Pass, recomputed: Collection[str] = ()) -> tuple[float, float, float]:
        """How much of each of NAMES a pass over a network has. recomputed: names of blocks that the backward pass
        computes again."""
        layers = sum(self.seconds(layer, which) for part in cost.parts for layer in part.layers)
        again = [part for part in cost.parts if which == "training" and part.block and part.name in recomputed]
        layers += sum(self.seconds(layer, "training") / 3 for part in again for layer in part.layers[:-1])
        elements = sum(kept_bytes(cost, "fp32").values()) / BYTES["fp32"]
        pieces = sum(len(part.pieces) for part in (*cost.parts, *again))
        return layers, elements, float(pieces)

    def muon(self, cost: Cost, precision: Precision) -> float:
        """Seconds of the products that Muon makes of a network's matrices in one process, at the rates of linear
        layers. precision: of the products."""
        total = 0.0
        for part in cost.parts:
            for layer in part.layers:
                if part.block and layer.inputs and layer.parameters:
                    fused = FUSED.get(layer.name.rpartition(".")[2], 1)
                    rows, columns = sorted((layer.inputs, layer.outputs // fused))
                    total += (
                        fused * newton_schulz(rows, columns, precision) / self.rate("linear", rows, rows, "forward")
                    )
        return total


def size_of(layer: Layer) -> float:
    """The size by which a layer's rate is looked up; 0 where it is not said."""
    return float(layer.inputs) if layer.kind == "attention" else math.sqrt(layer.inputs * layer.outputs)


def newton_schulz(rows: int, columns: int, precision: Precision) -> float:
    """Operations that Muon takes for a matrix of so many rows, and at least as many columns: in float32 of wide ones on
    their small squares, as a CPU does (training/engines/muon.py)."""
    if precision == "fp32" and columns > 2 * rows:
        return 4.0 * rows**2 * columns + 34.0 * rows**3
    return float(ITERATIONS * (4 * rows**2 * columns + 2 * rows**3))


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at `at` of measured (place, value), in rising order of places, linear in logarithms; beyond the ends
    the value there."""
    below = [point for point in points if point[0] <= at]
    above = [point for point in points if point[0] >= at]
    if not below or not above:
        return (above[0] if above else below[-1])[1]
    (low, left), (high, right) = below[-1], above[0]
    if low == high:
        return left
    share = math.log(at / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(left) + share * math.log(right))


def pass_seconds(amounts: Sequence[float], terms: Terms) -> float:
    """Time of a pass."""
    return sum(amount * getattr(terms, name) for name, amount in zip(NAMES, amounts, strict=True))
