"""Whether what a record holds of conditions is what the facts say of it."""

from __future__ import annotations

import numpy as np

from pipeline.conditions.facts import BoxFacts
from pipeline.data.format.contract import Contract
from pipeline.data.format.records import Record
from pipeline.errors import ShardCorrupt


def check_values(record: Record, contract: Contract) -> None:
    """Raises ShardCorrupt for a class or a box that is none of the facts'. The record has the contract's arrays, in
    their shapes and dtypes."""
    classes, boxes = contract.conditions.classes, contract.conditions.boxes
    if classes is not None:
        number = int(record.members["cond.class"])
        if not 0 <= number < classes.count:
            raise ShardCorrupt(f"record {record.key}: its class is {number}, and classes are 0 to {classes.count - 1}")
    if boxes is not None and (problem := _wrong_box(record.members["cond.boxes"].astype(np.float64), boxes)):
        raise ShardCorrupt(f"record {record.key}: {problem}")


def _wrong_box(boxes_N5: np.ndarray, facts: BoxFacts) -> str:
    """What is wrong with the first wrong one of boxes (N, 5) float64; "" where all are right."""
    kinds, edges = boxes_N5[:, 0], boxes_N5[:, 1:]
    empty = (boxes_N5 == -1).all(axis=1)
    known = (kinds >= 0) & (kinds < facts.count) & (kinds == np.floor(kinds))
    inside = (
        (edges >= 0).all(axis=1) & (edges <= 1).all(axis=1) & (edges[:, 2:] >= edges[:, :2]).all(axis=1)
    )  # float16 rounds thin boxes
    wrong = np.flatnonzero(~empty & ~(known & inside))
    if not len(wrong):
        return ""
    row = int(wrong[0])
    if not known[row]:
        return (
            f"box {row} has class {kinds[row]:g}, and classes are 0 to {facts.count - 1}; rows without a box are all -1"
        )
    return f"box {row} has edges {edges[row].round(4).tolist()}: 0 <= x0 <= x1 <= 1 is wanted, and the same of y"
