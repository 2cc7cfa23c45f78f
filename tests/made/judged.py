"""Pictures of the shapes world, and what tasks would be given for them, made by the conditions' own functions."""

from __future__ import annotations

from functools import cache

import numpy as np

from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.conditions.labels import sample_labels
from pipeline.conditions.lowres import lowres
from pipeline.conditions.mask import masks, pack
from pipeline.evaluation.tasks.judge import Given
from preprocess.shapes.captions import COLOURS, SHAPES
from preprocess.shapes.drawing import Scene, label_map, render, scene

NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
COUNT = 128
LABELS = ("background", *NAMES)
LOWRES = LowresFacts(factor=4, degradation="bicubic")
MASK = MaskFacts(kinds=("rectangles",))
CONDITIONS = Conditions(
    classes=ClassFacts(count=24, names=NAMES),
    boxes=BoxFacts(count=25, most=5, names=LABELS),
    labels=LabelFacts(count=25, grid=4, names=LABELS),
    lowres=LOWRES,
    mask=MASK,
    pixels=True,
)


@cache
def scenes(lone: bool = False) -> list[Scene]:
    found = (scene(5, i, "val") for i in range(10_000))
    chosen = (truth for truth in found if not lone or len(truth.objects) == 1)
    return [next(chosen) for _ in range(COUNT)]


@cache
def pictures(lone: bool = False) -> np.ndarray:
    return np.stack([render(truth) for truth in scenes(lone)])


def boxes(truth: Scene) -> np.ndarray:
    rows = np.full((5, 5), -1, np.float16)
    for row, thing in zip(rows, truth.objects):
        row[:] = (thing.label, *(edge / 64 for edge in thing.box))
    return rows


@cache
def given(lone: bool = False, truth: bool = True) -> Given:
    drawn, chosen = pictures(lone), scenes(lone)
    largest = [max(truth.objects, key=lambda o: o.radius) for truth in chosen]
    members = {
        "cond.class": np.array([thing.label - 1 for thing in largest], np.int32),
        "cond.boxes": np.stack([boxes(truth) for truth in chosen]),
        "cond.labels": np.stack([sample_labels(label_map(truth), (32, 32)) for truth in chosen]),
        "cond.lowres": np.stack([lowres(picture, LOWRES, "") for picture in drawn]),
        "cond.mask": np.stack([pack(masks(str(i), (64, 64), MASK)) for i in range(COUNT)]),
    }
    return Given([truth.caption for truth in chosen], members, drawn if truth else None, drawn)
